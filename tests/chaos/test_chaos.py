"""The short form of `make chaos`: one run for each kind of component (Triton killed: `test_restarts.py`), at moments that change from run to run of this test."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from chaos.run import Plan, World, run_one, world


@pytest.fixture(scope="module")
def servers() -> Iterator[World]:
    with world(30, ("batch", "ingest")) as made:
        yield made
    assert made.triton.left_behind() == []


@pytest.mark.parametrize(("command", "harm"), [("batch", "client killed"), ("batch", "triton cut"), ("ingest", "milvus killed")])
def test_nothing_is_lost_doubled_or_wrong(command: str, harm: str, servers: World) -> None:
    seed = str(random.SystemRandom().randrange(10**6))
    record, _ = run_one(servers, Plan(0, command, harm, 2, seed))
    assert (record.lost, record.doubled, record.wrong, record.failed, record.troubles) == (0, 0, 0, 0, []), record
