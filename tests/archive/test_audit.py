"""What was removed stays written down, whatever happened in between."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from cxr_retrieval.archive.audit import audited
from cxr_retrieval.errors import SetupError, StoreError


def lines(log: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in log.read_text("utf-8").splitlines()]


def test_one_line_before_and_one_after(tmp_path: Path) -> None:
    log = tmp_path / "new" / "audit.jsonl"
    with audited(log, "gallery remove", "consent withdrawn") as removed:
        assert [line["state"] for line in lines(log)] == ["begun"], "on disk before anything happens"
        removed["cxr_v"] = ["0123"]
    begun, done = lines(log)
    assert (done["state"], done["removed"], done["reason"]) == ("done", {"cxr_v": ["0123"]}, "consent withdrawn")
    assert begun["id"] == done["id"]
    assert begun["user"]
    assert stat.S_IMODE(log.stat().st_mode) == 0o600


def test_a_removal_that_failed_is_no_secret(tmp_path: Path) -> None:
    log = tmp_path / "audit.jsonl"
    log.write_text('{"state": "done"}\n')
    with pytest.raises(StoreError), audited(log, "gallery remove") as removed:  # noqa: PT012 (what it raises is the point)
        removed["cxr_v"] = ["0123"]
        raise StoreError("Milvus is gone")
    assert [(line["state"], line.get("removed")) for line in lines(log)] == [
        ("done", None),
        ("begun", None),
        ("failed", {"cxr_v": ["0123"]}),
    ]


def test_nothing_is_removed_without_a_log(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ran = False
    with pytest.raises(SetupError, match="audit log cannot be written"), audited(tmp_path / "file" / "audit.jsonl", "gallery remove"):
        ran = True
    assert not ran
