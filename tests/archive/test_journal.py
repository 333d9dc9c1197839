"""The journal: one line for every input, after a kill at any byte."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path

import pytest

from cxr_retrieval.archive.inputs import Input, Unusable
from cxr_retrieval.archive.journal import ANSWERED, FAILED, Answer, Journal
from cxr_retrieval.archive.results import Format, write_table
from cxr_retrieval.errors import ImageError, SetupError, UsageError
from cxr_retrieval.radiograph.files import printable

OPTIONS = {"model_version": "v", "top_k": 10}


def opened(out: Path, names: Iterable[str] = (), **options: object) -> Journal:
    journal = Journal(out, OPTIONS | options)
    assert sum(journal.add(Input(name, Path(name)) for name in names)) == len(list(names))
    return journal


def answers(journal: Journal, count: int, pixels: str | None = None) -> list[Answer]:
    pending = [asked for _, asked in zip(range(count), journal.pending(), strict=False)]
    return [Answer(one, ANSWERED, {"image_id": one.image_id}, pixels or f"digest of {one.name}") for one in pending]


def lines(out: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in out.read_text("utf-8").splitlines()]


NAMES = [f"films/{number}.dcm" for number in range(7)]


def test_a_run_goes_on_where_it_was(tmp_path: Path) -> None:
    out = tmp_path / "results.jsonl"
    with opened(out, NAMES) as journal:
        journal.record(answers(journal, 3))
    with opened(out, [*NAMES, "films/new.dcm"]) as journal:
        assert [asked.name for asked in journal.pending()] == [*NAMES[3:], "films/new.dcm"]
        journal.record(answers(journal, 99))
        journal.finish()
        assert journal.counts() == {"pending": 0, "answered": 8, "refused": 0, "failed": 0}
    assert [line["input"] for line in lines(out)] == [*NAMES, "films/new.dcm"]
    assert not journal.dead_letters.exists()
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in tmp_path.iterdir())


@pytest.mark.parametrize("torn", [1, 20, 61, 120, 10_000])
def test_lines_of_a_killed_run_that_were_not_noted_are_cut_off(tmp_path: Path, torn: int) -> None:
    """As a kill between the two writes leaves it: more in the file than the journal knows, perhaps half a line."""
    out = tmp_path / "results.jsonl"
    with opened(out, NAMES) as journal:
        journal.record(answers(journal, 2))
        more = b"".join(json.dumps({"input": name, "status": "answered"}).encode() + b"\n" for name in NAMES[2:])
    with out.open("ab") as file:
        file.write(more[:torn])
    with opened(out) as journal:
        journal.record(answers(journal, 99))
        journal.finish()
    assert sorted(str(line["input"]) for line in lines(out)) == NAMES


def test_failures_are_lines_at_the_end_and_dead_letters_until_they_are_retried(tmp_path: Path) -> None:
    out = tmp_path / "results.jsonl"
    with opened(out, NAMES) as journal:
        list(journal.add([Unusable("gone.dcm", ImageError("gone.dcm: is not there"))]))
        (bad, *_), good = answers(journal, 1), answers(journal, 7)[1:]
        journal.record([Answer(bad.asked, FAILED, error="blank"), *good])
        journal.finish()
        assert [(line["input"], line["status"], line.get("error")) for line in lines(out)[-2:]] == [
            (NAMES[0], "failed", "blank"),
            ("gone.dcm", "failed", "gone.dcm: is not there."),
        ]
        assert lines(journal.dead_letters) == lines(out)[-2:]
    with opened(out) as journal:
        assert journal.retry_failed() == 2
        list(journal.add([Input("gone.dcm", Path("gone.dcm"))]))
        journal.record(answers(journal, 2))
        journal.finish()
    assert sorted(str(line["input"]) for line in lines(out)) == [*NAMES, "gone.dcm"]
    assert {line["status"] for line in lines(out)} == {"answered"}
    assert not journal.dead_letters.exists()


def test_a_place_is_one_input_whatever_leads_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first name stays; names that look alike do not hide each other; a member is no other file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link.dcm").symlink_to("a.dcm")
    found = [Input(name, Path(name)) for name in ("./a.dcm", "a.dcm", str(tmp_path / "a.dcm"), "link.dcm", "x/../a.dcm")]
    (tmp_path / "x").mkdir()
    found += [Input("z!/m", Path("z!/m")), Input("z!/m", Path("z"), "m"), Input("z!/m", Path("z"), "m"), Input("z", Path("z"))]
    with opened(tmp_path / "results.jsonl") as journal:
        list(journal.add(found))
        list(journal.add(reversed(found)))
        asked = [(one.name, one.path, one.member) for one in journal.pending()]
    assert asked == [
        ("./a.dcm", tmp_path / "a.dcm", None),
        ("z!/m", tmp_path / "z!/m", None),
        ("z!/m", tmp_path / "z", "m"),
        ("z", tmp_path / "z", None),
    ]


def test_what_was_unusable_and_is_a_film_now_is_asked_in_the_same_run(tmp_path: Path) -> None:
    """Even where `pending` has gone past its place in the order."""
    gone = Unusable("gone.dcm", ImageError("gone.dcm: is not there"))
    with opened(tmp_path / "results.jsonl") as journal:
        list(journal.add([gone, *(Input(name, Path(name)) for name in NAMES)]))
        last = [asked.id for asked in journal.pending()][-1]
        list(journal.add([Input("gone.dcm", Path("gone.dcm"))]))
        assert [asked.name for asked in journal.pending(after=last)] == ["gone.dcm"]
        assert journal.counts()["failed"] == 0
        list(journal.add([gone]))
        assert journal.counts() == {"pending": 8, "answered": 0, "refused": 0, "failed": 0}


def test_names_that_are_no_text_are_kept(tmp_path: Path) -> None:
    """Latin-1 on disk: shown with what it has, and led back to its bytes."""
    path = Path(os.fsdecode(b"M\xfcller.dcm"))
    with opened(tmp_path / "results.jsonl") as journal:
        list(journal.add([Input(printable(str(path)), path)]))
        (asked,) = journal.pending()
        assert (asked.name, asked.path) == ("M\\udcfcller.dcm", path.absolute())
        journal.record([Answer(asked, ANSWERED, {"image_id": asked.image_id}, "p")])
    assert lines(tmp_path / "results.jsonl")[0]["input"] == "M\\udcfcller.dcm"


def test_one_picture_under_several_names_is_said_and_counted_once(tmp_path: Path) -> None:
    out = tmp_path / "results.jsonl"
    with opened(out, NAMES[:3]) as journal:
        journal.record(answers(journal, 1, pixels="p"))
        journal.record(answers(journal, 2, pixels="p"))
        assert journal.copies() == 2
    assert [line.get("same_as") for line in lines(out)] == [None, NAMES[0], NAMES[0]]


def test_another_run_or_process_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "results.jsonl"
    with opened(out, NAMES), pytest.raises(SetupError, match="another process writes"):
        opened(out)
    with pytest.raises(UsageError, match="expected top_k 10; got top_k 3"):
        opened(out, top_k=3)
    foreign = tmp_path / "notes.txt"
    foreign.write_text("mine")
    with pytest.raises(UsageError, match="no journal beside it"):
        opened(foreign)
    assert foreign.read_text() == "mine"


def test_a_damaged_journal_is_said(tmp_path: Path) -> None:
    out = tmp_path / "results.jsonl"
    opened(out, NAMES).close()
    (tmp_path / "results.jsonl.journal").write_bytes(b"nonsense" * 1000)
    with pytest.raises(SetupError, match="cannot be written or read"):
        opened(out)


@pytest.mark.parametrize("form", [Format.csv, Format.parquet])
def test_tables_hold_a_row_for_every_line(tmp_path: Path, form: Format) -> None:
    out, table = tmp_path / "results.jsonl", tmp_path / f"results.{form.value}"
    with opened(out, NAMES) as journal:
        first, *others = answers(journal, 7)
        result = {
            "image_id": "ä,\n",
            "prediction": {"label": "control", "confidence": 0.5, "scores": {"control": 0.5}, "calibrated": 0.25, "set": ["control"]},
        }
        journal.record([Answer(first.asked, ANSWERED, result, "p"), Answer(others[0].asked, FAILED, error="blank"), *others[1:]])
        journal.finish()
    write_table(out, table, form)
    if form is Format.csv:
        import csv

        with table.open(encoding="utf-8", newline="") as file:
            rows: list[dict[str, object]] = [dict(row) for row in csv.DictReader(file)]
    else:
        import pyarrow.parquet as pq

        rows = pq.read_table(table).to_pylist()
    assert [row["input"] for row in rows] == [line["input"] for line in lines(out)]
    assert (rows[0]["image_id"], rows[0]["label"], float(str(rows[0]["confidence"]))) == ("ä,\n", "control", 0.5)
    assert json.loads(str(rows[0]["scores"])) == {"control": 0.5}
    assert (float(str(rows[0]["calibrated"])), json.loads(str(rows[0]["set"]))) == (0.25, ["control"])
    assert (rows[-1]["status"], rows[-1]["error"]) == ("failed", "blank")
    assert stat.S_IMODE(table.stat().st_mode) == 0o600
