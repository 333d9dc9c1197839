"""A node's rate: films received, and answered, by `cxr listen`, beside what the same `storescu` takes to put them into Orthanc alone."""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import psutil

from chaos.instant import instant_repository
from chaos.soak import counted
from chaos.world import Client, make_archive, milvus_service, triton_service, write_manifest
from pacs.peers import dcmtk, instances, orthanc
from tests_support import free_ports

FILMS: Final = 60
ROUNDS: Final = 3
AT_ONCE: Final = 4
"""Modalities that send, each its share."""


def measure_node(networks: str) -> dict[str, Any]:
    """Seconds for `FILMS` films of full size, in turns, medians: into Orthanc alone; confirmed by the node; answered into the results; and with
    report and picture back in Orthanc.

    Args:
        networks: "student", or "instant" ones that cost nothing, so that what is left is the node's own.
    """
    seconds: dict[str, list[float]] = defaultdict(list)
    (port,) = free_ports(1)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cxr-node-")))
        served = (
            ("--segmentation", "student")
            if networks == "student"
            else ("--repository", str(instant_repository(folder / "repository")), "--precision", "fp32")
        )
        triton, triton_port = triton_service(folder / "triton", *served)
        stack.enter_context(triton)
        milvus, milvus_port = milvus_service(folder / "milvus", folder / "gallery.db")
        stack.enter_context(milvus)
        servers = ["--triton", f"127.0.0.1:{triton_port}", "--milvus", f"http://127.0.0.1:{milvus_port}"]
        cases = write_manifest(folder / "cases.csv", make_archive(folder / "cases", 30, variants=1))
        filling = Client.start(folder / "filling", "", "ingest", "--no-gate", "--manifest", cases, *servers)
        assert filling.process.wait(240) == 0, (folder / "filling" / "client.err").read_text()
        archive = stack.enter_context(orthanc(folder / "orthanc"))
        answers = {"results": "", "objects": 'to = ["archive"]'}
        for turn in range(ROUNDS):
            for name, to in answers.items():
                films = instances(folder / f"films-{turn}-{name}", FILMS, scaled=1)
                before = archive.statistics()["CountInstances"]
                seconds["orthanc"].append(_sent(archive.aet, archive.port, films))
                assert archive.statistics()["CountInstances"] == before + FILMS
                work = folder / f"node-{turn}-{name}"
                work.mkdir()
                destination = f'[destinations.archive]\naet = "{archive.aet}"\nhost = "127.0.0.1"\nport = {archive.port}\n'
                (work / "rules.toml").write_text(f'{destination}[[rules]]\nname = "all"\ngate = false\n{to}\n')
                listening = ["listen", "--out", work / "results.jsonl", "--spool", work / "spool", "--port", f"{port}"]
                client = Client.start(work / "client", "", *listening, "--rules", work / "rules.toml", *servers)
                try:
                    _first_answer(port, instances(work / "first", 1)[0], work / "results.jsonl")
                    began = time.monotonic()
                    seconds[f"{name}: confirmed"].append(_sent("CXR", port, films))
                    done = counted(work / "results.jsonl")
                    while done() < FILMS + 1:
                        time.sleep(0.02)
                    seconds[f"{name}: answered"].append(time.monotonic() - began)
                    if to:
                        while archive.statistics()["CountInstances"] < before + FILMS + 2 * (FILMS + 1):
                            time.sleep(0.05)
                        seconds[f"{name}: delivered"].append(time.monotonic() - began)
                finally:
                    client.process.terminate()
                    with contextlib.suppress(psutil.Error):
                        client.process.wait(60)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "networks": networks,
        "films": FILMS,
        "senders": AT_ONCE,
        "per_second": {name: round(FILMS / value, 1) for name, value in medians.items()},
        "of_orthanc": {name: round(medians["orthanc"] / value, 3) for name, value in medians.items() if name != "orthanc"},
        "rounds": {name: [round(value, 2) for value in values] for name, values in seconds.items()},
    }


def _sent(aet: str, port: int, films: list[Path]) -> float:
    """Seconds until all are confirmed."""
    began = time.monotonic()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        shares = [films[number::AT_ONCE] for number in range(AT_ONCE)]
        for done in pool.map(lambda share: dcmtk("storescu", "-aec", aet, "127.0.0.1", port, *share, timeout=600), shares):
            assert done.returncode == 0, done.stderr
    return time.monotonic() - began


def _first_answer(port: int, film: Path, results: Path) -> None:
    """Waits until the node answers."""
    while dcmtk("echoscu", "-aec", "CXR", "127.0.0.1", port).returncode:
        time.sleep(0.1)
    assert dcmtk("storescu", "-aec", "CXR", "127.0.0.1", port, film).returncode == 0
    while not results.is_file() or not results.stat().st_size:
        time.sleep(0.05)
