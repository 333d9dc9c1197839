"""What one film costs in each stage beside the networks: seconds of a core and bytes, as `client/cxr_retrieval/scale/costs.toml` wants them.

Seconds of CPU, not of a clock: other work on the machine hardly moves them.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Final

import imagecodecs
import numpy as np
import psutil
from archive_rate import GALLERY, batch, cpu_s, fill_gallery
from galleries import synthetic_embeddings, synthetic_entries
from numpy.typing import NDArray
from PIL import Image
from pydicom import uid

from chaos.world import make_archive, milvus_service, triton_service
from cxr_retrieval.cases.pseudonyms import open_pseudonyms
from cxr_retrieval.gallery.store import Store
from cxr_retrieval.radiograph.letterbox import letterbox
from cxr_retrieval.radiograph.phantoms import make_phantom
from cxr_retrieval.radiograph.reading import read_radiograph
from cxr_retrieval.retrieval.own import OWN_EXPECTED
from cxr_retrieval.settings import MilvusSettings, PseudonymSettings
from radiograph.test_syntaxes import by_gdcm, by_imagecodecs, by_pydicom
from tests_support import real_milvus

FULL: Final = (3000, 2500)
"""Rows and columns of a detector's film; 12 bits in 16."""
NOISE: Final = 8.0
"""Standard deviation of a detector's noise, in levels of 4096: lossless files come out at about half of their size."""
READS: Final = 5
SIZES: Final = (10_000, 100_000)
SEARCHES: Final = 400
FILMS: Final = 200


def measure_stages() -> dict[str, Any]:
    """Reading by format; a Milvus server by size of its gallery; the files that a batch leaves."""
    return {"reading": reading(), "milvus": milvus(), "batch": files_of_a_batch()}


def full_film(seed: int) -> NDArray[np.uint16]:
    """A phantom of `FULL` pixels and 12 bits, with noise, which no lossless coding makes small."""
    rows, columns = FULL
    large = Image.fromarray(make_phantom(seed, "control").pixels).resize((columns, rows), Image.Resampling.BICUBIC)
    levels = np.asarray(large, np.float32) * 15 + np.random.default_rng(seed).normal(100, NOISE, FULL)
    return np.clip(np.rint(levels), 0, 4095).astype(np.uint16)


def reading() -> dict[str, dict[str, float]]:
    """Seconds of one core from a file's bytes to 256×256, medians, and the file's bytes; the small one is as the archive's bench has it."""
    film = full_film(1)
    ways: dict[str, Callable[[], bytes]] = {
        "dicom": partial(by_pydicom, film, 12, uid.ExplicitVRLittleEndian, "MONOCHROME2"),
        "dicom_jpeg_lossless": partial(by_gdcm, "JPEGLosslessProcess14_1", film, 12, uid.JPEGLosslessSV1, "MONOCHROME2"),
        "dicom_jpeg_ls": partial(by_gdcm, "JPEGLSLossless", film, 12, uid.JPEGLSLossless, "MONOCHROME2"),
        "dicom_jpeg_2000": partial(by_gdcm, "JPEG2000Lossless", film, 12, uid.JPEG2000Lossless, "MONOCHROME2"),
        "dicom_htj2k": partial(by_imagecodecs, _htj2k, film, 12, uid.HTJ2KLossless, "MONOCHROME2"),
        "dicom_rle": partial(by_gdcm, "RLELossless", film, 12, uid.RLELossless, "MONOCHROME2"),
        "png": partial(_encoded, film, "PNG"),
        "jpeg": partial(_encoded, film, "JPEG"),
    }
    found: dict[str, dict[str, float]] = {}
    for name, write in ways.items():
        data = write()
        times = [_cpu_of(lambda data=data: letterbox(read_radiograph(data, "film").pixels)) for _ in range(READS + 1)][1:]
        found[name] = {"core_s": round(statistics.median(times), 4), "bytes": len(data)}
    return found


def _htj2k(film: NDArray[Any]) -> bytes:
    return bytes(imagecodecs.htj2k_encode(film, reversible=True))


def _encoded(film: NDArray[np.uint16], form: str) -> bytes:
    """As radiographs are published: 8 bits."""
    with tempfile.TemporaryFile() as file:
        Image.fromarray((film >> 4).astype(np.uint8)).save(file, form)
        file.seek(0)
        return file.read()


def _cpu_of(call: Callable[[], object]) -> float:
    started = time.process_time()
    call()
    return time.process_time() - started


def milvus() -> list[dict[str, Any]]:
    """A Milvus server's seconds of CPU for a search and for an upserted case (its idle ones taken off), and its bytes, by size of the gallery."""
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cxr-stages-")))
        server = stack.enter_context(real_milvus())
        processes = [psutil.Process(server.server_proc.pid)]
        pseudonyms = stack.enter_context(open_pseudonyms(PseudonymSettings(folder / "pseudonym.key"), create=True))
        store = stack.enter_context(
            Store(MilvusSettings(f"http://127.0.0.1:{server.listen_port}", timeout_s=600), "stages", pseudonyms, create=True)
        )
        held = 0
        for size in SIZES:
            vectors = synthetic_embeddings(size - held, seed=size)
            before = _spent(processes)
            started = time.monotonic()
            for at in range(0, len(vectors), 5000):
                part = vectors[at : at + 5000]
                store.upsert(synthetic_entries(held + at, len(part), pseudonyms), [""] * len(part), part)
            store.publish()
            upserted, took_s = _spent(processes) - before, time.monotonic() - started
            time.sleep(20)  # the index is built and loaded
            idle = _rate_of_idling(processes)
            queries = synthetic_embeddings(SEARCHES, seed=9)
            store.search(queries[0], 10 + OWN_EXPECTED)
            before, started = _spent(processes), time.monotonic()
            for query in queries:
                store.search(query, 10 + OWN_EXPECTED)
            searched = _spent(processes) - before - idle * (time.monotonic() - started)
            rows.append(
                {
                    "cases": size,
                    "search_core_s": round(searched / SEARCHES, 5),
                    "upsert_core_s": round((upserted - idle * took_s) / len(vectors), 6),
                    "idle_cores": round(idle, 3),
                    "memory_bytes": sum(process.memory_info().rss for process in processes),
                    "disk_bytes": {part.name: _bytes_in(part) for part in Path(server.config.base_data_dir, "data").iterdir()},
                }
            )
            held = size
    return rows


def _spent(processes: Sequence[psutil.Process]) -> float:
    return sum(cpu_s(processes).values())


def _rate_of_idling(processes: Sequence[psutil.Process]) -> float:
    """Cores that it uses when nobody asks."""
    before = _spent(processes)
    time.sleep(5)
    return (_spent(processes) - before) / 5


def _bytes_in(folder: Path) -> int:
    """As the disk holds them."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def files_of_a_batch() -> dict[str, float]:
    """Bytes of a film's line among the results, of its row in the journal, and of a case in the local table of pseudonyms; ten neighbours each."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cxr-stages-")))
        make_archive(folder / "archive", FILMS)
        triton, port = triton_service(folder / "triton", "--segmentation", "student")
        stack.enter_context(triton)
        fill_gallery(folder / "gallery.db", f"127.0.0.1:{port}")
        milvus, milvus_port = milvus_service(folder / "milvus", folder / "gallery.db")
        stack.enter_context(milvus)
        out = folder / "results.jsonl"
        servers = ["--triton", f"127.0.0.1:{port}", "--milvus", f"http://127.0.0.1:{milvus_port}"]
        batch(folder / "client", ["batch", folder / "archive", "--no-gate", "--out", out, *servers], FILMS, {})
        lines = out.read_bytes().splitlines()
        return {
            "line_bytes": round(statistics.mean(map(len, lines))),
            "journal_bytes": round(out.with_name(f"{out.name}.journal").stat().st_size / FILMS, 1),
            "pseudonym_bytes": round((folder / "table").stat().st_size / GALLERY, 1),
        }
