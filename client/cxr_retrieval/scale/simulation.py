"""A day of films at several Triton servers, event by event (SimPy): how long they wait, against how many servers there are.

What is simulated: films come at random, more by day than by night (a Poisson process whose rate is that of the hour). A client sends
each to the replica that has the fewest, as `inference/balancing.py` does. A replica gathers batches as Triton's dynamic batcher does: a
preferred size at once, fewer when the oldest has waited long enough, never more than the largest. Of several instances in one replica each
works on a batch of its own, slower while others do so, too, where they share cores. Replicas fail and come back; a roll-out takes them away
one by one, each once it has answered what it had. A film that no replica takes is sent again after a random while that grows, until its
deadline; so is, at once, what a replica had that failed.

What is not: reading, the gallery, the network between them; a film's time is that from its first request to its answer.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any, Final

import numpy as np
import simpy
from numpy.typing import NDArray

from cxr_retrieval.errors import UsageError

HOUR_S: Final = 3600.0
MOST_FILMS: Final = 2_000_000
"""In one simulated day; about half a minute."""
_DONE_S: Final = 1e-9
Process = Generator[simpy.Event, Any, None]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Batcher:
    """How a replica gathers its batches; the words of Triton's `config.pbtxt`.

    Args:
        instances: Batches that it works on at once.
        largest: Films in a batch at most (`max_batch_size`).
        preferred: Sizes that go at once, ascending (`preferred_batch_size`). delay_s: How long the oldest waits for one of these.
        waiting: Films that may wait; a further one is refused (`max_queue_size`).
    """

    instances: int = 1
    largest: int = 64
    preferred: tuple[int, ...] = (8, 16, 32, 64)
    delay_s: float = 0.002
    waiting: int = 512


@dataclass(frozen=True)
class Service:
    """How long a batch takes.

    Args:
        alone: Batch size → mean seconds, alone in its replica, ascending from 1; linear in between, and beyond the last as just before it.
        beside: The same while another such batch is in work there, of the same sizes. Three share what two do. Empty: none slows another.
        variation: Standard deviation of a batch's time over its mean (gamma distribution: 0 always the same, 1 exponential).
    """

    alone: tuple[tuple[int, float], ...]
    beside: tuple[tuple[int, float], ...] = ()
    variation: float = 0.0

    def __post_init__(self) -> None:
        """Refuses what cannot be meant.

        Raises:
            UsageError: As it says.
        """
        sizes = [size for size, _ in self.alone]
        times = [time for _, time in (*self.alone, *self.beside)]
        rising = sizes[:1] == [1] and all(a < b for a, b in pairwise(sizes))
        if (
            not rising
            or any(time <= 0 for time in times)
            or (self.beside and [size for size, _ in self.beside] != sizes)
            or self.variation < 0
        ):
            raise UsageError(
                "service times that cannot be meant",
                expected="seconds above 0 by batch size, from 1 upwards, and a variation of at least 0",
                got=f"{self.alone}, {self.beside}, {self.variation}",
                next_step="correct them",
            )

    def mean_s(self, films: int) -> float:
        """Of a batch of so many, at least 1, alone."""
        return _between(self.alone, films)

    def speed(self, films: int, working: int) -> float:
        """Of such a batch while so many are in work, itself among them; 1 alone."""
        if working < 2 or not self.beside:
            return 1.0
        return _between(self.alone, films) / _between(self.beside, films) * 2 / working


@dataclass(frozen=True)
class Faults:
    """What takes replicas away.

    Args:
        mtbf_s: Mean time until one that works fails (exponential). fails_s: Moments at which one fails besides, in seconds from midnight.
        mttr_s: Until it works again.
        rollouts_s: When each roll-out begins, in seconds from midnight. restart_s: How long one replica is away in it.
    """

    mtbf_s: float = math.inf
    fails_s: tuple[float, ...] = ()
    mttr_s: float = 0.0
    rollouts_s: tuple[float, ...] = ()
    restart_s: float = 0.0


@dataclass(frozen=True)
class Retries:
    """How a client sends again: after a random time of at most `first_s`, doubled with each try up to `longest_s`, until `deadline_s`."""

    first_s: float = 0.1
    longest_s: float = 5.0
    deadline_s: float = 60.0


@dataclass(frozen=True)
class System:
    """Everything that is simulated but the films."""

    replicas: int
    service: Service
    batcher: Batcher = field(default_factory=Batcher)
    faults: Faults = field(default_factory=Faults)
    retries: Retries = field(default_factory=Retries)

    def __post_init__(self) -> None:
        """Refuses what cannot be simulated.

        Raises:
            UsageError: As it says.
        """
        if self.replicas < 1 or self.batcher.instances < 1:
            raise UsageError("a system without servers", expected="at least one replica and one instance", next_step="give more")


@dataclass(frozen=True)
class Spread:
    """Of times in seconds; NaN of none."""

    mean_s: float
    p50_s: float
    p95_s: float
    p99_s: float


@dataclass(frozen=True)
class Hour:
    """What became of the films that came in one hour."""

    hour: int
    films: int
    failed: int
    latency: Spread


@dataclass(frozen=True)
class Simulated:
    """What became of all.

    Attributes:
        films: That came. failed: Not answered by their deadline. again: Requests sent again.
        busy: Share of their time that replicas had a batch in work, of the whole run.
        mean_batch: Films in a batch.
        waiting: From arrival until the work on it that was answered began. latency: Until the answer.
    """

    replicas: int
    seed: int
    films: int
    failed: int
    again: int
    busy: float
    mean_batch: float
    waiting: Spread
    latency: Spread
    hours: tuple[Hour, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain values; of a time of no films null."""
        return _plain(asdict(self))


def arrivals(per_day: float, profile: Sequence[float], seed: int, *, hours: int = 24) -> Floats:
    """When films come, in seconds from midnight, ascending: Poisson, at each hour's rate.

    Args:
        profile: Weights of the 24 hours. hours: So many of them, from midnight.

    Raises:
        UsageError: More than `MOST_FILMS` are to be expected.
    """
    if per_day > MOST_FILMS:
        raise UsageError(
            f"a day of {per_day:,.0f} films takes too long to simulate",
            expected=f"at most {MOST_FILMS:,}",
            next_step="simulate a part: a tenth of the films at a tenth of the replicas waits no shorter",
        )
    random, total = np.random.default_rng([seed, 0]), sum(profile)
    counts = random.poisson([per_day * weight / total for weight in profile[:hours]])
    return np.sort(np.concatenate([HOUR_S * (hour + random.random(count)) for hour, count in enumerate(counts)]))


def simulate(system: System, times_s: Floats, seed: int) -> Simulated:
    """Runs until every film is answered or has failed. The same seed gives the same.

    Args:
        times_s: When films come, ascending.
    """
    run = _Run(system, times_s, seed)
    run.env.run(until=run.over)
    return run.result()


# ------------------------------------------------------------------------------------------------------- one run


@dataclass(eq=False)
class _Film:
    """`began` is when work on it began that is not lost."""

    came: float
    tries: int = 0
    began: float = math.nan
    ended: float = math.nan
    failed: bool = False


class _Signal:
    """An event that can happen again and again; `next` is the next time."""

    def __init__(self, env: simpy.Environment) -> None:
        self._env = env
        self.next = env.event()

    def tell(self) -> None:
        """To all who wait for it now."""
        told, self.next = self.next, self._env.event()
        told.succeed()


class _Run:
    """Films, the replicas, and the client that sends them."""

    def __init__(self, system: System, times_s: Floats, seed: int) -> None:
        self.env = simpy.Environment()
        self.system, self._seed = system, seed
        self.service_random, self._fault_random, self._client_random = (np.random.default_rng([seed, part]) for part in (1, 2, 3))
        self.films = [_Film(float(time)) for time in times_s]
        self._open, self._again, self._turn = len(self.films), 0, 0
        self.over = self.env.event()
        self.replicas = [_Replica(self) for _ in range(system.replicas)]
        self.env.process(self._come())
        for start in system.faults.rollouts_s:
            self.env.process(self._roll_out(start))
        for moment in system.faults.fails_s:
            self.env.process(self._fail_at(moment))
        if math.isfinite(system.faults.mtbf_s):
            for replica in self.replicas:
                self.env.process(self._fail_now_and_then(replica))
        if not self.films:
            self.over.succeed()

    def _come(self) -> Process:
        for film in self.films:
            if film.came > self.env.now:
                yield self.env.timeout(film.came - self.env.now)
            self.send(film)

    def send(self, film: _Film) -> None:
        """To the replica that has the fewest, in turn among equals; or later, where none takes it."""
        self._turn += 1
        count = len(self.replicas)
        ordered = (self.replicas[(self._turn + place) % count] for place in range(count))
        takers = [replica for replica in ordered if replica.takes()]
        if takers:
            min(takers, key=lambda replica: replica.held).take(film)
        else:
            self.env.process(self._later(film))

    def _later(self, film: _Film) -> Process:
        retries = self.system.retries
        film.tries += 1
        wait_s = float(self._client_random.random()) * min(retries.longest_s, retries.first_s * 2**film.tries)
        left_s = max(0.0, film.came + retries.deadline_s - self.env.now)
        if wait_s >= left_s:
            yield self.env.timeout(left_s)
            self.end(film, failed=True)
            return
        yield self.env.timeout(wait_s)
        self._again += 1
        self.send(film)

    def lost(self, film: _Film) -> None:
        """Its replica failed; another is asked at once."""
        film.began = math.nan
        self._again += 1
        self.send(film)

    def end(self, film: _Film, *, failed: bool) -> None:
        """Answered, or not by its deadline."""
        film.ended, film.failed = self.env.now, failed
        self._open -= 1
        if not self._open:
            self.over.succeed()

    def _fail_now_and_then(self, replica: _Replica) -> Process:
        while True:
            yield self.env.timeout(float(self._fault_random.exponential(self.system.faults.mtbf_s)))
            yield from self._fail(replica)

    def _fail_at(self, moment_s: float) -> Process:
        """One that works, if any does."""
        yield self.env.timeout(moment_s)
        working = [replica for replica in self.replicas if not replica.away]
        if working:
            yield from self._fail(working[-1])

    def _fail(self, replica: _Replica) -> Process:
        for film in replica.fail():
            self.lost(film)
        yield self.env.timeout(self.system.faults.mttr_s)
        replica.come_back()

    def _roll_out(self, start_s: float) -> Process:
        yield self.env.timeout(start_s)
        for replica in self.replicas:
            replica.away += 1
            while replica.held:
                yield replica.emptied.next
            yield self.env.timeout(self.system.faults.restart_s)
            replica.come_back()

    def result(self) -> Simulated:
        """All films' times."""
        came = np.array([film.came for film in self.films])
        failed = np.array([film.failed for film in self.films], np.bool_)
        latency = np.array([film.ended - film.came for film in self.films])
        waiting = np.array([film.began - film.came for film in self.films])
        hour = (came // HOUR_S).astype(np.int64)
        hours = tuple(
            Hour(int(one), int((hour == one).sum()), int(failed[hour == one].sum()), _spread(latency[(hour == one) & ~failed]))
            for one in range(int(hour.max(initial=0)) + 1)
        )
        batches = sum(replica.batches for replica in self.replicas)
        busy_s, worked = sum(replica.busy_s for replica in self.replicas), sum(replica.worked for replica in self.replicas)
        return Simulated(
            len(self.replicas),
            self._seed,
            len(self.films),
            int(failed.sum()),
            self._again,
            busy_s / (len(self.replicas) * self.env.now) if self.env.now else 0.0,
            worked / batches if batches else 0.0,
            _spread(waiting[~failed]),
            _spread(latency[~failed]),
            hours,
        )


class _Replica:
    """One server: what waits there, what its instances work on.

    Attributes:
        away: Reasons for which it takes nothing: it has failed, it is being rolled out. emptied: Happens when it has nothing left.
        held: Films that it has. batches, worked, busy_s: Batches begun, films in them, and time with any of them in work.
    """

    def __init__(self, run: _Run) -> None:
        self._run, self._env, self._batcher, self._service = run, run.env, run.system.batcher, run.system.service
        self._queue: deque[tuple[_Film, float]] = deque()
        self._working: list[list[_Film]] = []
        self._idle = 0
        self._came, self._paced, self.emptied = _Signal(self._env), _Signal(self._env), _Signal(self._env)
        self.away = self.batches = self.worked = self.held = 0
        self.busy_s, self._busy_since = 0.0, 0.0
        self._instances = [self._env.process(self._instance()) for _ in range(self._batcher.instances)]

    def takes(self) -> bool:
        """Whether one more."""
        return not self.away and len(self._queue) < self._batcher.waiting

    def take(self, film: _Film) -> None:
        """One more waits."""
        self._queue.append((film, self._env.now))
        self.held += 1
        if self._idle:
            self._came.tell()

    def come_back(self) -> None:
        """One reason less to be away."""
        self.away -= 1

    def fail(self) -> list[_Film]:
        """Loses all that it had, which is returned, and is away."""
        self.away += 1
        lost = [film for batch in self._working for film in batch] + [film for film, _ in self._queue]
        if self._working:
            self.busy_s += self._env.now - self._busy_since
        self._queue.clear()
        self._working.clear()
        self.held = self._idle = 0
        for instance in self._instances:
            instance.interrupt()
        self._instances = [self._env.process(self._instance()) for _ in range(self._batcher.instances)]
        self.emptied.tell()
        return lost

    def _instance(self) -> Process:
        try:
            while True:
                while not (count := self._ready()):
                    yield from self._more()
                batch = [self._queue.popleft()[0] for _ in range(count)]
                yield from self._work(batch)
                self.held -= count
                late = self._env.now - self._run.system.retries.deadline_s
                for film in batch:
                    self._run.end(film, failed=film.came < late)
                if not self.held:
                    self.emptied.tell()
        except simpy.Interrupt:
            return

    def _ready(self) -> int:
        """Films of the batch that can begin now; 0: none."""
        count = min(len(self._queue), self._batcher.largest)
        fitting = [size for size in self._batcher.preferred if size <= count]
        if fitting:
            return fitting[-1]
        if count and self._env.now >= self._queue[0][1] + self._batcher.delay_s:
            return count
        return 0

    def _more(self) -> Process:
        """Until one comes, or the oldest has waited long enough."""
        self._idle += 1
        if self._queue:
            yield self._came.next | self._env.timeout(max(0.0, self._queue[0][1] + self._batcher.delay_s - self._env.now))
        else:
            yield self._came.next
        self._idle -= 1

    def _work(self, batch: list[_Film]) -> Process:
        self.batches += 1
        self.worked += len(batch)
        for film in batch:
            film.began = self._env.now
        if not self._working:
            self._busy_since = self._env.now
        self._working.append(batch)
        left_s = self._service.mean_s(len(batch)) * self._chance()
        if not self._service.beside:
            yield self._env.timeout(left_s)
        else:
            self._paced.tell()
            while left_s > _DONE_S:
                speed = self._service.speed(len(batch), len(self._working))
                began = self._env.now
                yield self._env.timeout(left_s / speed) | self._paced.next
                left_s -= (self._env.now - began) * speed
        self._working.remove(batch)
        if self._service.beside:
            self._paced.tell()
        if not self._working:
            self.busy_s += self._env.now - self._busy_since

    def _chance(self) -> float:
        variation = self._service.variation
        return float(self._run.service_random.gamma(variation**-2, variation**2)) if variation else 1.0


def _between(table: Sequence[tuple[int, float]], films: int) -> float:
    """Linear between the sizes of a table, and beyond its last as just before it."""
    (before, before_s), (last, last_s) = table[-2] if len(table) > 1 else (0, 0.0), table[-1]
    if films > last:
        return last_s + (last_s - before_s) / (last - before) * (films - last)
    return float(np.interp(films, [size for size, _ in table], [time for _, time in table]))


def _spread(times_s: Floats) -> Spread:
    if not len(times_s):
        return Spread(math.nan, math.nan, math.nan, math.nan)
    return Spread(float(times_s.mean()), *(float(value) for value in np.percentile(times_s, (50, 95, 99))))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and math.isnan(value) else value
