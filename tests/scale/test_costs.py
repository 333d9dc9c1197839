"""What ships says where it comes from, and agrees with where it says it comes from; a file of one's own is read as strictly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cxr_retrieval.contract import ATTENTION_MAP, FEATURES, IMAGE, LUNG_AGREEMENT, LUNG_MASK, TensorSpec
from cxr_retrieval.errors import UsageError
from cxr_retrieval.gallery.balance import PARTS
from cxr_retrieval.scale.costs import CHOICE, UNITS, read_costs, read_profile

DOCS = Path(__file__).parents[2] / "docs"
BENCH: Any = json.loads((DOCS / "performance.json").read_text())
SERVICES = {row["networks"]: row for row in BENCH["services"] if (row["networks"], row["precision"]) != ("ensemble", "fp32")}
LITE, SERVER = BENCH["retrieval"]["Milvus Lite 3.2.2, FLAT"], BENCH["retrieval"]["Milvus 2.3.5, HNSW"]
ENSEMBLE = BENCH["archive"][0]["cpu_ms_per_film"]
STAGES = BENCH["stages"]
BYTES = {"UINT8": 1, "FP32": 4}


def nbytes(*tensors: TensorSpec) -> int:
    return sum(BYTES[tensor.dtype] * int(np.prod(tensor.shape)) for tensor in tensors)


def slope(rows: Any) -> float:
    """Bytes a further case takes, between the last two sizes."""
    return 1e6 * (rows[-1]["memory_mb"] - rows[-2]["memory_mb"]) / (rows[-1]["cases"] - rows[-2]["cases"])


FIGURES: dict[str, Callable[[], float]] = {
    **{f"reading.{form}.core": lambda form=form: STAGES["reading"][form]["core_s"] for form in STAGES["reading"]},
    **{f"reading.{form}.file": lambda form=form: STAGES["reading"][form]["bytes"] for form in STAGES["reading"]},
    **{f"cpu.{nets}.rate": lambda nets=nets: SERVICES[nets]["idle"]["served_batches_of_8"] for nets in SERVICES},
    **{f"cpu.{nets}.singles": lambda nets=nets: SERVICES[nets]["idle"]["served_single_images"] for nets in SERVICES},
    **{f"cpu.{nets}.alone": lambda nets=nets: SERVICES[nets]["idle"]["latency_ms"] / 1000 for nets in SERVICES},
    **{f"cpu.{nets}.memory": lambda nets=nets: SERVICES[nets]["memory_mb"] * 1e6 for nets in SERVICES},
    "cpu.cores": lambda: BENCH["machines"]["services"]["cores"],
    "client.embed": lambda: ENSEMBLE["embeddings"]["client"] / 1000,
    "client.answer": lambda: ENSEMBLE["answers"]["client"] / 1000,
    "client.line": lambda: STAGES["batch"]["line_bytes"],
    "client.journal": lambda: STAGES["batch"]["journal_bytes"],
    "client.pseudonym": lambda: STAGES["batch"]["pseudonym_bytes"],
    "work.ensemble": lambda: 1e9 * BENCH["arithmetic"]["engines"][0]["gflop_per_image"],
    "work.student": lambda: 1e9 * BENCH["arithmetic"]["engines"][2]["gflop_per_image"],
    "reference.overhead": lambda: (SERVICES["ensemble"]["idle"]["latency_ms"] - SERVICES["ensemble"]["idle"]["bare_latency_ms"]) / 1000,
    "gallery.upsert": lambda: STAGES["milvus"][0]["upsert_core_s"],
    "index.lite.memory": lambda: slope(LITE),
    "index.lite.search": lambda: ENSEMBLE["answers"]["milvus"] / 1000,
    "index.lite.search_segment": lambda: (LITE[-1]["p50_ms"] - ENSEMBLE["answers"]["milvus"]) / 1000,
    "index.hnsw.memory": lambda: slope(SERVER),
    "index.hnsw.disk": lambda: sum(
        STAGES["milvus"][-1]["disk_bytes"][part] / STAGES["milvus"][-1]["cases"]
        for part in ("insert_log", "stats_log", "delta_log", "index_files")
    ),
    "index.hnsw.search": lambda: STAGES["milvus"][0]["search_core_s"],
    "wire.film": lambda: nbytes(IMAGE),
    "wire.ingest": lambda: nbytes(*PARTS, LUNG_MASK, LUNG_AGREEMENT),
    "wire.answer": lambda: nbytes(*PARTS, LUNG_MASK, LUNG_AGREEMENT, ATTENTION_MAP, FEATURES),
}


@pytest.mark.parametrize("name", FIGURES)
def test_a_measured_cost_is_the_one_that_was_measured(name: str) -> None:
    assert read_costs().by_name[name].value == pytest.approx(FIGURES[name](), rel=0.01)


def test_what_ships_says_where_it_comes_from() -> None:
    for cost in read_costs().by_name.values():
        assert cost.unit in UNITS
        assert cost.source.what
        if not cost.measured:
            assert cost.how, cost.name
        if cost.source.key in {CHOICE, "assumption", "timm", "nvidia", "milvus", "failures"}:
            assert not cost.measured, cost.name


def test_no_gpu_is_said_to_have_been_measured() -> None:
    costs = read_costs()
    assert costs.kinds("gpu") == ("l4", "a100", "h100", "h200")
    gpu = [cost for name, cost in costs.by_name.items() if name.startswith(("gpu.", "reference.")) and name != "reference.overhead"]
    assert not any(cost.measured for cost in gpu)


OWN = """
[sources.ours]
what = "trtexec on our own card"
machine = "one H100"
date = "2026-12-01"

[costs.work]
student = { value = 3e9, unit = "FLOP/film", source = "ours", measured = true }
ours = { value = 5, unit = "films/s", source = "archive", measured = true }
"""


def test_own_costs_lie_over_those_that_ship(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text(OWN)
    own, shipped = read_costs(path), read_costs()
    assert own.cost("work.student", "FLOP/film").value == 3e9
    assert own.cost("work.student", "FLOP/film").source.machine == "one H100"
    assert own.cost("work.ours", "films/s").source == shipped.by_name["client.embed"].source
    assert own.by_name["work.ensemble"] == shipped.by_name["work.ensemble"]
    assert own.profile == shipped.profile


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("value = 3e9", "value = -1", "costs.work.student.value"),
        ("value = 3e9", "value = 0", "costs.work.student.value"),
        ("value = 3e9", "value = nan", "costs.work.student.value"),
        ("value = 3e9", "value = true", "costs.work.student.value"),
        ("FLOP/film", "GFLOP", "costs.work.student.unit"),
        ('source = "ours"', 'source = "theirs"', "costs.work.student.source"),
        ('source = "ours", measured = true', 'source = "ours", measured = 1', "costs.work.student.measured"),
        ('source = "ours", measured = true', 'source = "ours", measured = false', "costs.work.student.how"),
        ('source = "ours", measured = true', 'source = "milvus", measured = true', "costs.work.student cannot"),
        ("measured = true }\nours", "measured = true, when = 1 }\nours", "costs.work.student cannot"),
        ('machine = "one H100"', 'where = "here"', "sources.ours"),
        ('what = "trtexec on our own card"', "", "sources.ours"),
        ("[costs.work]", "[prices.work]", "the whole"),
        ("[costs.work]", "[costs", "cannot be read"),
        ("[costs.work]", "[profile]\nhours = [1, 2]\n[costs.work]", "hours"),
        ("ours = {", "ours = 1\nx = {", "costs.work.ours"),
    ],
)
def test_what_cannot_be_meant_is_told_by_its_place(tmp_path: Path, old: str, new: str, said: str) -> None:
    path = tmp_path / "own.toml"
    assert old in OWN
    path.write_text(OWN.replace(old, new, 1))
    with pytest.raises(UsageError, match=said) as told:
        read_costs(path)
    assert str(path) in str(told.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        read_costs(tmp_path / "none.toml")


def test_a_cost_in_another_unit_is_no_such_cost() -> None:
    with pytest.raises(UsageError, match=r"expected a value in bytes; got one in FLOP/film"):
        read_costs().cost("work.student", "bytes")
    with pytest.raises(UsageError, match=r"no cost work\.neither"):
        read_costs().cost("work.neither", "bytes")


@pytest.mark.parametrize(
    ("name", "text"),
    [("a.toml", f"hours = {list(range(24))}"), ("a.csv", ",".join(map(str, range(24)))), ("a.csv", "\n".join(map(str, range(24))) + "\n")],
)
def test_a_profile(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert read_profile(tmp_path / name) == tuple(range(24))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "1,2,3"),
        ("a.csv", ",".join(["0"] * 24)),
        ("a.csv", ",".join(["-1"] + ["1"] * 23)),
        ("a.csv", ",".join(["nan"] + ["1"] * 23)),
        ("a.csv", "noon"),
        ("a.csv", ""),
        ("a.toml", "hours = 3"),
        ("a.toml", "hours = ["),
        ("a.toml", f"hours = {['1'] * 24}"),
        ("a.toml", "minutes = [1]"),
    ],
)
def test_no_profile(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=name):
        read_profile(tmp_path / name)
