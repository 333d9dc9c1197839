"""What is held in memory: bounded, and never another's film."""

from __future__ import annotations

import gc
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cxr_retrieval.errors import GoneError
from cxr_retrieval.view.kept import Kept, Uploads


@given(st.lists(st.tuples(st.sampled_from(["put", "get"]), st.integers(0, 6))), st.integers(1, 4))
def test_the_last_used_are_kept(does: list[tuple[str, int]], most: int) -> None:
    kept, model = Kept[int, int](most), list[int]()
    for what, number in does:
        if what == "put":
            kept.put(number, number)
        elif kept.get(number) is None:
            assert number not in model
            continue
        if number in model:
            model.remove(number)
        model = [*model, number][-most:]
    assert [number for number in range(7) if kept.get(number) is not None] == sorted(model)


def test_a_file_that_is_forgotten_stays_readable_for_who_has_it() -> None:
    """And what comes after it, under the same descriptor, is never taken for it."""
    before = len(os.listdir("/proc/self/fd"))
    uploads = Uploads(most_bytes=100)
    first = uploads.put(b"a" * 60)
    with uploads.lent(first) as path:
        later = [uploads.put(bytes([number]) * 60) for number in range(5)]
        assert first not in uploads
        assert path.read_bytes() == b"a" * 60
    with uploads.lent(later[-1]) as path:
        assert path.read_bytes() == b"\4" * 60
        assert "memfd" in str(path.readlink()), "on no disk"
    with pytest.raises(GoneError, match=r"no longer in memory.*drop the file again"), uploads.lent(first):
        pass
    assert uploads.put(b"\4" * 60) == later[-1], "the same file has the same name, and is kept once"
    uploads.close()
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before
