"""A rehearsal of `make test-night` on real radiographs: 90 gallery films, 30 as DICOM with planted identities, Triton killed three times."""

from __future__ import annotations

from pathlib import Path

import pytest

from chaos.night import Asked, night

pytestmark = [pytest.mark.real_data, pytest.mark.whole]


@pytest.mark.timeout(1800)
def test_a_night_loses_nothing_and_tells_nobody(real_data: Path) -> None:
    found = night(Asked(real_data, train=90, val=30))
    assert (found["lost"], found["doubled"]) == (0, 0)
    assert found["triton_killed"] == 3
    assert found["planted_elements_per_film"] > 300
    assert found["labels_equal"] == found["labels_compared"] > 25
    assert found["accuracy_of_the_labels_compared_with"] == pytest.approx(found["evaluate_accuracy"])
    assert {place: pieces for place, pieces in found["planted_found"].items() if pieces} == {}
