"""The audit log: what was done stays written down, whatever happened in between, and what is changed afterwards is found."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cxr_retrieval.archive.audit import GENESIS, AuditLog, Verified, audited, entries, film_pseudonym, verify
from cxr_retrieval.errors import SetupError, StoreError, UsageError

COUNT = 6


def lines(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text("utf-8").splitlines()]


def written(log: Path, count: int = COUNT) -> bytes:
    with AuditLog(log) as opened:
        for number in range(count):
            opened.append({"action": "test", "cases": {"answered": [f"film-{number:016x}"]}})
    return log.read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return written(tmp_path_factory.mktemp("log") / "audit.jsonl")


def verified(content: bytes, head: str | None = None) -> Verified:
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        return verify(Path(file.name), head)


def test_one_line_before_and_one_after(tmp_path: Path) -> None:
    log = tmp_path / "new" / "audit.jsonl"
    with audited(log, "gallery remove", {"reason": "consent withdrawn"}) as operation:
        assert [line["state"] for line in lines(log)] == ["begun"], "on disk before anything happens"
        operation.note({"a": "removed", "b": "removed", "c": "not there"})
        operation.outcome["removed"] = 2
    begun, noted, done = lines(log)
    assert noted["cases"] == {"removed": ["a", "b"], "not there": ["c"]}
    assert (done["state"], done["removed"], done["reason"]) == ("done", 2, "consent withdrawn")
    assert begun["op"] == noted["op"] == done["op"]
    assert begun["user"]
    assert [line["seq"] for line in lines(log)] == [1, 2, 3]
    assert (begun["prev"], noted["prev"]) == (GENESIS, begun["digest"])
    assert verify(log) == Verified(3, done["digest"], 0, unfinished=False, flaw=None)
    assert stat.S_IMODE(log.stat().st_mode) == 0o600


def test_what_failed_is_no_secret_and_says_no_more_than_the_kind_of_error(tmp_path: Path) -> None:
    log = tmp_path / "audit.jsonl"
    with pytest.raises(StoreError), audited(log, "gallery remove", {}) as operation:  # noqa: PT012 (what it raises is the point)
        operation.outcome["removed"] = {"cxr_v": ["0123"]}
        raise StoreError("/films/of/Jane Doe")
    assert [(line["state"], line.get("removed"), line.get("error")) for line in lines(log)] == [
        ("begun", None, None),
        ("failed", {"cxr_v": ["0123"]}, "StoreError"),
    ]
    assert "Jane" not in log.read_text()


def test_nothing_is_done_without_a_log(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ran = False
    with pytest.raises(SetupError, match="audit log cannot be written"), audited(tmp_path / "file" / "audit.jsonl", "query", {}):
        ran = True
    assert not ran


@given(st.data())
def test_any_edited_byte_is_found(whole: bytes, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(whole) - 1))
    byte = data.draw(st.integers(0, 255).filter(lambda value: value != whole[at]))
    found = verified(whole[:at] + bytes([byte]) + whole[at + 1 :])
    assert found.flaw, "not found"
    assert found.lines <= whole.count(b"\n", 0, at)


@given(st.data())
def test_any_line_taken_out_repeated_or_moved_is_found(whole: bytes, data: st.DataObject) -> None:
    parts = whole.splitlines(keepends=True)
    head = json.loads(parts[-1])["digest"]
    what = data.draw(st.sampled_from(["out", "twice", "moved"]))
    at = data.draw(st.integers(0, COUNT - 1))
    to = data.draw(st.integers(0, COUNT - 1).filter(lambda value: what != "moved" or value != at))
    changed = list(parts)
    if what == "twice":
        changed.insert(to, parts[at])
    else:
        del changed[at]
    if what == "moved":
        changed.insert(to, parts[at])
    text = b"".join(changed)
    if what == "out" and at == COUNT - 1:
        assert verified(text).flaw is None, "what is cut off the end is not seen by the chain"
        assert "cut off" in (verified(text, head).flaw or "")
    else:
        assert verified(text).flaw, (what, at, to)


def test_the_flaw_is_named(whole: bytes) -> None:
    parts = whole.splitlines(keepends=True)
    for changed, words in (
        (whole.replace(b"film-0000000000000002", b"film-0000000000000009"), "line 3: was edited"),
        (b"".join(parts[:2] + parts[3:]), "line 3: says to be the 4th and follows the 2th: what stood between was taken out"),
        (b"".join([*parts[:3], parts[1], *parts[3:]]), "line 4: says to be the 2th, which stands above: repeated"),
        (b"".join([*parts[:3], b'{"action": "query"}\n', *parts[3:]]), "line 4: is no line of this log"),
        (b"".join([*parts[:3], b"\n", *parts[3:]]), "line 4: is no line of this log"),
    ):
        assert words in (verified(changed).flaw or "")


def test_a_log_written_anew_is_told_by_the_head_alone(tmp_path: Path, whole: bytes) -> None:
    head = json.loads(whole.splitlines()[3])["digest"]
    assert verified(whole, head).flaw is None, "an earlier head, too"
    forged = written(tmp_path / "audit.jsonl", 8)
    assert verified(forged).flaw is None
    assert "written anew" in (verified(forged, head).flaw or "")


@given(st.lists(st.integers(1, 700), min_size=1, max_size=4))
def test_cut_anywhere_it_goes_on(whole: bytes, cuts: list[int]) -> None:
    """As by a kill or a full disk, even while it owns up to the last one."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "audit.jsonl"
        log.write_bytes(whole[: cuts[0]])
        for cut in cuts[1:]:
            before = log.read_bytes()
            with AuditLog(log) as opened:
                opened.append({"action": "killed"}, {"action": "killed"})
            assert log.read_bytes().startswith(before), "nothing is ever taken from the file"
            log.write_bytes(log.read_bytes()[: len(before) + cut])
        with AuditLog(log) as opened:
            opened.append({"action": "goes on"})
        result = verify(log)
        assert (result.flaw, result.unfinished) == (None, False)
        assert result.torn >= sum("torn" in entry for entry in entries(log))
        assert list(entries(log))[-1]["action"] == "goes on"
        assert result.lines == len(list(entries(log)))


def test_a_half_written_end_is_said_and_no_flaw(whole: bytes) -> None:
    last = len(whole.splitlines(keepends=True)[-1])
    for cut in range(1, last + 1):
        found = verified(whole[:-cut])
        assert (found.flaw, found.lines, found.unfinished) == (None, COUNT if cut == 1 else COUNT - 1, 1 < cut < last)


def test_what_was_there_before_the_chain_is_anchored(tmp_path: Path) -> None:
    """Lines of an earlier form of this log, or of whatever else."""
    log = tmp_path / "audit.jsonl"
    log.write_text('{"state": "done"}\n' * 9000)
    written(log, 2)
    assert verify(log).flaw is None
    log.write_text(log.read_text().replace("done", "gone", 1))
    assert "line 1: is no line of this log" in (verify(log).flaw or "")


def test_several_processes_append_and_no_line_is_lost(tmp_path: Path) -> None:
    log = tmp_path / "audit.jsonl"
    code = (
        "import sys; from pathlib import Path; from cxr_retrieval.archive.audit import AuditLog\n"
        "with AuditLog(Path(sys.argv[1])) as log:\n"
        "    for number in range(50): log.append({'action': sys.argv[2]}, {'action': sys.argv[2]})"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, log, str(number)]) for number in range(4)]
    assert [writer.wait() for writer in writers] == [0] * 4
    assert verify(log).flaw is None
    assert sorted(entry["action"] for entry in entries(log)) == sorted("0123" * 100)


def test_a_long_log_is_not_read_to_append(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "audit.jsonl"
    written(log, 1)
    with AuditLog(log) as opened:
        opened.append({"action": "long", "cases": {"removed": ["0" * 32] * 30_000}})
        opened.append({"action": "after a line longer than what is read first"})
    assert verify(log).flaw is None
    read: list[int] = []
    pread = os.pread

    def counted(file: int, size: int, start: int) -> bytes:
        read.append(size)
        return pread(file, size, start)

    monkeypatch.setattr(os, "pread", counted)
    with AuditLog(log) as opened:
        opened.append({"action": "short"})
    assert sum(read) <= 1 << 16 < log.stat().st_size


def test_a_full_disk_is_said_and_costs_no_line(tmp_path: Path) -> None:
    """RLIMIT_FSIZE stands for the disk: writing fails in the middle of a line."""
    log = tmp_path / "audit.jsonl"
    code = (
        "import resource, signal, sys; from pathlib import Path; from cxr_retrieval.archive.audit import audited\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n"
        "while True:\n"
        "    with audited(Path(sys.argv[1]), 'query', {}): pass"
    )
    full = subprocess.run([sys.executable, "-c", code, log], capture_output=True, text=True, check=False)
    assert "audit log cannot be written" in full.stderr
    assert verify(log).unfinished
    with AuditLog(log) as opened:
        opened.append({"action": "room again"})
    assert verify(log) == Verified(len(list(entries(log))), list(entries(log))[-1]["digest"], 1, unfinished=False, flaw=None)


def test_a_film_is_called_by_its_bytes(tmp_path: Path) -> None:
    for name in ("DOE^JANE.dcm", "copy.dcm"):
        (tmp_path / name).write_bytes(b"film")
    assert film_pseudonym(tmp_path / "DOE^JANE.dcm") == film_pseudonym(tmp_path / "copy.dcm")
    assert film_pseudonym(tmp_path / "copy.dcm") == f"film-{hashlib.sha256(b'film').hexdigest()[:16]}"
    assert film_pseudonym(tmp_path) is None
    assert film_pseudonym(tmp_path / "missing.dcm") is None


def test_no_log_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        verify(tmp_path / "none.jsonl")
    with pytest.raises(UsageError, match="cannot be read"):
        list(entries(tmp_path / "none.jsonl"))
