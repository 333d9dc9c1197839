"""Lines of a batch's results, sorted and paged without being held."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cxr_retrieval.errors import UsageError
from cxr_retrieval.view.worklist import SORTS, Results, sorted_page

labels = st.sampled_from(["covid19", "control", "tuberculosis"])


def line(number: int, label: str | None, confidence: float, warnings: int) -> dict[str, Any]:
    if label is None:
        return {"input": f"{number}.dcm", "status": "failed", "error": "broken"}
    prediction = {"label": label, "confidence": confidence, "scores": {label: confidence}}
    return {"input": f"{number}.dcm", "status": "answered", "prediction": prediction, "warnings": ["w"] * warnings}


lines = st.lists(st.builds(lambda *parts: parts, st.none() | labels, st.sampled_from([0.25, 0.5, 1.0]), st.integers(0, 3)), max_size=30)


@given(lines, st.sampled_from(SORTS), st.booleans(), st.integers(0, 10), st.integers(1, 10))
def test_a_page_is_a_part_of_what_sorting_all_gives(
    rows: list[tuple[str | None, float, int]], by: str, descending: bool, offset: int, limit: int
) -> None:
    told = [line(number, *row) for number, row in enumerate(rows)]

    def key(number: int) -> Any:
        label, confidence, warnings = rows[number]
        return {
            "order": number,
            "label": label or "",
            "confidence": confidence if label else 0.0,
            "warnings": warnings if label else 0,
            "status": told[number]["status"],
        }[by]

    numbers = sorted(range(len(rows)), key=key)
    if by == "order":
        numbers = numbers[::-1] if descending else numbers
    elif descending:
        values = sorted({key(number) for number in numbers}, reverse=True)
        numbers = [number for value in values for number in range(len(rows)) if key(number) == value]
    if by == "label":  # without one comes last, whichever way
        numbers = [n for n in numbers if rows[n][0]] + [n for n in numbers if not rows[n][0]]
    page = sorted_page(told, by, descending=descending, offset=offset, limit=limit)
    assert [number for number, _ in page.rows] == numbers[offset : offset + limit]
    assert [found["input"] for _, found in page.rows] == [f"{number}.dcm" for number in numbers[offset : offset + limit]]
    assert page.total == len(rows)


def test_a_file_that_is_still_written_is_read_on(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    first, second = (json.dumps(line(number, "control", 0.5 + number / 10, 0)) + "\n" for number in range(2))
    path.write_text(first + second[:20])
    results = Results(path)
    assert results.page("order", descending=False, offset=0, limit=9).total == 1
    with path.open("a") as file:
        file.write(second[20:])
    page = results.page("confidence", descending=True, offset=0, limit=9)
    assert [number for number, _ in page.rows] == [1, 0]
    assert page.whole


def test_who_asks_while_a_file_is_read_gets_what_there_is(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(line(number, "control", 0.5, 0)) + "\n" for number in range(3)))
    results = Results(path)
    results.read_on()
    results._reading.acquire()  # pyright: ignore[reportPrivateUsage]
    found: list[Any] = []
    asking = threading.Thread(target=lambda: found.append(results.page("label", descending=False, offset=0, limit=2)))
    asking.start()
    asking.join(10)
    results._reading.release()  # pyright: ignore[reportPrivateUsage]
    assert (found[0].whole, found[0].total, len(found[0].rows)) == (False, 3, 2)


def test_a_list_is_shown_while_another_thread_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(line(number, "abc"[number % 3], number / 4000, number % 5)) + "\n" for number in range(4000)))
    results = Results(path)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(results.read_on)
        seen: list[int] = []
        while not reading.done():
            for by in SORTS:
                page = results.page(by, descending=True, offset=0, limit=3)
                assert all(number < page.total for number, _ in page.rows)
                seen.append(page.total)
        assert reading.result() or seen
    assert seen == sorted(seen)
    assert results.page("label", descending=False, offset=0, limit=1).total == 4000


@pytest.mark.parametrize("text", ["no json\n", "[1]\n", '{"image_id": "x"}\n', "\n"])
def test_what_is_no_batch_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.jsonl").write_text(text)
    with pytest.raises(UsageError, match=r"r\.jsonl: no results of a batch.*cxr batch --out"):
        Results(tmp_path / "r.jsonl").page("order", descending=False, offset=0, limit=1)
    with pytest.raises(UsageError, match="cannot be read"):
        Results(tmp_path / "none.jsonl").page("order", descending=False, offset=0, limit=1)
