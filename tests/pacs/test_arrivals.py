"""The spool: what is confirmed stays, whatever ends the process; what is answered goes, and is answered once."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cxr_retrieval.errors import SetupError
from cxr_retrieval.pacs import arrivals as arrivals_module
from cxr_retrieval.pacs.arrivals import ANSWERED, FAILED, Arrivals, FullError, Outcome, Outgoing, standing_of
from pacs.arriving import admitted, answered, header, lines, waiting


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    return tmp_path / "spool"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "results.jsonl"


def test_what_was_admitted_waits_after_a_restart_in_the_order_in_which_it_came(spool: Path, out: Path) -> None:
    sent = [header(PatientName=f"N{number}") for number in range(5)]
    with Arrivals(spool, out) as arrivals:
        for one in sent:
            assert admitted(arrivals, one, data=one.instance.encode(), caller="CR1", rule="emergency")
    with Arrivals(spool, out) as arrivals:
        found = waiting(arrivals)
        assert [one.header for one in found] == sent
        assert {(one.caller, one.rule, one.member) for one in found} == {("CR1", "emergency", None)}
        assert [one.path.read_bytes() for one in found] == [one.instance.encode() for one in sent]


def test_a_second_instance_of_the_same_uid_is_not_needed(spool: Path, out: Path) -> None:
    one = header()
    with Arrivals(spool, out) as arrivals:
        assert arrivals.known(one.instance) is None
        assert admitted(arrivals, one, b"first")
        assert not admitted(arrivals, one, b"second")
        (found,) = waiting(arrivals)
        assert found.path.read_bytes() == b"first"
        arrivals.record([answered(found)])
        assert not admitted(arrivals, one, b"first"), "known after it was answered, too"
        assert not list((spool / "incoming").iterdir())


def test_what_is_answered_is_gone_with_its_header(spool: Path, out: Path) -> None:
    with Arrivals(spool, out) as arrivals:
        admitted(arrivals, header(PatientName="Doe^Jane", PatientID="4711"))
        (one,) = waiting(arrivals)
        arrivals.record([answered(one)])
        assert waiting(arrivals) == []
        assert arrivals.standing().waiting == 0
        assert arrivals.standing().tally == {ANSWERED: 1}
    everything = b"".join(path.read_bytes() for path in spool.rglob("*") if path.is_file())
    assert b"Doe" not in everything
    assert b"4711" not in everything
    assert [json.loads(line)["input"] for line in lines(out)] == [one.header.instance]


def test_only_its_owner_can_read_what_waits(spool: Path, out: Path) -> None:
    with Arrivals(spool, out) as arrivals:
        admitted(arrivals, header())
        (one,) = waiting(arrivals)
        arrivals.record([answered(one, outgoing=[Outgoing("archive", "report", b"x")], kept=b"y")])
        admitted(arrivals, header())
        assert all(path.stat().st_mode & 0o077 == 0 for path in [spool, out, *spool.rglob("*")])


def test_one_process_has_a_spool(spool: Path, out: Path) -> None:
    with Arrivals(spool, out), pytest.raises(SetupError, match="another node has this spool"):
        Arrivals(spool, out)


@pytest.mark.parametrize("keep", [{"kept": b"nobody"}, {"keep": True}, {}])
def test_an_instance_stays_where_it_is_to_be_kept(spool: Path, out: Path, keep: dict[str, Any]) -> None:
    one = header()
    with Arrivals(spool, out) as arrivals:
        admitted(arrivals, one, b"as it came")
        arrivals.record([answered(waiting(arrivals)[0], **keep)])
        assert arrivals.held([one.instance, "9.9"]) == ({one.instance} if "keep" in keep else set())
        there = [path.read_bytes() for path in (spool / "kept").iterdir()]
        assert there == ([b"nobody"] if "kept" in keep else [b"as it came"] if keep else [])


def test_a_full_queue_and_a_full_disk_take_no_more(spool: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Arrivals(spool, out, most_waiting=1) as arrivals:
        arrivals.refuse_if_full(1)
        admitted(arrivals, header())
        with pytest.raises(FullError, match="queue"):
            arrivals.refuse_if_full(1)
        arrivals.record([answered(waiting(arrivals)[0])])
        arrivals.refuse_if_full(1)
    with Arrivals(spool, out, free_bytes=2**62) as arrivals, pytest.raises(FullError, match="disk"):
        arrivals.refuse_if_full(1)

    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with Arrivals(spool, out) as arrivals:
        monkeypatch.setattr(arrivals_module, "_write", full)
        with pytest.raises(FullError, match="disk"), arrivals.partial(b"x"):
            pass
    assert not list((spool / "incoming").iterdir())


def test_a_disk_that_is_full_when_answers_are_written_loses_none(spool: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Arrivals(spool, out) as arrivals:
        admitted(arrivals, header())
        (one,) = waiting(arrivals)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", _full)
            with pytest.raises(SetupError, match="nothing that was confirmed is lost"):
                arrivals.record([answered(one)])
        assert [found.id for found in waiting(arrivals)] == [one.id]
        arrivals.record([answered(one)])
    assert len(list(lines(out))) == 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of a megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if shutil.which("mount") is None or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], check=False).returncode:
        pytest.skip("a disk can be mounted by root alone, where the kernel lets it")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_is_really_full(small_disk: Path) -> None:
    """Nothing is confirmed that is not there, answers wait until there is room, and nothing lies in the way then."""
    confirmed = 0
    with Arrivals(small_disk / "spool", small_disk / "out.jsonl", free_bytes=0) as arrivals:
        try:
            while confirmed < 999:
                admitted(arrivals, header(), bytes(20_000))
                confirmed += 1
        except (FullError, SetupError):
            pass
        assert 9 < confirmed < 60
        found = waiting(arrivals)
        assert len(found) == confirmed
        with pytest.raises(SetupError, match="nothing that was confirmed is lost"):
            arrivals.record([answered(one, outgoing=[Outgoing("a", "report", bytes(20_000))], kept=bytes(20_000)) for one in found])
        assert not [*(small_disk / "spool" / "outgoing").iterdir(), *(small_disk / "spool" / "kept").iterdir()]
        assert len(waiting(arrivals)) == confirmed
        (small_disk / "spool" / "incoming" / found[0].path.name).write_bytes(b"")  # room for what SQLite must write
        for one in found:
            arrivals.record([answered(one)])
        assert waiting(arrivals) == []
    with Arrivals(small_disk / "spool", small_disk / "out.jsonl", free_bytes=0):
        assert len(list(lines(small_disk / "out.jsonl"))) == confirmed


def _full(descriptor: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_lines_that_no_row_knows_are_cut_off(spool: Path, out: Path) -> None:
    out.write_text('{"from": "before"}\n')
    with Arrivals(spool, out) as arrivals:
        admitted(arrivals, header())
        arrivals.record([answered(waiting(arrivals)[0])])
    with out.open("a") as file:
        file.write('{"half a li')
    with Arrivals(spool, out):
        assert next(json.loads(line) for line in lines(out)) == {"from": "before"}
        assert len(list(lines(out))) == 2


def test_results_that_were_moved_away_are_begun_anew(spool: Path, out: Path) -> None:
    with Arrivals(spool, out) as arrivals:
        for number in range(4):
            admitted(arrivals, header())
            if number == 2:
                out.rename(out.with_suffix(".1"))
            arrivals.record([answered(waiting(arrivals)[0])])
    assert len(list(lines(out.with_suffix(".1")))) == 2
    assert len(list(lines(out))) == 2
    with Arrivals(spool, out):
        assert len(list(lines(out))) == 2


def test_parcels_wait_are_postponed_given_up_and_taken_up_again(spool: Path, out: Path) -> None:
    with Arrivals(spool, out) as arrivals:
        admitted(arrivals, header())
        outgoing = [Outgoing("a", "report", b"1"), Outgoing("b", "report", b"1"), Outgoing("a", "picture", b"2")]
        arrivals.record([answered(waiting(arrivals)[0], outgoing=outgoing)])
        first, second = arrivals.due("a", 9)
        assert [one.path.read_bytes() for one in (first, second)] == [b"1", b"2"]
        arrivals.sent(first)
        arrivals.postpone(second, time.time() + 99, "away")
        assert arrivals.due("a", 9) == []
        assert arrivals.standing().to_send == {"a": 1, "b": 1}
        arrivals.postpone(second, time.time(), "away")
        (late,) = arrivals.due("a", 9)
        assert late.tries == 2
        arrivals.give_up(late, "status C000")
        assert arrivals.due("a", 9) == []
        assert arrivals.standing().given_up == {"a": 1}
        assert late.path.exists()
    with Arrivals(spool, out) as arrivals:
        assert arrivals.retry() == 1
        assert [(one.kind, one.tries) for one in arrivals.due("a", 9)] == [("picture", 0)]
        assert arrivals.standing().tally == {ANSWERED: 1, "sent a": 1, "given up a": 1}


def test_another_process_sees_how_things_stand(spool: Path, out: Path, tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="no spool of a node"):
        standing_of(tmp_path)
    with Arrivals(spool, out) as arrivals:
        admitted(arrivals, header())
        arrivals.rejected("no rule")
        arrivals.rejected("no rule")
        assert arrivals.standing().tally == {"rejected no rule": 2}
        arrivals.sweep()
        assert arrivals.standing().tally == {"rejected no rule": 2}
        seen = standing_of(spool)
        assert (seen.waiting, seen.tally) == (1, {"rejected no rule": 2})
        assert seen.as_json().keys() == {"waiting", "oldest_s", "to_send", "oldest_parcel_s", "given_up", "counted"}


def test_what_was_answered_long_ago_is_forgotten_but_what_is_kept_is_not(spool: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Arrivals(spool, out) as arrivals:
        gone, kept = header(), header()
        for one in (gone, kept):
            admitted(arrivals, one)
        first, second = waiting(arrivals)
        arrivals.record([answered(first), answered(second, keep=True)])
        arrivals.sweep()
        assert arrivals.known(gone.instance)
        later = time.time() + 31 * 86_400
        monkeypatch.setattr(time, "time", lambda: later)
        arrivals.sweep()
        assert arrivals.known(gone.instance) is None
        assert arrivals.known(kept.instance)


def test_a_kept_film_and_a_failed_one_are_told_apart(spool: Path, out: Path) -> None:
    with Arrivals(spool, out) as arrivals:
        admitted(arrivals, header())
        (one,) = waiting(arrivals)
        arrivals.record([Outcome(one, FAILED, {"status": FAILED, "error": "no"})])
        assert arrivals.standing().tally == {FAILED: 1}


_WORK = """
import sys, threading
sys.path[:0] = {path!r}
from pathlib import Path
from cxr_retrieval.pacs.arrivals import Arrivals, Outgoing
from pacs.arriving import admitted, answered, header
arrivals = Arrivals(Path({spool!r}), Path({out!r}))
print("ready", flush=True)
def answering():
    some = []
    for one in arrivals.feed(threading.Event()):
        if one is not None:
            some.append(one)
        if some and (one is None or len(some) == 3):
            arrivals.record([answered(each, outgoing=[Outgoing("a", "report", b"r")]) for each in some])
            some = []
threading.Thread(target=answering, daemon=True).start()
while True:
    about = header()
    admitted(arrivals, about, about.instance.encode())
    print(about.instance, flush=True)
"""


@pytest.mark.parametrize("kills", [6, pytest.param(60, marks=pytest.mark.whole)])
def test_kills_at_any_moment_lose_nothing_that_was_confirmed(spool: Path, out: Path, kills: int) -> None:
    confirmed: list[str] = []
    for number in range(kills):
        program = _WORK.format(path=[str(Path(__file__).parents[1])], spool=str(spool), out=str(out))
        process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.05 + 0.037 * (number % 7))
        process.send_signal(signal.SIGKILL)
        confirmed += [line.strip() for line in process.stdout if line.endswith("\n")]
        process.wait()
        process.stdout.close()
    assert len(confirmed) > 3 * kills
    with Arrivals(spool, out) as arrivals:
        for one in waiting(arrivals):
            assert one.path.read_bytes() == one.header.instance.encode()
            arrivals.record([answered(one, outgoing=[Outgoing("a", "report", b"r")])])
        there = [json.loads(line)["input"] for line in lines(out)]
        assert len(there) == len(set(there)), "answered twice"
        assert set(confirmed) <= set(there), "confirmed, and lost"
        assert len(arrivals.due("a", 10**6)) == len(there)
        assert {path.name for path in (spool / "outgoing").iterdir()} == {one.path.name for one in arrivals.due("a", 10**6)}
        assert not list((spool / "incoming").iterdir())


@given(st.lists(st.sampled_from(["admit", "record", "restart", "send"]), max_size=12))
def test_every_instance_has_one_line_whatever_the_order(steps: list[str]) -> None:
    folder = Path(tempfile.mkdtemp(prefix="cxr-arrivals-"))
    arrivals = Arrivals(folder / "spool", folder / "out.jsonl")
    came: list[str] = []
    try:
        for step in (*steps, "restart", "record"):
            if step == "admit":
                about = header()
                came.append(about.instance)
                admitted(arrivals, about)
            elif step == "record":
                arrivals.record([answered(one, outgoing=[Outgoing("a", "report", b"r")]) for one in waiting(arrivals)])
            elif step == "send":
                for parcel in arrivals.due("a", 99):
                    arrivals.sent(parcel)
            else:
                arrivals.close()
                arrivals = Arrivals(folder / "spool", folder / "out.jsonl")
        assert [json.loads(line)["input"] for line in lines(folder / "out.jsonl")] == came
    finally:
        arrivals.close()
        shutil.rmtree(folder)
