"""Decoding in worker processes: hostile files cost only themselves, and no process stays behind."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import random
import signal
import struct
import subprocess
import sys
import threading
import time
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future, wait
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image
from pydicom.data import get_testdata_file

import cxr_retrieval
from cxr_retrieval import errors
from cxr_retrieval.errors import CxrError, ImageError, SetupError
from cxr_retrieval.radiograph.decoding import DecodingLimits, Film, FilmReader
from cxr_retrieval.radiograph.files import MAX_FILE_BYTES
from cxr_retrieval.radiograph.letterbox import letterbox
from cxr_retrieval.radiograph.phantoms import Phantom, write_dicom
from cxr_retrieval.radiograph.reading import read_radiograph
from tests_support import at_a_terminal

ONE = DecodingLimits(workers=1)
HURRIED = DecodingLimits(workers=2, timeout_s=4)
SOURCES = str(Path(cxr_retrieval.__file__).parents[1])


def shipped(name: str) -> Path:
    """A file of pydicom's own tests, as its package holds it; never downloaded."""
    path = get_testdata_file(name, download=False)
    assert isinstance(path, str)
    return Path(path)


def chunk(kind: bytes, body: bytes = b"") -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_that_claims(width: int, height: int) -> bytes:
    """A grey 16-bit PNG of few bytes: all zeros but for one pixel, so well compressed that its size is a claim only."""
    packer = zlib.compressobj(1)
    row = bytes(1 + 2 * width)
    body = b"".join([packer.compress(row[:-1] + b"\xff"), *(packer.compress(row) for _ in range(height - 1)), packer.flush()])
    header = struct.pack(">IIBBBBB", width, height, 16, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def error_of(future: Future[Film]) -> BaseException:
    error = future.exception(timeout=60)
    assert error is not None
    return error


def workers_of(pid: int) -> list[psutil.Process]:
    return [child for child in psutil.Process(pid).children() if "cxr_retrieval.radiograph.worker" in " ".join(_command(child))]


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:  # it has ended
        return []


class Workers:
    """The workers that this process started after this was made."""

    def __init__(self) -> None:
        self._before = workers_of(os.getpid())

    def running(self, number: int, busy_s: float = 0) -> list[psutil.Process]:
        """So many of them, as soon as they have computed so long; starting takes about half a second."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            ours = [worker for worker in workers_of(os.getpid()) if worker not in self._before and worker.cpu_times().user >= busy_s]
            if len(ours) == number:
                return ours
            time.sleep(0.02)
        raise AssertionError(f"never {number} workers at once")


def ended(processes: list[psutil.Process], timeout: float = 5) -> bool:
    return not psutil.wait_procs(processes, timeout)[1]


@pytest.fixture
def workers() -> Workers:
    return Workers()


@pytest.fixture
def crash(tmp_path: Path) -> Path:
    """A JPEG damaged inside, under the transfer syntax that has GDCM read it: its library aborts."""
    data = bytearray(shipped("SC_rgb_jpeg.dcm").read_bytes().replace(b"1.2.840.10008.1.2.4.50", b"1.2.840.10008.1.2.4.51"))
    data[1005 : 1005 + 64] = bytes(64)
    path = tmp_path / "crash.dcm"
    path.write_bytes(data)
    return path


@pytest.fixture(scope="module")
def hang(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PNG of eight million chunks that nobody knows: each costs a little, and all of them half a minute."""
    path = tmp_path_factory.mktemp("hang") / "hang.png"
    with path.open("wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 99, 99, 8, 0, 0, 0, 0)))
        for _ in range(80):
            file.write(100_000 * chunk(b"aBCd"))
        file.write(chunk(b"IDAT", zlib.compress(bytes(99 * 100))) + chunk(b"IEND"))
    return path


@pytest.fixture
def good(tmp_path: Path, phantoms: list[Phantom]) -> Path:
    path = tmp_path / "good.dcm"
    write_dicom(phantoms[0], path)
    return path


@pytest.fixture(scope="module")
def reader() -> Iterator[FilmReader]:
    with FilmReader(HURRIED) as films:
        yield films


def test_a_film_is_what_decoding_here_gives(reader: FilmReader, good: Path) -> None:
    film = reader.read(good)
    radiograph = read_radiograph(good)
    square, box = letterbox(radiograph.pixels)
    assert film.square.dtype == np.uint8
    assert film.square.tobytes() == square.tobytes()
    assert (film.box, film.format, film.warnings, film.patient_id) == (box, "DICOM", radiograph.warnings, radiograph.patient_id)
    assert film.pixels == hashlib.sha256(square.tobytes()).hexdigest()
    assert film.file == hashlib.sha256(good.read_bytes()).hexdigest()


def test_the_same_picture_under_another_name_and_format(reader: FilmReader, phantoms: list[Phantom], tmp_path: Path) -> None:
    for name in ("a.png", "b.tif"):
        Image.fromarray(phantoms[1].pixels).save(tmp_path / name)
    png, tiff = reader.read(tmp_path / "a.png"), reader.read(tmp_path / "b.tif")
    assert (png.format, tiff.format) == ("PNG", "TIFF")
    assert png.pixels == tiff.pixels
    assert png.file != tiff.file


def test_hostile_files_cost_only_themselves(crash: Path, hang: Path, good: Path) -> None:
    with FilmReader(HURRIED) as films:
        order = [good, crash, good, hang, good, crash, crash, good]
        futures = [films.submit(path) for path in order]
        wait(futures, timeout=60)
        expected = films.read(good).pixels
        for path, future in zip(order, futures, strict=True):
            if path == good:
                assert future.result().pixels == expected
            else:
                assert isinstance(error_of(future), ImageError)
        assert str(futures[1].exception()) == (
            "crash.dcm: the decoder crashed (signal 6); expected pixel data that can be decoded; "
            "got An invalid logic behavior occurred0. Next: export the image again, uncompressed if need be."
        )
        assert str(futures[3].exception()).startswith("hang.png: decoding took longer than 4 s; ")


def test_the_time_counts_from_when_a_worker_takes_the_file_up(hang: Path, good: Path) -> None:
    with FilmReader(DecodingLimits(workers=1, timeout_s=1.5)) as films:
        futures = [films.submit(path) for path in (hang, hang, good)]  # the last one waits for twice the limit
        assert futures[2].result(60).format == "DICOM"


def test_a_worker_killed_over_its_first_file_is_reported(hang: Path, good: Path, workers: Workers) -> None:
    with FilmReader(ONE) as films:
        future = films.submit(hang)
        (worker,) = workers.running(1, busy_s=1.5)
        worker.kill()
        assert str(error_of(future)).startswith("hang.png: the decoder crashed (signal 9); ")
        assert films.read(good).format == "DICOM"


def test_a_file_is_not_blamed_for_what_earlier_files_left_behind(good: Path, hang: Path, workers: Workers) -> None:
    with FilmReader(DecodingLimits(workers=1, timeout_s=8)) as films:
        films.read(good)
        future = films.submit(hang)
        (used,) = workers.running(1, busy_s=1.5)
        used.kill()
        assert "took longer than 8 s" in str(error_of(future))  # a fresh worker was asked, too


def test_a_worker_that_dies_idle_is_replaced(good: Path, workers: Workers) -> None:
    with FilmReader(ONE) as films:
        films.read(good)
        (idle,) = workers.running(1)
        idle.kill()
        assert ended([idle])
        assert films.read(good).format == "DICOM"


@pytest.mark.parametrize("kind", ["png", "dicom"])
def test_the_limit_of_memory(kind: str, good: Path, tmp_path: Path) -> None:
    path = tmp_path / f"large.{kind}"
    if kind == "png":
        path.write_bytes(png_that_claims(9_999, 10_000))
    else:
        claimed = np.zeros((4000, 8000), np.uint8)
        claimed[0, 0] = 255
        write_dicom(Phantom("large", "control", "a", claimed, claimed, claimed, {}), path)
    with FilmReader(DecodingLimits(workers=1, memory_bytes=256 * 2**20)) as films:
        films.read(good)
        with pytest.raises(ImageError, match=rf"^large.{kind}: needs more than 256 MiB of memory; "):
            films.read(path)
        assert films.read(good).format == "DICOM"


def test_what_is_no_file(reader: FilmReader, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "folder.png").mkdir()
    large = tmp_path / "large.dcm"
    with large.open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    for name, got in (
        ("fifo.png", "is no file; expected a regular file; got a FIFO"),
        ("folder.png", "is no file; expected a regular file; got a directory"),
        ("missing.png", "cannot be read; expected a readable file; got No such file or directory"),
        ("large.dcm", "the file is too large; expected at most 1 GiB; got 1 GiB"),
    ):
        error = error_of(reader.submit(tmp_path / name))
        assert isinstance(error, ImageError)
        assert str(error).startswith(f"{name}: {got}. Next: ")
    with pytest.raises(ImageError, match=r"^zero: is no file; .* got a device\."):
        reader.read(Path("/dev/zero"))


def test_a_relative_path_is_meant_from_here(reader: FilmReader, good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(good.parent)
    assert reader.read(Path(good.name)).format == "DICOM"


def test_errors_come_back_whole(reader: FilmReader, tmp_path: Path) -> None:
    path = tmp_path / "page.png"
    path.write_bytes(b"%PDF-1.7")
    error = error_of(reader.submit(path))
    assert isinstance(error, ImageError)
    assert (error.what, error.expected, error.got) == ("page.png: not an image this system reads", "DICOM, PNG, JPEG or TIFF", "a PDF")
    assert error.next_step == "give a frontal chest radiograph as DICOM, PNG, JPEG or TIFF"


@pytest.mark.parametrize("kind", [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, CxrError)])
def test_every_error_survives_pickling(kind: type[CxrError]) -> None:
    for error in (kind("it broke", expected="a", got="it said...", next_step="do c"), kind("it said...", got="more..."), kind("x.")):
        copy = pickle.loads(pickle.dumps(error))
        assert type(copy) is kind
        assert str(copy) == str(error)
        assert vars(copy) == vars(error)


def test_many_files_keep_their_association(reader: FilmReader, phantoms: list[Phantom], tmp_path: Path) -> None:
    paths: list[Path] = []
    for index in range(200):
        small = np.asarray(Image.fromarray(phantoms[index % len(phantoms)].pixels).resize((160, 128 + index % 50)))
        paths.append(tmp_path / f"{index}.png")
        Image.fromarray(np.roll(small, index, axis=1)).save(paths[-1])
    futures = [reader.submit(path) for path in paths]
    for path, future in zip(paths, futures, strict=True):
        square, box = letterbox(read_radiograph(path).pixels)
        assert future.result(60).square.tobytes() == square.tobytes()
        assert future.result().box == box


def test_threads_may_share_a_reader_and_end_before_it(reader: FilmReader, good: Path) -> None:
    films: list[Film] = []
    for _ in range(3):
        threads = [threading.Thread(target=lambda: films.append(reader.read(good))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert len({film.pixels for film in films}) == 1
    assert len(films) == 12


def test_damaged_files_end_as_film_or_error(tmp_path: Path) -> None:
    """A small fuzz: bits flipped, ends cut off, across all transfer syntaxes that pydicom's package holds."""
    sources = sorted(path for path in shipped("SC_rgb_jpeg.dcm").parent.glob("*.dcm") if 2_000 < path.stat().st_size < 200_000)
    assert len(sources) > 40
    chance = random.Random(20_241)
    paths: list[Path] = []
    for index in range(100):
        data = bytearray(sources[index % len(sources)].read_bytes())
        if index % 4 == 0:
            data = data[: chance.randrange(200, len(data))]
        else:
            for _ in range(chance.choice((1, 8, 64))):
                data[chance.randrange(200, len(data))] ^= 1 << chance.randrange(8)
        paths.append(tmp_path / f"{index}.dcm")
        paths[-1].write_bytes(data)
    with FilmReader(DecodingLimits(workers=2, timeout_s=2)) as films:
        futures = [films.submit(path) for path in paths]
        outcomes = [future.exception(60) for future in futures]
    assert {type(outcome) for outcome in outcomes} == {ImageError, type(None)}


def test_no_worker_stays_after_close(good: Path, hang: Path, workers: Workers) -> None:
    with FilmReader(DecodingLimits(workers=2)) as films:
        films.read(good)
        stuck = films.submit(hang)
        workers.running(1, busy_s=1.5)
        queued = [films.submit(hang) for _ in range(3)]
        mine = workers.running(2)
        started = time.monotonic()
    assert time.monotonic() - started < 3
    assert ended(mine)
    assert str(error_of(stuck)) == "the file reader was closed before this file was decoded."
    with pytest.raises(CancelledError):
        queued[-1].result(1)
    with pytest.raises(RuntimeError, match="closed"):
        films.submit(good)
    films.close()


def test_a_reader_closed_at_once() -> None:
    FilmReader(ONE).close()


def test_one_file_after_the_other_needs_one_worker(good: Path, workers: Workers) -> None:
    with FilmReader(DecodingLimits(workers=4)) as films:
        for _ in range(5):
            films.read(good)
        workers.running(1)


@pytest.mark.parametrize("limits", [{"workers": -1}, {"timeout_s": 0.0}, {"timeout_s": float("nan")}, {"memory_bytes": 2**20}])
def test_limits_are_checked(limits: dict[str, int]) -> None:
    with pytest.raises(SetupError, match="limits of decoding"):
        DecodingLimits(**limits)


def test_a_worker_that_cannot_start(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "path", [str(tmp_path)])
        with FilmReader(ONE) as films:
            for _ in range(2):
                with pytest.raises(SetupError, match=r"did not start; .* got (ModuleNotFound|Import)Error: No module named"):
                    films.read(good)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "none"))
    with FilmReader(ONE) as films, pytest.raises(SetupError, match=r"did not start; .* No such file"):
        films.read(good)


# ---------------------------------------------------------------------------------- programs that use the reader

PROGRAM = """
import os, sys, time
from pathlib import Path
from cxr_retrieval.radiograph.decoding import DecodingLimits, FilmReader
print("started", flush=True)
"""
NO_GUARD = f"""{PROGRAM}
with FilmReader(DecodingLimits(workers=2)) as films:
    for future in [films.submit(Path(path)) for path in sys.argv[1:]]:
        print(future.result().format, flush=True)
"""
NEVER_CLOSED = f"""{PROGRAM}
films = FilmReader(DecodingLimits(workers=2))
futures = [films.submit(Path(path)) for path in sys.argv[1:]]
print(films.read(Path(sys.argv[1])).format, flush=True)
"""
WAITING = f"""{PROGRAM}
with FilmReader(DecodingLimits(workers=2)) as films:
    films.read(Path(sys.argv[1]))
    futures = [films.submit(Path(path)) for path in sys.argv[2:]]
    print("waiting", flush=True)
    for future in futures:
        future.result()
"""


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join([SOURCES, os.environ.get("PYTHONPATH", "")])}


def run(arguments: list[str], **options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=60, env=environment(), check=False, input=options.get("input")
    )


@pytest.mark.parametrize("how", ["script", "module", "-c", "stdin"])
def test_a_program_needs_no_main_guard(how: str, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "program.py").write_text(NO_GUARD)
    monkeypatch.chdir(tmp_path)
    files = [str(good), str(good)]
    starts = {"script": ["program.py"], "module": ["-m", "program"], "-c": ["-c", NO_GUARD], "stdin": ["-"]}
    done = run([*starts[how], *files], input=NO_GUARD)
    assert (done.stdout, done.stderr, done.returncode) == ("started\nDICOM\nDICOM\n", "", 0)


def test_the_noise_of_decoders_stays_in_the_worker(crash: Path, hang: Path, good: Path) -> None:
    program = NO_GUARD.replace("print(future.result().format", "print(type(future.exception()).__name__")
    done = run(["-c", program, str(good), str(crash), str(good)])
    assert (done.stdout, done.stderr) == ("started\nNoneType\nImageError\nNoneType\n", "")


def test_a_reader_never_closed_does_not_hold_up_the_exit(good: Path, hang: Path) -> None:
    started = time.monotonic()
    done = run(["-c", NEVER_CLOSED, str(good), str(hang)])
    assert (done.stdout, done.stderr, done.returncode) == ("started\nDICOM\n", "", 0)
    assert time.monotonic() - started < 20  # the file under way would have had 30 s


def test_importing_is_light() -> None:
    done = run(["-c", "import sys, cxr_retrieval.radiograph.decoding; print(*{name.split('.')[0] for name in sys.modules})"])
    assert "numpy" in done.stdout.split()
    assert not {"pydicom", "gdcm", "openjpeg", "pymilvus", "tritonclient", "grpc", "pandas", "torch", "openvino", "rich"} & set(
        done.stdout.split()
    )


@pytest.fixture
def waiting(good: Path, hang: Path) -> Iterator[tuple[subprocess.Popen[str], list[psutil.Process]]]:
    """A program with a process group of its own, one worker stuck and one idle."""
    program = subprocess.Popen(
        at_a_terminal(sys.executable, "-c", WAITING, str(good), str(hang), str(good)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        start_new_session=True,
    )
    with program:
        assert program.stdout is not None
        while program.stdout.readline() != "waiting\n":
            assert program.poll() is None
        deadline = time.monotonic() + 20
        while len(workers := workers_of(program.pid)) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(workers) == 2
        time.sleep(1)
        yield program, workers
        program.kill()


def test_no_worker_outlives_a_killed_parent(waiting: tuple[subprocess.Popen[str], list[psutil.Process]]) -> None:
    program, workers = waiting
    program.kill()
    assert ended(workers)


def test_ctrl_c_ends_quickly_and_without_traces_of_workers(waiting: tuple[subprocess.Popen[str], list[psutil.Process]]) -> None:
    program, workers = waiting
    os.killpg(program.pid, signal.SIGINT)
    _, messages = program.communicate(timeout=25)  # a file that takes 30 s is under way
    assert messages.count("Traceback") == 1  # the program's own
    assert messages.rstrip().endswith("KeyboardInterrupt")
    assert "work(" not in messages
    assert ended(workers)


def test_a_signal_to_the_workers_themselves_is_survived(good: Path, workers: Workers) -> None:
    with FilmReader(ONE) as films:
        films.read(good)
        (worker,) = workers.running(1)
        worker.send_signal(signal.SIGINT)
        assert films.read(good).format == "DICOM"
        assert worker.is_running()


def test_a_member_of_a_zip_is_read_in_the_worker(tmp_path: Path) -> None:
    """Like a file; what is damaged or not there is an error of its own."""
    path = tmp_path / "films.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/film.png", film_bytes())
        archive.writestr("zeros.png", bytes(2**24))
    with FilmReader(DecodingLimits(workers=1)) as reader:
        film = reader.submit(path, "a/film.png").result()
        (tmp_path / "film.png").write_bytes(film_bytes())
        assert film.file == reader.read(tmp_path / "film.png").file
        with pytest.raises(ImageError, match=r"none\.png: cannot be read from films\.zip"):
            reader.submit(path, "none.png").result()
        with pytest.raises(ImageError, match=r"zeros\.png: cannot be read from films\.zip; .*as no radiograph can be"):
            reader.submit(path, "zeros.png").result()
        damaged = bytearray(path.read_bytes())
        damaged[60:90] = bytes(30)
        path.write_bytes(damaged)
        with pytest.raises(ImageError, match="cannot be read from"):
            reader.submit(path, "a/film.png").result()


def film_bytes() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.tile(np.arange(256, dtype=np.uint8), (256, 1))).save(buffer, "PNG")
    return buffer.getvalue()
