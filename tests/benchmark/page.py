"""How long the page of `cxr view` adds to an answer: from a film being chosen to its neighbours drawn, in Chromium."""

from __future__ import annotations

import hashlib
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from galleries import synthetic_embeddings, synthetic_entries
from playwright.sync_api import sync_playwright

from cxr_retrieval.cases.manifest import read_manifest
from cxr_retrieval.cases.pseudonyms import Original, Pseudonyms, open_pseudonyms
from cxr_retrieval.gallery.store import Entry, Store
from cxr_retrieval.inference.triton import TritonClient
from cxr_retrieval.locations import default_repository
from cxr_retrieval.radiograph.phantoms import make_phantom, write_dicom, write_gallery
from cxr_retrieval.serving.server import ServerOptions, embedded_milvus, embedded_triton
from cxr_retrieval.settings import MilvusSettings, PseudonymSettings, TritonSettings

CASES: Final = 10_000
ASKED: Final = 12
_PICTURES: Final = 24
_WATCH: Final = """() => { window.seen = {};
const look = () => {
  const seen = window.seen, cards = document.querySelectorAll('.found .card').length;
  if (!seen.chosen || location.hash === seen.before || cards !== 10) return;
  requestAnimationFrame(() => requestAnimationFrame(() => {
    const images = [...document.querySelectorAll('.found .thumb img')];
    seen.cards ??= performance.now();
    if (images.length === 10 && images.every(image => image.complete && image.naturalWidth)) seen.pictures ??= performance.now();
  }));
};
addEventListener('change', event => {
  if (event.target.type === 'file') window.seen = {chosen: performance.now(), before: location.hash};
}, true);
new MutationObserver(look).observe(document.body, {childList: true, subtree: true, attributes: true});
document.addEventListener('load', look, true); }"""
_TOOK: Final = """() => { const of = path => performance.getEntriesByType('resource').filter(e => e.name.endsWith(path)).at(-1).duration;
return {cards: window.seen.cards - window.seen.chosen, pictures: window.seen.pictures - window.seen.chosen,
  upload: of('/api/films'), query: of('/api/queries')}; }"""


def measure_page() -> dict[str, Any]:
    """Medians over films that were never asked about before, in milliseconds, and their ratio."""
    with tempfile.TemporaryDirectory(prefix="cxr-bench-") as name:
        folder = Path(name)
        options = ServerOptions(default_repository(), grpc_port=0, http_port=0, metrics_port=0)
        with (
            embedded_triton(options) as triton,
            embedded_milvus(folder / "gallery.db", "127.0.0.1", 0) as milvus,
            TritonClient(TritonSettings(triton.grpc)) as client,
            open_pseudonyms(PseudonymSettings(folder / "pseudonym.key"), create=True) as pseudonyms,
            Store(MilvusSettings(milvus), client.model_version, pseudonyms, create=True) as store,
        ):
            entries = _with_pictures(synthetic_entries(0, CASES, pseudonyms), folder, pseudonyms)
            vectors = synthetic_embeddings(CASES, seed=1)
            for start in range(0, CASES, 1000):
                some = entries[start : start + 1000]
                store.upsert(some, ["-"] * len(some), list(vectors[start : start + len(some)]))
            store.publish()
            films = [folder / f"film-{number}.dcm" for number in range(ASKED)]
            for number, film in enumerate(films):
                write_dicom(make_phantom(5000 + number, "covid19"), film)
            told = _asked(folder, triton.grpc, milvus, films)
    medians = {name: statistics.median(one[name] for one in told) for name in told[0]}
    api_ms = medians["upload"] + medians["query"]
    return {
        "cases": CASES,
        "api_ms": round(api_ms, 1),
        "neighbours_ms": round(medians["cards"], 1),
        "pictures_ms": round(medians["pictures"], 1),
        "neighbours_over_api": round(statistics.median(one["cards"] / (one["upload"] + one["query"]) for one in told), 3),
        "pictures_over_api": round(statistics.median(one["pictures"] / (one["upload"] + one["query"]) for one in told), 3),
    }


def _with_pictures(entries: Sequence[Entry], folder: Path, pseudonyms: Pseudonyms) -> list[Entry]:
    """The same cases, each with the file of a phantom."""
    rows = read_manifest(write_gallery(folder / "phantoms", _PICTURES // 3)).rows
    files = [(row.path, pseudonyms.digest(hashlib.sha256(row.path.read_bytes()).hexdigest())) for row in rows]
    placed = [(entry, *files[number % len(files)]) for number, entry in enumerate(entries)]
    return [replace(entry, original=Original(entry.original.image_id, path), file=file) for entry, path, file in placed]


def _asked(folder: Path, triton: str, milvus: str, films: Sequence[Path]) -> list[dict[str, float]]:
    command = [str(Path(sys.executable).with_name("cxr")), "view", "--port", "0", "--triton", triton, "--milvus", milvus]
    own = ["--pseudonym-key", str(folder / "pseudonym.key"), "--audit", str(folder / "audit.jsonl")]
    told: list[dict[str, float]] = []
    with subprocess.Popen([*command, *own], stdout=subprocess.PIPE, text=True) as view, sync_playwright() as playwright:
        assert view.stdout is not None
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1366, "height": 768})
        page.goto(view.stdout.readline().strip())
        page.wait_for_selector(".drop")
        page.evaluate(_WATCH)
        for film in films:
            page.evaluate("() => performance.clearResourceTimings()")
            page.set_input_files("input[type=file]", film)
            for _ in range(600):
                if page.evaluate("() => window.seen.pictures !== undefined"):
                    break
                page.wait_for_timeout(50)
            page.wait_for_timeout(1500)  # the film itself and what lies over it
            told.append(page.evaluate(_TOOK))
        browser.close()
        view.terminate()
    return told[2:]  # what is first is slow, everywhere
