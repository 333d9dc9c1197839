"""The simulated queue against closed forms, and by what must hold whatever happens in it."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxr_retrieval.contract import LUNG_SEGMENTATION
from cxr_retrieval.errors import UsageError
from cxr_retrieval.locations import default_repository
from cxr_retrieval.scale.costs import read_costs
from cxr_retrieval.scale.day import plot, simulated_days, system_of
from cxr_retrieval.scale.planning import Demand, plan
from cxr_retrieval.scale.simulation import MOST_FILMS, Batcher, Faults, Floats, Retries, Service, System, arrivals, simulate
from cxr_retrieval.serving.choices import Precision
from cxr_retrieval.serving.repository import embedded_leaf, read_config
from scale.test_planning import by_the_book

FLAT = (1.0,) * 24
EVER = Retries(deadline_s=math.inf)
SINGLY = {"largest": 1, "preferred": (), "delay_s": 0.0, "waiting": 10**9}


def poisson(rate: float, count: int, seed: int = 3) -> Floats:
    return np.cumsum(np.random.default_rng(seed).exponential(1 / rate, count))


def queue(servers: int, variation: float) -> System:
    """M/G/c: one replica whose instances take films singly and do not slow each other; 1 s each on the mean."""
    return System(1, Service(((1, 1.0),), variation=variation), Batcher(servers, 1, (), 0.0, 10**9), retries=EVER)


@pytest.mark.parametrize("variation", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("load", [0.5, 0.8])
def test_one_server_waits_as_pollaczek_and_khinchine_say(load: float, variation: float) -> None:
    """M/G/1: E[W] = ρ s (1 + v²) / 2 (1 − ρ); v = 1 is M/M/1, v = 0 is M/D/1."""
    found = simulate(queue(1, variation), poisson(load, 40_000), seed=1)
    assert found.waiting.mean_s == pytest.approx(load * (1 + variation**2) / 2 / (1 - load), rel=0.05)
    assert found.busy == pytest.approx(load, rel=0.02)


def test_one_server_of_exponential_times_has_their_quantiles() -> None:
    """M/M/1: a film's time is exponential with mean s / (1 − ρ)."""
    found = simulate(queue(1, 1.0), poisson(0.6, 40_000), seed=1).latency
    for share, value in ((0.5, found.p50_s), (0.95, found.p95_s), (0.99, found.p99_s)):
        assert value == pytest.approx(-math.log(1 - share) / 0.4, rel=0.07)


@pytest.mark.parametrize(("servers", "load"), [(2, 1.4), (5, 4.0)])
def test_several_servers_wait_as_erlang_says(servers: int, load: float) -> None:
    """M/M/c: E[W] = C(c, a) s / (c − a)."""
    found = simulate(queue(servers, 1.0), poisson(load, 40_000), seed=1)
    assert found.waiting.mean_s == pytest.approx(by_the_book(servers, load) / (servers - load), rel=0.07)


def test_two_that_share_their_cores_are_one_shared_server() -> None:
    """Two instances at half their speed each, while both work: processor sharing for two, whose busy share is ρ as of one server."""
    service = Service(((1, 1.0),), ((1, 2.0),), variation=1.0)
    found = simulate(System(1, service, Batcher(2, 1, (), 0.0, 10**9), retries=EVER), poisson(0.7, 40_000), seed=1)
    assert found.busy == pytest.approx(0.7, rel=0.03)
    assert found.latency.mean_s == pytest.approx(1 / (1 - 0.7), rel=0.06)  # with exponential work as M/M/1, whoever is served first


# ------------------------------------------------------------------------------------------------------- batches


def served(batcher: Batcher, *times: float, alone: tuple[tuple[int, float], ...] = ((1, 1.0), (2, 1.0))) -> tuple[float, float, float]:
    """Films a batch, mean waiting and mean time."""
    found = simulate(System(1, Service(alone), batcher), np.array(times), seed=1)
    return found.mean_batch, found.waiting.mean_s, found.latency.mean_s


def test_what_waits_goes_together() -> None:
    assert served(Batcher(1, 64, (), 0.0), 0.0, 0.1, 0.2, 0.3) == pytest.approx((2.0, (0.9 + 0.8 + 0.7) / 4, 1.0 + 2.4 / 4))


def test_a_preferred_size_goes_at_once_and_fewer_wait_for_it() -> None:
    assert served(Batcher(1, 64, (2,), 0.5), 0.0, 0.1) == pytest.approx((2.0, 0.05, 1.05))
    assert served(Batcher(1, 64, (2,), 0.5), 0.0, 0.6) == pytest.approx((1.0, (0.5 + 0.9) / 2, 1.0 + (0.5 + 0.9) / 2))


def test_of_many_the_largest_preferred_size_goes_first() -> None:
    """Seven wait, 2 and 4 are preferred: 4, then 2, then the last, which has waited long enough."""
    times = (0.0, *(0.01 * place for place in range(1, 8)))
    batches, _, _ = served(Batcher(1, 64, (2, 4), 0.005), *times)
    assert batches == pytest.approx(8 / 4)


def test_never_more_than_the_largest() -> None:
    assert served(Batcher(1, 3, (), 0.0), *([0.0] * 6))[0] == 3.0


def test_times_between_and_beyond_the_measured_sizes() -> None:
    service = Service(((1, 1.0), (4, 2.5), (8, 6.5)))
    assert [service.mean_s(films) for films in (1, 2, 4, 6, 8, 10)] == pytest.approx([1.0, 1.5, 2.5, 4.5, 6.5, 8.5])
    assert Service(((1, 0.5),)).mean_s(3) == pytest.approx(1.5)
    shared = Service(((1, 1.0), (4, 2.0)), ((1, 1.5), (4, 4.0)))
    assert [shared.speed(1, 1), shared.speed(1, 2), shared.speed(4, 2), shared.speed(4, 4)] == pytest.approx([1.0, 2 / 3, 0.5, 0.25])


# ------------------------------------------------------------------------------------------ what must hold always


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    replicas=st.integers(1, 4),
    instances=st.integers(1, 3),
    waiting=st.integers(1, 30),
    mtbf=st.floats(5, 500),
    deadline=st.floats(0.5, 20),
    preferred=st.sampled_from([(), (2, 4)]),
    shared=st.booleans(),
)
def test_every_film_is_answered_once_or_has_failed(
    seed: int, replicas: int, instances: int, waiting: int, mtbf: float, deadline: float, preferred: tuple[int, ...], shared: bool
) -> None:
    """With failures, roll-outs, full queues and deadlines; and the same seed gives the same."""
    alone = ((1, 0.2), (8, 0.8))
    system = System(
        replicas,
        Service(alone, tuple((size, 1.6 * time) for size, time in alone) if shared else (), 0.3),
        Batcher(instances, 8, preferred, 0.05, waiting),
        Faults(mtbf, (20.0, 30.0), 5.0, (10.0, 12.0), 3.0),
        Retries(0.1, 2.0, deadline),
    )
    times = poisson(6.0, 200, seed)
    found = simulate(system, times, seed)
    assert found.films == len(times) == sum(hour.films for hour in found.hours)
    assert found.failed == sum(hour.failed for hour in found.hours) <= found.films
    if found.failed < found.films:
        assert 0 < found.latency.p50_s <= found.latency.p95_s <= found.latency.p99_s <= deadline + 1e-6
        assert found.waiting.mean_s <= found.latency.mean_s
    assert 0 <= found.busy <= 1 + 1e-9
    assert str(simulate(system, times, seed)) == str(found)


def test_a_failed_replicas_films_are_asked_elsewhere_at_once() -> None:
    faults = Faults(fails_s=(0.5,), mttr_s=100.0)
    found = simulate(System(2, Service(((1, 1.0),)), Batcher(1, 1, (), 0.0), faults), np.array([0.0, 0.0]), seed=1)
    assert (found.failed, found.again) == (0, 1)
    assert found.latency.mean_s == pytest.approx((1.0 + 2.0) / 2)


def test_a_roll_out_loses_nothing_and_goes_one_by_one() -> None:
    """Two replicas of 10 s away each; a film comes every second and is answered in one: none waits, none is sent again."""
    faults = Faults(rollouts_s=(5.0,), restart_s=10.0)
    found = simulate(System(2, Service(((1, 0.9),)), Batcher(1, 1, (), 0.0), faults), np.arange(60.0), seed=1)
    assert (found.failed, found.again) == (0, 0)
    assert found.latency.p99_s == pytest.approx(0.9)


def test_one_replica_rolled_out_lets_films_wait_until_it_is_back() -> None:
    faults = Faults(rollouts_s=(5.0,), restart_s=10.0)
    found = simulate(System(1, Service(((1, 0.1),)), Batcher(1, 1, (), 0.0), faults), np.arange(60.0), seed=1)
    assert found.failed == 0
    assert found.again > 0
    assert 1.0 < found.latency.p99_s < 20.0


def test_a_film_that_nobody_takes_fails_at_its_deadline() -> None:
    faults = Faults(fails_s=(0.0,), mttr_s=1e6)
    found = simulate(System(1, Service(((1, 1.0),)), Batcher(), faults), np.array([1.0, 2.0]), seed=1)
    assert found.failed == 2
    assert math.isnan(found.latency.mean_s)
    assert found.as_json()["latency"]["mean_s"] is None


def test_more_replicas_never_wait_longer_by_much() -> None:
    times = poisson(9.0, 5_000)
    p99 = [
        simulate(System(count, Service(((1, 0.3),), variation=0.5), Batcher(1, 1, (), 0.0)), times, 1).latency.p99_s for count in (3, 4, 6)
    ]
    assert all(a >= b for a, b in pairwise(p99))


def test_no_films() -> None:
    found = simulate(System(1, Service(((1, 1.0),))), np.array([]), seed=1)
    assert (found.films, found.failed, found.busy) == (0, 0, 0.0)


# --------------------------------------------------------------------------------------------------------- a day


def test_films_come_at_each_hours_rate() -> None:
    profile = tuple(float(hour) for hour in range(24))
    times = arrivals(50_000, profile, seed=1)
    counts, _ = np.histogram(times, 24, (0, 86_400))
    expected = np.array(profile) / sum(profile) * 50_000
    assert (np.abs(counts - expected) <= 5 * np.sqrt(expected)).all()
    assert (np.diff(times) >= 0).all()
    assert not (times < 3600).any()


def test_gaps_between_films_are_exponential() -> None:
    gaps = np.diff(arrivals(86_400, FLAT, seed=2))
    assert gaps.mean() == pytest.approx(1.0, rel=0.02)
    assert gaps.std() == pytest.approx(1.0, rel=0.02)


def test_a_day_of_too_many_films_is_refused() -> None:
    with pytest.raises(UsageError, match="takes too long to simulate"):
        arrivals(MOST_FILMS + 1, FLAT, seed=1)


@pytest.mark.parametrize(
    "made",
    [
        lambda: System(0, Service(((1, 1.0),))),
        lambda: System(1, Service(((1, 1.0),)), Batcher(instances=0)),
        lambda: Service(()),
        lambda: Service(((2, 1.0),)),
        lambda: Service(((1, 0.0),)),
        lambda: Service(((1, 1.0), (1, 2.0))),
        lambda: Service(((1, 1.0), (2, 2.0)), ((1, 1.0),)),
        lambda: Service(((1, 1.0),), variation=-1),
    ],
)
def test_what_cannot_be_simulated_is_refused(made: object) -> None:
    assert callable(made)
    with pytest.raises(UsageError):
        made()


def test_batches_are_gathered_as_the_served_configurations_say() -> None:
    """On a GPU as production's, on a CPU as the embedded server's."""
    costs, production = read_costs(), read_config(default_repository() / LUNG_SEGMENTATION)
    embedded = embedded_leaf(production, Path("/model.onnx"), Precision.int8, 2)
    for gpu, config in (("h100", production), (None, embedded)):
        batcher, batching = system_of(Demand(1e6, 1e3, gpu=gpu), costs, 1).batcher, config.dynamic_batching
        assert batcher.instances == config.instance_group[0].count
        assert batcher.largest == config.max_batch_size
        assert batcher.preferred == tuple(batching.preferred_batch_size)
        assert batcher.delay_s == batching.max_queue_delay_microseconds / 1e6
    assert (
        system_of(Demand(1e6, 1e3, gpu="h100"), costs, 1).batcher.waiting == production.dynamic_batching.default_queue_policy.max_queue_size
    )


def test_a_planned_day_holds_its_target(tmp_path: Path) -> None:
    """With the spare, through a roll-out and a failure in the busiest hour; the picture is one."""
    demand, costs = Demand(1e6, 4_000, p99_s=0.5), read_costs()
    replicas = plan(demand, costs).replicas
    days = simulated_days(demand, costs, [1, replicas], seed=4)
    assert days[-1].failed == 0
    assert days[-1].latency.p99_s <= 0.5
    assert days[0].failed > 0  # alone through an hour of failure
    assert days[0].films == days[1].films
    plot(days, tmp_path / "day.png")
    assert (tmp_path / "day.png").read_bytes().startswith(b"\x89PNG")
