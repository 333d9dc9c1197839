"""What a user points at: each kind of input, what hostile containers are refused for, and that no search leaves its folder."""

from __future__ import annotations

import io
import os
import pathlib
import shutil
import struct
import threading
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cxr_retrieval.archive import inputs
from cxr_retrieval.archive.inputs import Input, Unlisted, Unusable, as_cases, find_inputs
from cxr_retrieval.errors import ImageError, ManifestError, UsageError
from cxr_retrieval.radiograph import containers
from cxr_retrieval.radiograph.decoding import DecodingLimits, FilmReader
from cxr_retrieval.radiograph.phantoms import Phantom, write_dicom
from tests_support import write_dicomdir

DICOM = bytes(128) + b"DICM" + bytes(64)
"""Begins as a DICOM file does: what a search goes by."""


@pytest.fixture(scope="module")
def reader() -> Iterator[FilmReader]:
    with FilmReader(DecodingLimits(workers=1)) as opened:
        yield opened


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def files(folder: Path, *names: str, data: bytes = DICOM) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def names(reader: FilmReader, *paths: str, split: str | None = None, left_out: Path | None = None) -> list[str]:
    """Of inputs; nothing may be unusable."""
    found = list(find_inputs(paths, reader, split=split, left_out=left_out))
    assert [str(one.error) for one in found if isinstance(one, Unusable)] == []
    return [one.name for one in found]


def problems(reader: FilmReader, *paths: str) -> dict[str, str]:
    """Of what is unusable, name → why."""
    return {one.name: str(one.error) for one in find_inputs(paths, reader) if isinstance(one, Unusable)}


# ------------------------------------------------------------------------------------------------- files and folders


def test_a_folder_is_searched_in_order_for_what_can_be_a_film(here: Path, reader: FilmReader) -> None:
    files(here / "f", "b.dcm", "a/2.PNG", "a/1.jpeg", "c.tiff", "IM000001", "1.2.840.113", "z/scan.ima")
    files(here / "f", ".hidden.dcm", "._b.dcm", "__MACOSX/b.dcm", ".git/b.dcm", "a/@eaDir/2.PNG/thumb.jpg")
    files(here / "f", "Thumbs.db", "notes.txt", "README", "DICOMDIR", data=b"no film")
    os.mkfifo(here / "f" / "fifo.dcm")
    assert names(reader, "f") == ["f/1.2.840.113", "f/IM000001", "f/a/1.jpeg", "f/a/2.PNG", "f/b.dcm", "f/c.tiff", "f/z/scan.ima"]
    assert names(reader, "f/notes.txt", "f/.hidden.dcm") == ["f/notes.txt", "f/.hidden.dcm"], "what is named is taken"
    assert names(reader, "f", left_out=here / "f" / "a") == ["f/1.2.840.113", "f/IM000001", "f/b.dcm", "f/c.tiff", "f/z/scan.ima"]


def test_what_is_not_there_or_may_not_be_read_is_named_and_the_rest_goes_on(here: Path, reader: FilmReader) -> None:
    files(here / "f", "a/1.dcm", "shut/2.dcm", "z/3.dcm")
    (here / "f" / "shut").rename(here / "f" / ("s" * 200))
    deep = here / "f" / ("s" * 200)
    for _ in range(20):  # beyond what a path may be long; as unreadable as a folder without rights, also for root
        os.chdir(deep)
        (Path() / ("s" * 200)).mkdir()
        deep = Path("s" * 200)
    os.chdir(here)
    found = list(find_inputs(["gone.dcm", "f", "x" * 5000], reader))
    assert [one.name for one in found if isinstance(one, Input)] == ["f/a/1.dcm", f"f/{'s' * 200}/2.dcm", "f/z/3.dcm"]
    first, deepest, longest = [one for one in found if isinstance(one, Unusable)]
    assert str(first.error) == "gone.dcm: is not there; expected a file or a folder. Next: correct the path."
    assert "cannot be read; expected a folder that may be listed; got File name too long" in str(deepest.error)
    assert "is not there" in str(longest.error)


def test_a_folder_without_rights(here: Path, reader: FilmReader, monkeypatch: pytest.MonkeyPatch) -> None:
    files(here / "f", "shut/2.dcm", "z.dcm")
    scandir = os.scandir

    def refusing(path: str) -> Iterator[os.DirEntry[str]]:  # root, as whom tests may run, is refused nothing
        if path.endswith("shut"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    found = list(find_inputs(["f"], reader))
    assert [one.name for one in found] == ["f/shut", "f/z.dcm"]
    assert problems(reader, "f")["f/shut"].startswith("f/shut: cannot be read; expected a folder that may be listed; got Permission denied")


def test_links_within_count_and_lead_nowhere_else(here: Path, reader: FilmReader) -> None:
    files(here, "elsewhere/secret.dcm", "f/a/film.dcm", "f/.store/object")
    (here / "f" / "loop").symlink_to(here / "f")
    (here / "f" / "a" / "up").symlink_to("..")
    (here / "f" / "b.dcm").symlink_to(".store/object")
    (here / "f" / "out.dcm").symlink_to(here / "elsewhere" / "secret.dcm")
    (here / "f" / "outer").symlink_to(here / "elsewhere")
    (here / "f" / "nowhere.dcm").symlink_to("gone.dcm")
    (here / "f" / "itself.dcm").symlink_to("itself.dcm")
    (here / "door").symlink_to("f")
    found = list(find_inputs(["f"], reader))
    assert [one.name for one in found if isinstance(one, Input)] == ["f/a/film.dcm", "f/b.dcm"]
    assert [one.name for one in found if isinstance(one, Unusable)] == ["f/itself.dcm", "f/nowhere.dcm", "f/out.dcm", "f/outer"]
    assert "a link that leads out of the folder, or nowhere" in problems(reader, "f")["f/out.dcm"]
    assert names(reader, "f/out.dcm") == ["f/out.dcm"], "what is named is taken"
    assert [one.name for one in find_inputs(["door"], reader) if isinstance(one, Input)] == ["door/a/film.dcm", "door/b.dcm"]
    assert "f/out.dcm" in problems(reader, "f/**/*.dcm")


def test_one_file_has_one_place(here: Path, reader: FilmReader) -> None:
    files(here, "f/a.dcm")
    (here / "door").symlink_to("f")
    found = list(find_inputs(["f/a.dcm", "./f/a.dcm", str(here / "f" / "a.dcm"), "f", "f/*.dcm", "door", "f//a.dcm"], reader))
    assert len(found) == 7
    assert len({one.place for one in found}) == 1


PART = st.sampled_from(["a", "b.dcm", "c", "d.png", ".h", "e.zip"])


@given(
    st.lists(st.lists(PART, min_size=1, max_size=4), max_size=8),
    st.lists(
        st.tuples(st.lists(PART, min_size=1, max_size=3), st.lists(st.sampled_from(["..", "a", "c", "/", "b.dcm"]), max_size=5)), max_size=6
    ),
    st.sampled_from(["root", "root/**/*", "root/*", "root/[ab]*/**/*", "root/**", "root/*/*.dcm"]),
)
def test_no_search_leaves_its_folder(
    tmp_path_factory: pytest.TempPathFactory,
    reader: FilmReader,
    paths: list[list[str]],
    links: list[tuple[list[str], list[str]]],
    pattern: str,
) -> None:
    """Whatever links there are: each input lies, links resolved, below the folder given; and none comes twice by one name."""
    top = tmp_path_factory.mktemp("top")
    root = top / "root"
    files(top, "b.dcm", "a/b.dcm", "c/d.png", "root/x.dcm")
    for parts in paths:
        try:
            files(root, "/".join(parts))
        except OSError:
            continue
    for parts, target in links:
        try:
            (root.joinpath(*parts)).symlink_to("/".join(target) or ".")
        except OSError:
            continue
    found = list(find_inputs([str(top / pattern)], reader))
    assert found
    for one in found:
        if isinstance(one, Input):
            assert one.path.resolve().is_relative_to(root)
            assert one.path.is_file()
    shutil.rmtree(top)


def test_many_files_are_found_one_at_a_time(here: Path, reader: FilmReader) -> None:
    """What is held does not grow with the archive: 3,200 files in 16 folders cost what one folder costs."""
    for folder in range(16):
        (here / "f" / str(folder)).mkdir(parents=True)
        for number in range(200):
            (here / "f" / str(folder) / f"{number}.dcm").touch()
    tracemalloc.start(8)
    try:
        one, all_of_them = find_inputs(["f/0"], reader), find_inputs(["f"], reader)
        assert sum(1 for _ in islice(one, 150)) == 150
        of_one = held_by_the_search()
        assert sum(1 for _ in islice(all_of_them, 3_150)) == 3_150
        assert of_one < held_by_the_search() < 3 * of_one, "one folder of 16, beside that of the other search"
    finally:
        tracemalloc.stop()
    assert sum(1 for _ in all_of_them) == 50


def held_by_the_search() -> int:
    """Bytes allocated on its behalf and not given back. Of the process and not of the search are what other threads allocate meanwhile, and
    the table of interned strings, which pathlib fills and which now and then doubles, be every string in it gone.
    """
    own = [tracemalloc.Filter(True, inputs.__file__, all_frames=True), tracemalloc.Filter(False, pathlib.__file__)]
    return sum(trace.size for trace in tracemalloc.take_snapshot().filter_traces(own).traces)


def test_a_search_ends_when_told(here: Path, reader: FilmReader) -> None:
    files(here / "f", *(f"{number}.txt" for number in range(50)), data=b"no film")
    stop = threading.Event()
    stop.set()
    assert list(find_inputs(["f", "f/*"], reader, stop=stop)) == []


# ---------------------------------------------------------------------------------------------------------- patterns


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("f/*.dcm", ["f/1.dcm"]),
        ("f/**/*.dcm", ["f/1.dcm", "f/a/2.dcm", "f/a/b/3.dcm"]),
        ("**/?.dcm", ["f/1.dcm", "f/a/2.dcm", "f/a/b/3.dcm"]),
        ("f/**/b/*", ["f/a/b/3.dcm"]),
        ("f/**/**/3*", ["f/a/b/3.dcm"]),
        ("f/*", ["f/1.dcm", "f/[x].png", "f/a/2.dcm", "f/a/b/3.dcm"]),
        ("f/**", ["f/1.dcm", "f/[x].png", "f/a/2.dcm", "f/a/b/3.dcm"]),
        ("f/[ax]/*.dcm", ["f/a/2.dcm"]),
        ("./f/[x].png", ["./f/[x].png"]),
        ("f/.h/*", ["f/.h/4.dcm"]),
    ],
)
def test_patterns_that_the_shell_left_alone(here: Path, reader: FilmReader, pattern: str, expected: list[str]) -> None:
    files(here, "f/1.dcm", "f/a/2.dcm", "f/a/b/3.dcm", "f/[x].png", "f/.h/4.dcm")
    assert names(reader, pattern) == expected
    assert names(reader, str(here / pattern)) == [str(here / name) for name in expected]


@pytest.mark.parametrize("pattern", ["f/*.tif", "*.dcm", "f/**/x/*"])
def test_a_pattern_that_matches_nothing_is_said(here: Path, reader: FilmReader, pattern: str) -> None:
    files(here, "f/1.dcm")
    (found,) = find_inputs([pattern], reader)
    assert isinstance(found, Unusable)
    assert isinstance(found.error, UsageError)
    assert str(found.error) == f"{pattern}: matches nothing; expected a pattern for files or folders. Next: correct the pattern."


# ------------------------------------------------------------------------------------------------------------- stdin


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (b"a.dcm\nf\n", ["a.dcm", "f/1.dcm"]),
        (b"a.dcm\r\n\r\nf", ["a.dcm", "f/1.dcm"]),
        (b"a.dcm\0new\nline.dcm\0f\0", ["a.dcm", "new\\nline.dcm", "f/1.dcm"]),
        (b"new\nline.dcm\0", ["new\\nline.dcm"]),
        (b"", []),
        (b"a.dcm\n" * 12_000, ["a.dcm"] * 12_000),
    ],
)
def test_names_on_stdin(here: Path, reader: FilmReader, given: bytes, expected: list[str]) -> None:
    files(here, "a.dcm", "f/1.dcm", "new\nline.dcm")
    read, write = os.pipe()

    def pour() -> None:
        with os.fdopen(write, "wb") as file:
            file.write(given)

    pouring = threading.Thread(target=pour)
    pouring.start()
    with os.fdopen(read, "rb"):
        found = list(find_inputs(["-"], reader, stdin=read))
    pouring.join()
    assert [one.name for one in found] == expected
    assert all(isinstance(one, Input) for one in found)


def test_names_on_stdin_are_no_patterns_and_no_end_is_no_name(here: Path, reader: FilmReader) -> None:
    files(here, "a.dcm")
    for listed, expected in ((b"*.dcm\n-\n", ["*.dcm", "-"]), (b"x" * 100_000, None)):
        (here / "list").write_bytes(listed)
        with (here / "list").open("rb") as file:
            if expected is None:
                with pytest.raises(UsageError, match="stdin holds no list of names"):
                    list(find_inputs(["-"], reader, stdin=file.fileno()))
            else:
                found = list(find_inputs(["-"], reader, stdin=file.fileno()))
                assert [one.name for one in found if isinstance(one, Unusable)] == expected


def test_a_search_that_is_told_to_end_does_not_wait_for_stdin(reader: FilmReader) -> None:
    read, write = os.pipe()
    stop = threading.Event()
    threading.Timer(0.2, stop.set).start()
    with os.fdopen(read, "rb"), os.fdopen(write, "wb"):
        assert list(find_inputs(["-"], reader, stdin=read, stop=stop)) == []


# --------------------------------------------------------------------------------------------------------- manifests


def test_rows_of_a_manifest(here: Path, reader: FilmReader) -> None:
    """Rows of the split `extra` wait to be asked for; a file that is not there is for its row to tell."""
    files(here, "m/a.dcm")
    (here / "m" / "m.csv").write_text(
        "image_id,path,label,patient_id,split\n1,a.dcm,control,p,val\n2,gone.dcm,x,,train\n3,a.dcm,tb,,extra\n"
    )
    found = list(find_inputs(["m/m.csv"], reader))
    rows = [(one.name, one.path, one.row.image_id, one.row.patient_id) for one in found if isinstance(one, Input) and one.row]
    assert rows == [("m/a.dcm", Path("m/a.dcm"), "1", "p"), ("m/gone.dcm", Path("m/gone.dcm"), "2", None)]
    assert names(reader, "m/m.csv", split="extra") == ["m/a.dcm"]
    cases = list(as_cases([*found, Input("b", Path("b"))], "covid19", "north", "train"))
    assert cases[:2] == [one.row for one in found if isinstance(one, Input)]
    assert cases[2] == Unlisted(Input("b", Path("b")), "covid19", "north", "train")
    (bare,) = as_cases([Input("b", Path("b"))], None, None, None)
    assert isinstance(bare, Unusable)
    assert "b: has no label" in str(bare.error)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("some,notes\n1,2\n", "column image_id, path, label missing"),
        ("", "column image_id"),
        ("image_id,path,label\n1,a\x00b,c\n", "a path that no file"),
    ],
)
def test_what_is_no_manifest_is_one_unusable_input(here: Path, reader: FilmReader, text: str, why: str) -> None:
    (here / "m.csv").write_text(text)
    files(here, "a.dcm")
    found = list(find_inputs(["m.csv", "a.dcm"], reader))
    assert isinstance(found[0], Unusable)
    assert isinstance(found[0].error, ManifestError)
    assert why in str(found[0].error)
    assert [one.name for one in found[1:]] == ["a.dcm"]


# -------------------------------------------------------------------------------------------------------------- ZIPs


def test_a_zip_is_looked_into_wherever_it_is_found(here: Path, reader: FilmReader, phantoms: list[Phantom]) -> None:
    write_dicom(phantoms[0], here / "film")
    (here / "f").mkdir()
    with zipfile.ZipFile(here / "f" / "Films.ZIP", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("a/b.dcm", "IM000001", "../../etc/passwd.dcm", "/abs.dcm", "win\\c.dcm", "Müller.dcm", "esc\x1b[2J.dcm", "~/x.dcm"):
            archive.writestr(name, (here / "film").read_bytes())
        for name in ("README", "DICOMDIR", "__MACOSX/._b.dcm", ".hidden.dcm", "Thumbs.db"):
            archive.writestr(name, b"no film")
        archive.writestr("folder.dcm/", b"")
    inside = ["a/b.dcm", "IM000001", "../../etc/passwd.dcm", "/abs.dcm", "win\\c.dcm", "Müller.dcm", "esc\\x1b[2J.dcm", "~/x.dcm"]
    expected = [f"f/Films.ZIP!/{name}" for name in inside]
    assert names(reader, "f") == names(reader, "f/Films.ZIP") == names(reader, "f/*.ZIP") == expected
    found = [one for one in find_inputs(["f"], reader) if isinstance(one, Input)]
    assert {one.path for one in found} == {Path("f/Films.ZIP")}
    assert len({one.place for one in found}) == len(found)
    films = [reader.submit(one.path, one.member).result() for one in found]
    assert {film.file for film in films} == {reader.read(here / "film").file}
    assert reader.identity(found[0].path, found[0].member).result().patient_id == phantoms[0].image_id
    shutil.copy(here / "f" / "Films.ZIP", here / "named.otherwise")
    assert len(names(reader, "named.otherwise")) == len(expected), "what is named is known by its content"
    assert sorted(path.name for path in here.rglob("*")) == ["Films.ZIP", "f", "film", "named.otherwise"], "nothing is unpacked"


def test_a_large_zip_comes_in_pages(here: Path, reader: FilmReader) -> None:
    with zipfile.ZipFile(here / "z.zip", "w") as archive:
        for number in range(1234):
            archive.writestr(f"{number}.dcm", b"x")
    assert names(reader, "z.zip") == [f"z.zip!/{number}.dcm" for number in range(1234)]


def zipped(*members: tuple[str, bytes], how: int = zipfile.ZIP_DEFLATED) -> bytearray:
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w", how) as archive:
        warnings.simplefilter("ignore")  # a name twice
        for name, data in members:
            archive.writestr(name, data)
    return bytearray(buffer.getvalue())


def encrypted() -> bytes:
    data = zipped(("a.dcm", DICOM))
    directory = data.index(b"PK\x01\x02")
    data[6] |= 1
    data[directory + 8] |= 1
    return bytes(data)


def other_size(claimed: int) -> Callable[[], bytes]:
    def made() -> bytes:
        data = zipped(("a.dcm", DICOM * 40), how=zipfile.ZIP_STORED)
        struct.pack_into("<I", data, data.index(b"PK\x01\x02") + 24, claimed)
        return bytes(data)

    return made


def overlapping() -> bytes:
    """Both entries are the same bytes, as in a bomb that needs no ratio (Fifield 2019)."""
    data = zipped(("a.dcm", DICOM), ("b.dcm", DICOM), how=zipfile.ZIP_STORED)
    second = data.index(b"PK\x01\x02", data.index(b"PK\x01\x02") + 4)
    struct.pack_into("<I", data, second + 42, 0)
    return bytes(data)


def other_header() -> bytes:
    data = zipped(("a.dcm", DICOM), how=zipfile.ZIP_STORED)
    data[30:35] = b"b.dcm"
    return bytes(data)


@pytest.mark.parametrize(
    ("made", "name", "why"),
    [
        (lambda: b"PK\x03\x04 but no more", "z.zip", "cannot be read as a ZIP"),
        (lambda: bytes(zipped(("a.dcm", DICOM)))[:-30], "z.zip", "cannot be read as a ZIP"),
        (lambda: bytes(zipped(("a.dcm", DICOM)))[40:], "z.zip", "made to deceive, or damaged"),
        (overlapping, "z.zip", "entries that share their bytes"),
        (encrypted, "z.zip!/a.dcm", "a password is needed"),
        (other_size(2**31), "z.zip!/a.dcm", "too large; expected at most 1 GiB; got 2 GiB"),
        (lambda: bytes(zipped(("a.dcm", bytes(2**22)))), "z.zip!/a.dcm", "as no radiograph can be"),
        (lambda: bytes(zipped(("IM1", bytes(2**22)))), "z.zip!/IM1", "as no radiograph can be"),
        (lambda: bytes(zipped(("in.zip", bytes(zipped(("a.dcm", DICOM)))))), "z.zip!/in.zip", "a ZIP within z.zip"),
        (lambda: bytes(zipped(("a.dcm", DICOM), ("a.dcm", DICOM + b"x"))), "z.zip!/a.dcm", "several members of that name"),
        (lambda: bytes(zipped(("a.dcm", DICOM), ("aXb.dcm", DICOM))).replace(b"aXb", b"a\0b"), "z.zip!/a\\x00b.dcm", "a name that no file"),
        (lambda: bytes(zipped(("x" * 5000 + ".dcm", DICOM))), None, "a name that no file can have"),
    ],
)
def test_hostile_zips(here: Path, reader: FilmReader, made: Callable[[], bytes], name: str | None, why: str) -> None:
    """What is wrong with a member costs that member, what is wrong with all costs the ZIP; another file is found all the same."""
    (here / "z.zip").write_bytes(made())
    files(here, "z.dcm")
    found = list(find_inputs(["z.zip", "z.dcm"], reader))
    wrong = [one for one in found if isinstance(one, Unusable)]
    assert wrong
    if name is not None:
        assert {one.name for one in wrong} == {name}
    with pytest.raises(ImageError, match=why):
        raise wrong[0].error
    assert found[-1].name == "z.dcm"
    assert len({one.place for one in found if isinstance(one, Input)}) == len([one for one in found if isinstance(one, Input)])


def test_what_only_reading_shows_is_told_then(here: Path, reader: FilmReader) -> None:
    """A header that differs from the directory; a size that the directory makes smaller than it is."""
    (here / "z.zip").write_bytes(other_header())
    (here / "y.zip").write_bytes(other_size(100)())
    for one in find_inputs(["z.zip", "y.zip"], reader):
        assert isinstance(one, Input)
        with pytest.raises(ImageError, match=r"a\.dcm: cannot be read from .\.zip"):
            reader.submit(one.path, one.member).result()


def test_a_name_cut_short_does_not_hide_another(here: Path, reader: FilmReader, phantoms: list[Phantom]) -> None:
    """Libraries cut names at a NUL: `a.dcm` must stay the one that is called so."""
    write_dicom(phantoms[0], here / "film")
    film = (here / "film").read_bytes()
    (here / "z.zip").write_bytes(bytes(zipped(("a.dcm", film), ("a.dcmXtxt.dcm", DICOM))).replace(b"a.dcmX", b"a.dcm\0"))
    found = [one for one in find_inputs(["z.zip"], reader) if isinstance(one, Input)]
    assert [one.member for one in found] == ["a.dcm"]
    assert reader.submit(found[0].path, found[0].member).result().patient_id == phantoms[0].image_id


def test_names_in_code_pages(here: Path, reader: FilmReader) -> None:
    """Undeclared UTF-8, as old tools write it, is read as that; anything else as code page 437; both lead back to their members."""
    data = zipped(("M_ller.dcm", DICOM), ("S__o.dcm", DICOM), how=zipfile.ZIP_STORED)
    data = data.replace(b"M_ller", b"M\x81ller").replace(b"S__o", b"S\xc3\xa3o")
    (here / "z.zip").write_bytes(data)
    assert names(reader, "z.zip") == ["z.zip!/Müller.dcm", "z.zip!/São.dcm"]
    for one in find_inputs(["z.zip"], reader):
        assert isinstance(one, Input)
        assert reader.identity(one.path, one.member).result().patient_id is None


def test_too_many_members(here: Path, reader: FilmReader) -> None:
    """One entry, named so often by the directory."""
    data = zipped(("a.dcm", DICOM))
    start, end = data.index(b"PK\x01\x02"), data.index(b"PK\x05\x06")
    directory = data[start:end] * (containers.MAX_MEMBERS + 1)
    tail = struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, 0xFFFF, 0xFFFF, len(directory), start, 0)
    (here / "z.zip").write_bytes(bytes(data[:start] + directory + tail))
    assert "holds too many files; expected at most 100000; got 100001" in problems(reader, "z.zip")["z.zip"]


@given(st.binary(max_size=200), st.integers(0, 400), st.integers(0, 255))
def test_damaged_zips_and_dicomdirs_end_as_inputs_or_reasons(
    tmp_path_factory: pytest.TempPathFactory, reader: FilmReader, tail: bytes, at: int, value: int
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    write_dicomdir(folder / "DICOMDIR", ["A"])
    zipped_data = zipped(("a.dcm", DICOM), ("b", DICOM))
    zipped_data[at % len(zipped_data)] = value
    (folder / "z.zip").write_bytes(bytes(zipped_data) + tail)
    listing = bytearray((folder / "DICOMDIR").read_bytes())
    listing[-1 - at % len(listing)] = value
    (folder / "DICOMDIR").write_bytes(bytes(listing) + tail)
    found = list(find_inputs([str(folder / "z.zip"), str(folder / "DICOMDIR")], reader))
    assert all(one.path.is_relative_to(folder) for one in found if isinstance(one, Input))
    shutil.rmtree(folder)


# ---------------------------------------------------------------------------------------------------------- DICOMDIR


def test_a_dicomdir_names_its_files(here: Path, reader: FilmReader) -> None:
    """By its name or its class; media mounted in small letters are understood; records out of use or of other kinds are none."""
    files(here, "cd/DICOM/IM1", "cd/dicom2/im2", "cd/extra.dcm")
    write_dicomdir(here / "cd" / "DICOMDIR", [["DICOM", "IM1"], ["DICOM2", "IM2"]])
    assert names(reader, "cd/DICOMDIR") == ["cd/DICOM/IM1", "cd/dicom2/im2"]
    assert names(reader, "cd") == ["cd/DICOM/IM1", "cd/dicom2/im2", "cd/extra.dcm"], "a search finds its files anyway, once"
    (here / "cd" / "DICOMDIR").rename(here / "cd" / "index")
    assert names(reader, "cd/index") == ["cd/DICOM/IM1", "cd/dicom2/im2"]
    assert "cd/index" not in names(reader, "cd")
    write_dicomdir(here / "cd" / "DICOMDIR", [["DICOM", "IM1"], ["DICOM2", "IM2"]], RecordInUseFlag=0)
    assert names(reader, "cd/DICOMDIR") == ["cd/dicom2/im2"]
    write_dicomdir(here / "cd" / "DICOMDIR", [["DICOM", "IM1"], ["DICOM2", "IM2"]], DirectoryRecordType="SR DOCUMENT")
    assert names(reader, "cd/DICOMDIR") == ["cd/dicom2/im2"]


@pytest.mark.parametrize(
    ("file_id", "name", "why"),
    [
        (["..", "secret.dcm"], "cd/DICOMDIR record 2", r"names no file below its folder.*got \.\.\\secret\.dcm"),
        ("/etc/passwd", "cd/DICOMDIR record 2", "names no file below its folder"),
        (["A", ".", "B"], "cd/DICOMDIR record 2", "names no file below its folder"),
        (None, "cd/DICOMDIR record 2", "names no file below its folder.*got an empty one"),
        (["GONE", "IM9"], "cd/GONE/IM9", "is not there; expected the file that DICOMDIR names"),
        (["FOLDER"], "cd/FOLDER", "is not there"),
        (["OUT", "secret.dcm"], "cd/OUT/secret.dcm", "a link that leads out of the folder"),
        (["OUT.DCM"], "cd/OUT.DCM", "a link that leads out of the folder"),
        (["LOOP"], "cd/LOOP", "is not there"),
    ],
)
def test_hostile_dicomdirs(here: Path, reader: FilmReader, file_id: str | list[str] | None, name: str, why: str) -> None:
    files(here, "secret.dcm", "cd/GOOD", "cd/FOLDER/x")
    (here / "cd" / "OUT").symlink_to(here)
    (here / "cd" / "OUT.DCM").symlink_to("../secret.dcm")
    (here / "cd" / "LOOP").symlink_to("LOOP")
    write_dicomdir(here / "cd" / "DICOMDIR", [file_id, "GOOD"])
    found = list(find_inputs(["cd/DICOMDIR"], reader))
    assert [one.name for one in found if isinstance(one, Input)] == ["cd/GOOD"]
    (wrong,) = [one for one in found if isinstance(one, Unusable)]
    assert wrong.name == name
    with pytest.raises(ImageError, match=why):
        raise wrong.error


def test_offsets_in_a_circle_are_not_followed(here: Path, reader: FilmReader) -> None:
    files(here, "A", "B")
    circle = {"OffsetOfTheNextDirectoryRecord": 400, "OffsetOfReferencedLowerLevelDirectoryEntity": 400}
    write_dicomdir(here / "DICOMDIR", ["A", "B"], **circle)
    assert names(reader, "DICOMDIR") == ["A", "B"]


@pytest.mark.parametrize("content", [b"", b"no DICOM", DICOM, "truncated", "film", "deep"])
def test_what_is_no_dicomdir(here: Path, reader: FilmReader, phantoms: list[Phantom], content: bytes | str) -> None:
    if content == "film":
        write_dicom(phantoms[0], here / "DICOMDIR")
    elif content == "truncated":
        write_dicomdir(here / "DICOMDIR", ["A", "B"])
        (here / "DICOMDIR").write_bytes((here / "DICOMDIR").read_bytes()[:-40])
    elif content == "deep":
        write_dicomdir(here / "DICOMDIR", ["A"])
        opened = b"\x04\x00\x20\x12SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff"
        (here / "DICOMDIR").write_bytes((here / "DICOMDIR").read_bytes() + opened * 20_000)
    else:
        assert isinstance(content, bytes)
        (here / "DICOMDIR").write_bytes(content)
    found = problems(reader, "DICOMDIR")
    assert list(found) == ["DICOMDIR"]
    assert "cannot be read as a" in found["DICOMDIR"]
