"""Hundreds of corrupted and hostile files through the reader: each ends as a film or an ImageError, and nothing stays behind."""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from cxr_retrieval.errors import ImageError
from cxr_retrieval.radiograph.decoding import DecodingLimits, FilmReader
from cxr_retrieval.radiograph.reading import read_radiograph
from hostile_files import DAMAGE, damaged, hostile, valid

LIMITS = DecodingLimits(workers=2, timeout_s=8)
MOST_GROWN = 64 * 2**20
"""Bytes that this process may grow by; one file's worth of pixels would be more."""


@contextmanager
def nothing_left_behind() -> Generator[None]:
    """No descriptor, process, zombie or shared memory more than before; memory within bounds."""
    me = psutil.Process()

    def held() -> tuple[int, set[int], set[str]]:
        return me.num_fds(), {child.pid for child in me.children(recursive=True)}, set(os.listdir("/dev/shm"))

    before, memory = held(), me.memory_info().rss
    yield
    descriptors, children, shared = held()
    assert descriptors <= before[0]
    assert children <= before[1]
    assert not {name for name in shared - before[2] if "cxr" in name and str(me.pid) in name}
    assert me.memory_info().rss < memory + MOST_GROWN


def outcomes(paths: list[Path]) -> dict[str, BaseException | None]:
    """Of each file: its error, or None for a film."""
    with FilmReader(LIMITS) as reader:
        futures = {path.name: reader.submit(path) for path in paths}
        return {name: future.exception(timeout=240) for name, future in futures.items()}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("hostile")
    for name, data in hostile().items():
        (folder / name).write_bytes(data)
    return sorted(folder.iterdir())


def test_every_hostile_file_ends_as_film_or_error(corpus: list[Path]) -> None:
    assert len(corpus) >= 800
    outcomes(corpus[:1])  # what a first reader opens for good is no leak
    with nothing_left_behind():
        found = outcomes(corpus)
    assert found.keys() == {path.name for path in corpus}
    assert {type(outcome) for outcome in found.values()} == {ImageError, type(None)}
    for name, outcome in found.items():
        if isinstance(outcome, ImageError):
            assert str(outcome).startswith(f"{name}: "), name
            assert outcome.next_step, name
    what = Counter(str(outcome).split(": ", 1)[1].split(";")[0] for outcome in found.values() if outcome)
    for reason in ("the file is damaged", "the DICOM pixel data cannot be decoded", "too large", "not an image this system reads"):
        assert what[reason] > 10, what
    assert what["decoding took longer than 8 s"] + what["the decoder crashed (signal 6)"] <= 10, what


@pytest.mark.parametrize("name", valid())
def test_what_the_harmed_files_are_made_from_is_whole(name: str) -> None:
    assert read_radiograph(valid()[name], name).pixels.shape == (96, 112)


def test_a_seed_gives_the_same_files_and_all_kinds_of_damage(corpus: list[Path]) -> None:
    again = hostile()
    assert all(path.read_bytes() == again[path.name] for path in corpus)
    assert dict(damaged(7, 20)).keys() != dict(damaged(8, 20)).keys()
    for harm in DAMAGE:
        assert sum(f"-{harm.__name__}-" in path.name for path in corpus) >= 80


def test_what_is_no_regular_file(tmp_path: Path) -> None:
    """Refused without being opened or waited for; a terabyte of nothing is not read."""
    os.mkfifo(tmp_path / "fifo.dcm")
    (tmp_path / "folder.dcm").mkdir()
    (tmp_path / "loop.dcm").symlink_to(tmp_path / "loop.dcm")
    (tmp_path / "nowhere.dcm").symlink_to(tmp_path / "none")
    (tmp_path / "zero.dcm").symlink_to("/dev/zero")
    (tmp_path / "endless.dcm").symlink_to("/proc/kmsg")
    with (tmp_path / "sparse.dcm").open("wb") as file:
        file.truncate(2**40)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket.dcm"))
        found = outcomes(sorted(tmp_path.iterdir()))
    assert {type(outcome) for outcome in found.values()} == {ImageError}
    assert {name: str(outcome).split(": ", 1)[1].split(";")[0] for name, outcome in found.items()} | {"endless.dcm": ""} == {
        "fifo.dcm": "is no file",
        "folder.dcm": "is no file",
        "zero.dcm": "is no file",
        "socket.dcm": "is no file",
        "loop.dcm": "cannot be read",
        "nowhere.dcm": "cannot be read",
        "sparse.dcm": "the file is too large",
        "endless.dcm": "",
    }
