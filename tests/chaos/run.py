"""`make chaos`: commands harmed at random moments, given again until they end well, and then looked at: what is lost, doubled, or wrong.

Each run is one command (`cxr batch` with a gallery, `cxr batch --embed-only`, `cxr ingest`) and one harm, which strikes up to three times. Seeds
are printed: `--seed N --only I` repeats the run number I of a suite.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from rich.console import Console
from rich.table import Table

from chaos.harms import DISK_FULL, HARMS, Disk, Scene
from chaos.instant import instant_repository
from chaos.proxy import Proxy
from chaos.world import (
    Client,
    Film,
    Service,
    copy_folder,
    free_port,
    is_root,
    make_archive,
    milvus_service,
    running_with,
    stored_vectors,
    triton_service,
    write_manifest,
)

COMMANDS: Final = ("batch", "embed", "ingest")
TIMEOUT_S: Final = 6.0
"""Deadline of one call."""
ATTEMPTS: Final = 12
"""How often a command is given at most."""
ATTEMPT_S: Final = 240.0
NEAR: Final = 0.999
"""Cosine of an embedding with that of the undisturbed run: batches are cut otherwise, so last digits differ."""
START_SHARE: Final = 0.15
START_S: Final = 3.0
"""Some harms strike within the seconds in which a client loads its libraries and connects."""
_FINE: Final = frozenset({0, 1, 2, 130, -9, -2})
"""Exit codes that a harmed client may end with: done, could not go on, interrupted, killed; and Python's own 1 after a Ctrl-C before it has
come to our first line. (Failed films, for which 1 stands as well, are counted one by one.)"""

console = Console(stderr=True, highlight=False)


@dataclass(frozen=True)
class Plan:
    """One run."""

    number: int
    command: str
    harm: str
    times: int
    seed: str


@dataclass
class Record:
    """What came of it: `lost` inputs without a result or vector, `doubled` ones with two, `wrong` ones with another answer than undisturbed."""

    plan: Plan
    lost: int = 0
    doubled: int = 0
    wrong: int = 0
    failed: int = 0
    attempts: int = 0
    struck: int = 0
    seconds: float = 0.0
    exits: list[int] = field(default_factory=list)
    troubles: list[str] = field(default_factory=list)

    @property
    def fine(self) -> bool:
        """Nothing to say against it."""
        return not (self.lost or self.doubled or self.wrong or self.failed or self.troubles)


@dataclass
class World:
    """Servers that outlive a run, the archive, and what undisturbed commands make of it."""

    folder: Path
    films: Sequence[Film]
    triton: Service
    triton_port: int
    gallery: Path
    manifest: Path
    expected: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    asked_bytes: dict[str, int] = field(default_factory=dict)

    @property
    def archive(self) -> Path:
        """Folder of the films."""
        return self.films[0].path.parent


@contextmanager
def world(films: int, commands: Sequence[str] = COMMANDS, *, instant: bool = False) -> Generator[World]:
    """Starts Triton, fills a gallery, and runs each command once undisturbed.

    Args:
        instant: Networks that answer at once instead of the small ones: many more runs in an hour, hardly a request in flight when a harm comes.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cxr-chaos-")))
        networks = ["--repository", str(instant_repository(folder / "networks"))] if instant else []
        triton, port = triton_service(folder / "triton", "--segmentation", "student", *networks)
        stack.enter_context(triton)
        archive = make_archive(folder / "archive", films)
        made = World(folder, archive, triton, port, folder / "gallery.db", write_manifest(folder / "archive.csv", archive))
        cases = write_manifest(folder / "cases.csv", make_archive(folder / "cases", 30, seed=7, variants=3))
        milvus, milvus_port = milvus_service(folder / "milvus", made.gallery)
        with milvus:
            filling = Client.start(
                folder / "filling",
                "",
                "ingest",
                "--manifest",
                cases,
                "--triton",
                f"127.0.0.1:{port}",
                "--milvus",
                f"http://127.0.0.1:{milvus_port}",
                "--no-gate",
            )
            assert filling.process.wait(240) == 0, (filling.folder / "client.err").read_text()
        for command in commands:
            record, found = run_one(made, Plan(-1, command, "none", 0, command))
            assert record.exits == [0], record
            made.expected[command] = found
        yield made


def plans(runs: int, seed: int, commands: Sequence[str] = COMMANDS) -> list[Plan]:
    """Every harm with every command that it can meet, in an order and, beyond their number, a choice that the seed draws."""
    dice = random.Random(seed)
    every = [(command, harm) for harm in HARMS for command in commands if _applies(command, harm)]
    chosen: list[tuple[str, str]] = []
    while len(chosen) < runs:
        dice.shuffle(every)
        chosen += _spread(every)
    return [Plan(number, command, harm, dice.randint(1, 3), f"{seed}-{number}") for number, (command, harm) in enumerate(chosen[:runs])]


def _applies(command: str, harm: str) -> bool:
    if harm == DISK_FULL:
        return command != "ingest" and is_root()  # an ingest keeps its books in the gallery
    return command != "embed" or not harm.startswith("milvus")


def _spread(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Each harm once before any comes again."""
    by_harm: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for pair in pairs:
        by_harm[pair[1]].append(pair)
    rounds = max(map(len, by_harm.values()))
    return [pairs[i] for i in range(rounds) for pairs in by_harm.values() if i < len(pairs)]


def run_one(world: World, plan: Plan) -> tuple[Record, Any]:
    """One command, harmed as planned and given again until it ends well; then what it left is compared with the undisturbed run's."""
    dice = random.Random(plan.seed)
    record, mark, started = Record(plan), uuid.uuid4().hex, time.monotonic()
    folder = world.folder / f"run-{plan.number}-{plan.command}"
    shutil.rmtree(folder, ignore_errors=True)
    results = folder / "results"
    with ExitStack() as stack:
        gallery = folder / "gallery.db"
        if plan.command != "ingest":
            copy_folder(world.gallery, gallery)
        milvus, milvus_port = milvus_service(folder / "milvus", gallery)
        stack.enter_context(milvus)
        to_triton = stack.enter_context(Proxy(free_port(), world.triton_port))
        to_milvus = stack.enter_context(Proxy(free_port(), milvus_port))
        disk = stack.enter_context(Disk(results)) if plan.harm == DISK_FULL else None
        if disk is not None:
            disk.mount(4096 * round(dice.uniform(0.1, 0.9) * world.sizes[plan.command] / 4096))
        arguments = _arguments(world, plan.command, results, to_triton.port, to_milvus.port)
        left, begun = plan.times, started
        while record.attempts < ATTEMPTS and (not record.exits or record.exits[-1] != 0):
            record.attempts += 1
            client = Client.start(folder, mark, *arguments)
            scene = Scene(client, world.triton, milvus, to_triton, to_milvus, dice, disk)
            begun = time.monotonic()
            moment = _moment(world, plan, dice, to_triton)
            while client.process.poll() is None:
                if left and plan.harm != DISK_FULL and moment():
                    left -= 1
                    record.struck += 1
                    HARMS[plan.harm](scene)
                    moment = _moment(world, plan, dice, to_triton)
                if time.monotonic() > begun + ATTEMPT_S:
                    record.troubles.append(f"attempt {record.attempts} did not end in {ATTEMPT_S:g} s")
                    client.process.kill()
                time.sleep(0.01)
            record.exits.append(client.process.returncode)
            to_triton.resume()
            to_milvus.resume()
            if disk is not None and record.exits[-1] != 0:
                record.struck += 1
                disk.grow()
        world.asked_bytes.setdefault(plan.command, to_triton.passed_bytes)
        world.seconds.setdefault(plan.command, time.monotonic() - begun)
        world.sizes.setdefault(plan.command, sum(path.stat().st_size for path in results.glob("*")) if results.is_dir() else 0)
        found = _look(world, plan, record, results, milvus, milvus_port)
        record.troubles += _remains(folder, results, mark)
    record.seconds = time.monotonic() - started
    if record.fine:
        shutil.rmtree(folder, ignore_errors=True)
    return record, found


def _moment(world: World, plan: Plan, dice: random.Random, to_triton: Proxy) -> Callable[[], bool]:
    """When the next harm strikes: once so many bytes more have gone to and from Triton, of those that the whole takes; or while a client starts."""
    if dice.random() < START_SHARE:
        at = time.monotonic() + dice.uniform(0, START_S)
        return lambda: time.monotonic() >= at
    passed = to_triton.passed_bytes + dice.uniform(0, 0.8) * max(0, world.asked_bytes.get(plan.command, 0) - to_triton.passed_bytes)
    return lambda: to_triton.passed_bytes > passed


def _arguments(world: World, command: str, results: Path, triton: int, milvus: int) -> list[str | Path]:
    servers: list[str | Path] = [
        "--triton",
        f"127.0.0.1:{triton}",
        "--timeout",
        str(TIMEOUT_S),
        "--patience",
        "60",
        "--no-gate",
    ]  # any networks
    store: list[str | Path] = ["--milvus", f"http://127.0.0.1:{milvus}"]
    if command == "ingest":
        return ["ingest", "--manifest", world.manifest, *servers, *store]
    return ["batch", world.archive, "--out", results / "results.jsonl", *servers, *(["--embed-only"] if command == "embed" else store)]


def _look(world: World, plan: Plan, record: Record, results: Path, milvus: Service, port: int) -> Any:
    """Counts losses, doubles and wrong answers; returns what was found, by input."""
    if record.exits[-1:] != [0]:
        record.troubles.append(f"it never ended well: {record.exits}; {(results.parent / 'client.err').read_text(errors='replace')[-600:]}")
    record.troubles += [f"exit code {code}" for code in record.exits if code not in _FINE]
    words = (results.parent / "client.err").read_text(errors="replace")
    stacks = [stack for stack in words.split("Traceback")[1:] if "KeyboardInterrupt" not in stack or "/cxr_retrieval/" in stack]
    record.troubles += [f"Traceback{stack[:2000]}" for stack in stacks[:1]]
    if plan.command == "ingest":
        return _look_at_gallery(world, plan, record, milvus, port)
    lines: list[dict[str, Any]] = []
    for line in (results / "results.jsonl").read_bytes().splitlines() if (results / "results.jsonl").is_file() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            record.troubles.append(f"no JSON: {line[:80]!r}")
    count = Counter(str(line["input"]) for line in lines)
    record.lost = sum(str(film.path) not in count for film in world.films)
    record.doubled = sum(n - 1 for n in count.values())
    record.failed = sum(line["status"] != "answered" for line in lines)
    found = {str(line["input"]): line for line in lines if line["status"] == "answered"}
    if expected := world.expected.get(plan.command):
        same = _same_embedding if plan.command == "embed" else _same_answer
        record.wrong = sum(not same(line, expected[name]) for name, line in found.items())
    return found


def _same_answer(line: dict[str, Any], expected: dict[str, Any]) -> bool:
    first, other = line["neighbours"][0], expected["neighbours"][0]
    return line["prediction"]["label"] == expected["prediction"]["label"] and (
        first["image_id"] == other["image_id"] or abs(first["similarity"] - other["similarity"]) < 1 - NEAR
    )


def _same_embedding(line: dict[str, Any], expected: dict[str, Any]) -> bool:
    return all(float(np.dot(line[part], expected[part])) > NEAR for part in ("embedding", "appearance"))


def _look_at_gallery(world: World, plan: Plan, record: Record, milvus: Service, port: int) -> Any:
    """As it is, and as it is once Milvus has been killed and has read it from disk again."""
    keys, vectors = stored_vectors(port)
    if plan.number >= 0:
        milvus.kill()
        milvus.bring_back()
        again, _ = stored_vectors(port)
        if again != keys:
            record.troubles.append(f"{len(keys)} rows before, {len(again)} after a kill of Milvus when all was done")
    count = Counter(keys)
    expected: dict[str, Any] = world.expected.get("ingest") or dict(zip(keys, vectors, strict=True))
    record.lost = len(world.films) - len(count) if plan.number < 0 else sum(key not in count for key in expected)
    record.doubled = sum(n - 1 for n in count.values())
    found = dict(zip(keys, vectors, strict=True))
    record.wrong = sum(key not in expected or float(found[key] @ expected[key]) <= NEAR for key in found)
    return found


def _remains(folder: Path, results: Path, mark: str) -> list[str]:
    """What should not be there any more."""
    deadline = time.monotonic() + 5
    while (alive := running_with(mark)) and time.monotonic() < deadline:
        time.sleep(0.1)
    found = [f"still running: {one}" for one in alive]
    found += [f"left behind: {path.name}" for path in (folder / "home" / "tmp").glob("*")]
    wanted = {"results.jsonl", "results.jsonl.journal"}
    found += [f"left behind: {path.name}" for path in results.glob("*") if path.name not in wanted]
    return found


def run_all(world: World, chosen: Sequence[Plan], tell: Callable[[Record], None]) -> list[Record]:
    """One after the other."""
    records: list[Record] = []
    for plan in chosen:
        records.append(run_one(world, plan)[0])
        tell(records[-1])
    return records


def summary(records: Sequence[Record], films: int) -> dict[str, Any]:
    """By harm, and in all."""
    rows: dict[str, dict[str, int]] = defaultdict(
        lambda: dict.fromkeys(("runs", "struck", "commands", "lost", "doubled", "wrong", "failed", "troubles"), 0)
    )
    for record in records:
        for row in (rows[record.plan.harm], rows["all"]):
            row["runs"] += 1
            row["struck"] += record.struck
            row["commands"] += record.attempts
            for name in ("lost", "doubled", "wrong", "failed"):
                row[name] += getattr(record, name)
            row["troubles"] += len(record.troubles)
    return {
        "films": films,
        "seconds": round(sum(record.seconds for record in records)),
        "harms": {name: rows[name] for name in (*HARMS, "all") if name in rows},
    }


def show(record: Record) -> None:
    """One line on stderr; all of it where something is wrong."""
    plan = record.plan
    console.print(
        f"{plan.number:3d} {plan.command:6} {plan.harm:20} struck {record.struck} of {plan.times}, given {record.attempts} times {record.exits}, "
        f"{record.seconds:.0f} s"
        + ("" if record.fine else f"  [red]lost {record.lost} doubled {record.doubled} wrong {record.wrong} failed {record.failed}")
    )
    for trouble in record.troubles:
        console.print(f"      {trouble}", markup=False)


def main() -> None:
    """The long form."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--films", type=int, default=300)
    parser.add_argument("--instant", action="store_true", help="networks that answer at once")
    parser.add_argument("--only", type=int, nargs="*", help="numbers of single runs")
    parser.add_argument("--harm", help="only harms whose name contains this")
    parser.add_argument("--json", type=Path, default=Path("runs/chaos.json"), help="where the figures go")
    asked = parser.parse_args()
    chosen = [plan for plan in plans(asked.runs, asked.seed) if asked.harm is None or asked.harm in plan.harm]
    chosen = [plan for plan in chosen if not asked.only or plan.number in asked.only]
    console.print(f"seed {asked.seed}, {len(chosen)} runs over {asked.films} films")
    with world(asked.films, instant=asked.instant) as made:
        console.print("undisturbed: " + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in made.seconds.items()))
        records = run_all(made, chosen, show)
        triton = made.triton
    left = triton.left_behind()
    found: dict[str, Any] = {**summary(records, asked.films), "seed": asked.seed, "left_by_triton": left}
    table = Table("harm", "runs", "struck", "commands", "lost", "doubled", "wrong", "failed", "other trouble")
    for name, row in found["harms"].items():
        table.add_row(name, *map(str, row.values()))
    Console(width=140).print(table)
    asked.json.parent.mkdir(parents=True, exist_ok=True)
    asked.json.write_text(json.dumps(found | {"records": [asdict(record) for record in records]}, indent=2) + "\n")
    if left or not all(record.fine for record in records):
        console.print(f"left by Triton: {left}")
        sys.exit(1)


if __name__ == "__main__":
    main()
