"""Results as tables: the JSON lines of a batch, one row each, as Parquet or CSV. Nested parts stay JSON, in a column each."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterator
from enum import Enum
from itertools import islice
from pathlib import Path
from typing import Any, Final

from cxr_retrieval.errors import SetupError

_ROWS: Final = 1000
_COLUMNS: Final = (
    "input",
    "status",
    "error",
    "same_as",
    "image_id",
    "model_version",
    "label",
    "balance",
    "confidence",
    "calibrated",
    "abstained",
    "trace_id",
)
_NUMBERS: Final = frozenset({"balance", "confidence", "calibrated"})
_NESTED: Final = (
    "scores",
    "neighbours",
    "earlier_films",
    "summary",
    "embedding",
    "appearance",
    "warnings",
    "timings_ms",
    "attention",
    "ood",
    "set",
)


class Format(str, Enum):
    """Of a batch's results."""

    jsonl = "jsonl"
    parquet = "parquet"
    csv = "csv"


def write_table(lines: Path, out: Path, form: Format) -> None:
    """Turns JSON lines into a table, row by row; the file is there whole or not at all, with rights 0600.

    Raises:
        SetupError: It cannot be written.
    """
    partial = out.with_name(out.name + ".partial")
    try:
        os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600))
        _WRITERS[form](_rows(lines), partial)
        partial.replace(out)
    except OSError as error:
        raise SetupError(
            f"{out}: cannot be written", got=error.strerror or str(error), next_step="make room, then give the same command again"
        ) from error


def _rows(lines: Path) -> Iterator[dict[str, Any]]:
    with lines.open("rb") as file:
        for line in file:
            result = json.loads(line)
            result |= result.pop("prediction", {})
            nested = {name: json.dumps(result[name], ensure_ascii=False) for name in _NESTED if name in result}
            yield {**{name: result.get(name) for name in _COLUMNS}, **dict.fromkeys(_NESTED), **nested}


def _write_csv(rows: Iterator[dict[str, Any]], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [*_COLUMNS, *_NESTED])
        writer.writeheader()
        writer.writerows(rows)


def _write_parquet(rows: Iterator[dict[str, Any]], path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([(name, pa.float64() if name in _NUMBERS else pa.string()) for name in (*_COLUMNS, *_NESTED)])
    with pq.ParquetWriter(path, schema) as writer:
        while page := list(islice(rows, _ROWS)):
            writer.write_table(pa.Table.from_pylist(page, schema))


_WRITERS: Final[dict[Format, Callable[[Iterator[dict[str, Any]], Path], None]]] = {Format.csv: _write_csv, Format.parquet: _write_parquet}
