"""The JSON log: one object a line, and no name in any, whatever an error says."""

from __future__ import annotations

import io
import json
import logging
import pickle
import warnings
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cxr_retrieval.archive.watching import Event, Failed, Settled
from cxr_retrieval.errors import CxrError, ImageError, StoreError
from cxr_retrieval.telemetry.log import JsonLog, described


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_run_is_told_in_lines_that_name_nobody(events: tuple[Event, ...], name: str) -> None:
    stream = io.StringIO()
    log = JsonLog(stream)
    for event in events:
        log(event)
    log.end(StoreError(f"{name}: no gallery", next_step="make one"))
    assert name not in stream.getvalue()
    found = lines(stream)
    assert [line["event"] for line in found] == [
        "expected",
        "failed",
        "unanswered",
        "retried",
        "waiting",
        "back",
        "waiting",
        "answered",
        "arrived",
        "arrived",
        "delivered",
        "delivered",
        "ended",
    ]
    for line in found:
        assert list(line)[:3] == ["time", "level", "event"]
    failed, away, ended = found[1], found[4], found[-1]
    assert (failed["level"], failed["input"], failed["error"]) == ("warning", 7, "ImageError")
    assert (away["service"], away["error"]) == ("triton", "ServerDownError")
    assert [(line["what"], line["level"]) for line in found[8:10]] == [("received", "info"), ("rejected caller", "warning")]
    assert [(line["destination"], line["outcome"]) for line in found[10:12]] == [("archive", "sent"), ("archive", "postponed")]
    assert found[7]["trace_id"] == found[2]["trace_id"] == found[3]["trace_id"]
    assert {key: ended[key] for key in ("level", "files", "answered", "failed", "error", "next_step")} == {
        "level": "error",
        "files": 13,
        "answered": 8,
        "failed": 1,
        "error": "StoreError",
        "next_step": "make one",
    }


def test_where_an_error_was_made_is_told_and_survives_a_worker_process() -> None:
    def refuse(name: str) -> ImageError:
        return ImageError(f"{name}: no frontal film", expected="a frontal film", got=f"a letter to {name}", next_step="leave it out")

    error = refuse("MÜLLER")
    for one in (error, pickle.loads(pickle.dumps(error))):
        about = described(one)
        assert about.keys() == {"error", "at", "expected", "next_step"}
        assert (about["error"], about["expected"], about["next_step"]) == ("ImageError", "a frontal film", "leave it out")
        module, line = about["at"].rsplit(":", 1)
        assert module.endswith("test_log")
        assert int(line) > 0


def test_an_error_that_nobody_expected_is_told_by_its_place(name: str) -> None:
    with pytest.raises(ValueError) as caught:
        int(name)
    about = described(caught.value)
    assert about.keys() == {"error", "at"}
    assert about["error"] == "ValueError"
    assert "test_log:" in about["at"]


@given(*[st.text(min_size=1)] * 4)
def test_no_part_of_an_error_that_is_data_is_told(what: str, expected: str, got: str, next_step: str) -> None:
    error = CxrError(what, expected=expected, got=got, next_step=next_step)
    assert error.literal == {}


def test_other_libraries_are_told_by_their_place_and_left_as_they_were(name: str) -> None:
    stream, before = io.StringIO(), list(logging.getLogger().handlers)
    with JsonLog(stream).others_too(), warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.getLogger("pydicom").warning("odd value in Patient's Name %s", name)
        warnings.warn(f"odd value {name}", UserWarning, stacklevel=1)
    assert logging.getLogger().handlers == before
    assert name not in stream.getvalue()
    assert [(line["event"], line["logger"]) for line in lines(stream)] == [("library", "pydicom"), ("library", "py.warnings")]


def test_nobody_is_told_twice(events: tuple[Event, ...]) -> None:
    """Its logger has no parents: whoever uses this package as a library gets none of its lines."""
    heard: list[logging.LogRecord] = []

    class Listening(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record)

    handler = Listening()
    logging.getLogger().addHandler(handler)
    try:
        log = JsonLog(io.StringIO())
        log(Failed(ImageError("a")))
        log(Settled({"failed": 1}))
        log.end(None)
    finally:
        logging.getLogger().removeHandler(handler)
    assert heard == []
