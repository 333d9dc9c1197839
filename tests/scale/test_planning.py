"""Plans by hand, by what must hold for any of them, and by what they refuse."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cxr_retrieval.errors import UsageError
from cxr_retrieval.scale.costs import read_costs
from cxr_retrieval.scale.planning import SPARE, Demand, Group, Segmentation, Traced, erlang_c, plan, replica_of, servers_for, wait_s

COSTS = read_costs()
films = st.floats(1, 1e10)
per_day = st.floats(1, 1e7)
gpus = st.sampled_from([None, *COSTS.kinds("gpu")])
indexes = st.sampled_from(COSTS.kinds("index"))
nets = st.sampled_from(Segmentation)


def by_the_book(servers: int, load: float) -> float:
    """Erlang C as it is written, in sums."""
    tail = load**servers / math.factorial(servers) * servers / (servers - load)
    return tail / (sum(load**count / math.factorial(count) for count in range(servers)) + tail)


@pytest.mark.parametrize(("servers", "load"), [(1, 0.3), (1, 0.9), (2, 1.0), (3, 2.4), (10, 8.0), (50, 45.0), (100, 60.0)])
def test_erlang_c(servers: int, load: float) -> None:
    assert erlang_c(servers, load) == pytest.approx(by_the_book(servers, load))


def test_erlang_c_at_its_ends() -> None:
    assert erlang_c(1, 0.42) == pytest.approx(0.42)
    assert erlang_c(3, 0.0) == 0.0
    assert erlang_c(3, 3.0) == 1.0
    assert erlang_c(5_000, 4_900) == pytest.approx(0.098, abs=0.05)  # no overflow


def test_only_this_share_waits_longer() -> None:
    """P(W > t) = C · exp(−(c − a)·t/s)."""
    waited = wait_s(3, 2.4 / 0.5, 0.5, 0.01)
    assert by_the_book(3, 2.4) * math.exp(-(3 - 2.4) * waited / 0.5) == pytest.approx(0.01)
    assert wait_s(3, 0.001, 0.5, 0.01) == 0.0
    assert wait_s(3, 6.1, 0.5, 0.01) == math.inf


@given(load=st.floats(0.001, 200), target=st.floats(0.2, 10), busy=st.floats(0.2, 0.95))
def test_the_fewest_servers_that_do(load: float, target: float, busy: float) -> None:
    count = servers_for(load / 0.1, 0.1, 0.1, target, busy)

    def does(servers: int) -> bool:
        return load <= servers * busy * (1 + 1e-9) and 0.1 + wait_s(servers, load / 0.1, 0.1, 0.01) <= target

    assert does(count)
    assert count == 1 or not does(count - 1)


def test_a_target_below_one_films_own_time_is_refused() -> None:
    with pytest.raises(UsageError, match=r"--p99 above 0\.0661 s"):
        plan(Demand(1e6, 1e3, p99_s=0.05), COSTS)


def test_a_plan_by_hand() -> None:
    """100 million films of lossless JPEG in 30 days, 50,000 a day, H100."""
    found = plan(Demand(100e6, 50e3, gpu="h100"), COSTS)
    value = {name: figure.value for name, figure in found.figures.items()}
    rate = 100e6 / (30 * 86_400)
    assert value["backlog_rate"] == pytest.approx(rate)
    assert value["backlog_reading_cores"] == pytest.approx(rate * (0.253 + 0.00179) / 0.7)
    card = 7.63e12 * (3.35 / 1.008) / 24.32e9
    assert value["hours_one_replica"] == pytest.approx(100e6 / card / 3600)
    assert value["backlog_replicas"] == math.ceil(rate / card / 0.7) == 1
    peak = 50e3 * 8.5 / 103.9 / 3600 * 1.5
    assert value["peak"] == pytest.approx(peak)
    assert value["replicas"] == 1 + SPARE
    assert value["search_cores"] == pytest.approx(peak * (3.85e-3 + 100 * 2.29e-3) / 0.7)
    assert value["gallery_memory"] == pytest.approx(100e6 * 2905 * 2 / 0.85)
    assert value["gallery_machines"] == 3
    assert value["machines"] == 3 + 1
    assert value["archive_network"] == pytest.approx(rate * 5_813_414)
    assert value["gallery_storage"] == pytest.approx(100e6 * 1199 * 1.5)
    assert found.index == "hnsw"


def test_a_card_is_as_fast_as_what_grew_less() -> None:
    """L4: memory bandwidth; A100: arithmetic."""
    assert replica_of(Demand(1, 1, gpu="l4"), COSTS).rate.value == pytest.approx(7.63e12 * 0.3 / 1.008 / 24.32e9)
    assert replica_of(Demand(1, 1, gpu="a100"), COSTS).rate.value == pytest.approx(7.63e12 * 312 / 165 / 24.32e9)


def test_the_index_follows_the_size() -> None:
    assert [plan(Demand(count, 10), COSTS).index for count in (1, 1e5, 1.01e5, 1e9, 1.01e9, 1e10)] == [
        *("lite", "lite", "hnsw", "hnsw", "diskann", "diskann"),
    ]
    assert plan(Demand(1e4, 10, index="diskann"), COSTS).index == "diskann"


@given(films, per_day, gpus, nets, indexes)
def test_every_figure_is_whole(count: float, day: float, gpu: str | None, net: Segmentation, index: str) -> None:
    found = plan(Demand(count, day, gpu=gpu, segmentation=net, index=index), COSTS)
    assert [figure.group for figure in found.figures.values()] == sorted(
        (figure.group for figure in found.figures.values()), key=list(Group).index
    )
    for name, figure in found.figures.items():
        assert figure.name == name
        assert figure.formula
        assert 0 < figure.value < math.inf
        assert figure.costs or name == "backlog_rate"
        if figure.unit in {"machines", "replicas"}:
            assert figure.value == int(figure.value)
    assert (gpu is not None) == found.figures["backlog_replicas"].assumed


MORE_FILMS = (
    *("backlog_rate", "backlog_replicas", "backlog_machines", "hours_one_replica", "search_cores", "gallery_memory"),
    *("gallery_machines", "gallery_storage", "archive_network", "machines"),
)
MORE_A_DAY = ("peak", "replicas", "client_cores", "search_cores", "day_machines", "results_storage", "day_network", "machines")


def never_falls(demands: list[Demand], names: tuple[str, ...]) -> bool:
    plans = [plan(demand, COSTS).figures for demand in demands]
    return all(a[name].value <= b[name].value * (1 + 1e-9) for a, b in pairwise(plans) for name in names)


@given(st.lists(films, min_size=2, max_size=4), gpus, nets, indexes)
def test_more_films_never_need_less(counts: list[float], gpu: str | None, net: Segmentation, index: str) -> None:
    assert never_falls([Demand(count, 1e4, gpu=gpu, segmentation=net, index=index) for count in sorted(counts)], MORE_FILMS)


@given(st.lists(per_day, min_size=2, max_size=4), gpus, nets, indexes, st.floats(0.2, 5))
def test_more_films_a_day_never_need_less(counts: list[float], gpu: str | None, net: Segmentation, index: str, p99: float) -> None:
    demands = [Demand(1e7, count, gpu=gpu, segmentation=net, index=index, p99_s=p99) for count in sorted(counts)]
    assert never_falls(demands, MORE_A_DAY)


@given(st.lists(st.floats(0.01, 1e4), min_size=2, max_size=4), gpus)
def test_fewer_days_never_need_less(days: list[float], gpu: str | None) -> None:
    demands = [Demand(1e7, 1e4, count, gpu) for count in sorted(days, reverse=True)]
    assert never_falls(demands, ("backlog_rate", "backlog_replicas", "backlog_machines", "archive_network", "machines"))


@given(st.floats(1, 1000))
def test_units_scale(factor: float) -> None:
    """Films and days together: the same rate, so the same machines and network; memory and hours as many times more."""
    one, many = (plan(Demand(1e6 * times, 1e3, 30 * times, index="hnsw"), COSTS).figures for times in (1.0, factor))
    for name in ("backlog_rate", "backlog_reading_cores", "archive_network", "triton_network"):
        assert many[name].value == pytest.approx(one[name].value)
    for name in ("hours_one_replica", "hours_one_core", "gallery_memory", "gallery_storage", "archive_bytes"):
        assert many[name].value == pytest.approx(factor * one[name].value)


def test_the_busiest_hour_decides() -> None:
    flat = plan(Demand(1e6, 24_000), replace(COSTS, profile=(1.0,) * 24)).figures["peak"].value
    assert flat == pytest.approx(1000 / 3600 * 1.5)
    at_once = plan(Demand(1e6, 24_000), replace(COSTS, profile=(0.0,) * 23 + (1.0,))).figures["peak"].value
    assert at_once == pytest.approx(24 * flat)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, 1e11])
@pytest.mark.parametrize(
    ("option", "made"),
    [
        ("--films", lambda value: Demand(value, 1)),
        ("--per-day", lambda value: Demand(1, value)),
        ("--days", lambda value: Demand(1, 1, days=value)),
        ("--p99", lambda value: Demand(1, 1, p99_s=value)),
    ],
)
def test_nonsense_is_refused(option: str, made: Callable[[float], Demand], value: float) -> None:
    with pytest.raises(UsageError, match=f"{option} cannot be planned for"):
        made(value)


@pytest.mark.parametrize(
    ("demand", "said"),
    [
        (Demand(1, 1, gpu="h1000"), "--gpu h1000 has no costs; expected l4, a100, h100, h200"),
        (Demand(1, 1, read_as="gif"), "--read-as gif has no costs; expected dicom, "),
        (Demand(1, 1, index="ivf"), "--index ivf has no costs; expected lite, hnsw, diskann"),
    ],
)
def test_names_without_costs_are_refused(demand: Demand, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        plan(demand, COSTS)


OWN_CARD = """
[sources.ours]
what = "cxr loadtest, batches of 64"
machine = "one L40S"
date = "2027-01-15"

[costs.gpu.l40s.ensemble]
rate = { value = 800, unit = "films/s", source = "ours", measured = true }
singles = { value = 300, unit = "films/s", source = "ours", measured = true }
alone = { value = 0.008, unit = "s", source = "ours", measured = true }
"""


def test_a_site_measures_its_own_card(tmp_path: Path) -> None:
    """It is taken as measured; a shipped one that it measures, too, instead of what was assumed of it."""
    (tmp_path / "own.toml").write_text(OWN_CARD + OWN_CARD.split("\n\n")[1].replace("l40s", "h100"))
    costs = read_costs(tmp_path / "own.toml")
    for gpu in ("l40s", "h100"):
        found = plan(Demand(1e8, 1e6, gpu=gpu), costs)
        assert not found.figures["backlog_replicas"].assumed
        assert found.figures["hours_one_replica"].value == pytest.approx(1e8 / 800 / 3600)
        assert found.figures["replicas"].value == 1 + SPARE  # 34 films/s, 300 singly
    assert plan(Demand(1e8, 1e6, gpu="h200"), costs).figures["backlog_replicas"].assumed


def test_another_index_is_a_table_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text(
        '[sources.ours]\nwhat = "cxr loadtest"\nmachine = "one H100"\ndate = "2026-12-01"\n[costs.index.ours]\n'
        + "\n".join(
            f'{name} = {{ value = {value}, unit = "{unit}", source = "ours", measured = true }}'
            for name, value, unit in (
                *(("up_to", 2e8, "cases"), ("memory", 700, "bytes/case"), ("disk", 900, "bytes/case"), ("search", 0.004, "core s/search")),
                *(("search_segment", 0.003, "core s/search"), ("segment", 1e6, "cases"), ("build", 0.002, "core s/case")),
            )
        )
    )
    found = plan(Demand(1e8, 1e4), read_costs(tmp_path / "own.toml"))
    assert found.index == "ours"
    assert found.figures["gallery_memory"].value == pytest.approx(1e8 * 700 * 2 / 0.85)


def test_traced_numbers_know_what_they_rest_on() -> None:
    one, two = (Traced(2.0, (COSTS.by_name[name],)) for name in ("wire.film", "wire.answer"))
    assert [cost.name for cost in (one * two + one).used] == ["wire.film", "wire.answer"]
    assert [cost.name for cost in one.most(two).used] == ["wire.film", "wire.answer"]
    assert Traced(3.0000000000001).up().value == 3.0
    assert Traced(3.001).up().value == 4.0
