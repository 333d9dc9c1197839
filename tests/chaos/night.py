"""`make test-night`: the val split as DICOM files with planted identities, answered against the train gallery while Triton is killed three times."""

from __future__ import annotations

import argparse
import csv
import json
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from pymilvus import MilvusClient
from rich.console import Console

from chaos.planted import files_under, planted_elements, planted_film, results_without_input, searched, wire
from chaos.proxy import Proxy
from chaos.soak import counted
from chaos.world import Client, Service, copy_folder, free_port, milvus_service, triton_service
from cxr_retrieval.cases.manifest import ManifestRow, read_manifest
from cxr_retrieval.gallery.balance import DEFAULT_BALANCE, comparable
from cxr_retrieval.radiograph.letterbox import letterbox
from cxr_retrieval.radiograph.reading import read_radiograph
from cxr_retrieval.retrieval.voting import weighted_vote

KILLED_AT: Final = (0.15, 0.4, 0.7)
"""Of the films, when Triton is killed."""
K: Final = 10

console = Console(stderr=True, highlight=False)


@dataclass(frozen=True)
class Asked:
    """What a night is over: `train` and `val` cut the splits (0: whole); `gallery` is a prepared Milvus Lite folder, else one is filled."""

    data: Path
    train: int = 0
    val: int = 0
    gallery: Path | None = None


def night(asked: Asked) -> dict[str, Any]:
    """Runs it in a folder of its own; returns the figures."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cxr-night-")))
        manifest = read_manifest(asked.data / "manifest.csv")
        rows = {split: _spread(manifest.select(split=split), count) for split, count in (("train", asked.train), ("val", asked.val))}
        listed = {split: _manifest(folder / f"{split}.csv", asked.data / "manifest.csv", chosen) for split, chosen in rows.items()}
        films = _films(folder / "ZQXPLANTarchive", rows["val"])
        triton, port = triton_service(folder / "triton")
        stack.enter_context(triton)
        if asked.gallery:
            copy_folder(asked.gallery, folder / "gallery.db")
        milvus, milvus_port = milvus_service(folder / "milvus", folder / "gallery.db")
        stack.enter_context(milvus)
        records = {name: folder / f"wire-{name}" for name in ("triton", "milvus")}
        for record in records.values():
            record.mkdir()
        to_triton = stack.enter_context(Proxy(free_port(), port, records["triton"]))
        to_milvus = stack.enter_context(Proxy(free_port(), milvus_port, records["milvus"]))
        direct = ["--triton", f"127.0.0.1:{port}", "--milvus", f"http://127.0.0.1:{milvus_port}"]
        if not asked.gallery:
            _done(Client.start(folder / "ingest", "", "ingest", "--manifest", listed["train"], "--no-gate", *direct))
        out = folder / "results" / "results.jsonl"
        client = Client.start(
            folder / "batch",
            "",
            *("batch", folder / "ZQXPLANTarchive", "--out", out, "--json", "--no-gate"),  # every film has a label, to be compared
            *("--triton", f"127.0.0.1:{to_triton.port}", "--milvus", f"http://127.0.0.1:{to_milvus.port}"),
        )
        kills = _kill_while(client, out, triton, len(films))
        code = client.process.wait(3600)
        assert code in (0, 1), (client.folder / "client.err").read_text()[-2000:]
        talk = (client.folder / "client.err").read_text()
        found = {
            "films": len(films),
            "gallery": len(rows["train"]),
            "exit": code,
            "triton_killed": kills,
            "waited_for_triton": talk.count("is back after"),
            **_counted(out, films, json.loads((client.folder / "client.out").read_text())),
            "planted_elements_per_film": planted_elements(next(iter(films))),
            **_agreement(folder, out, films, listed, direct, milvus_port),
        }
        found["planted_found"] = searched(
            {
                "results": results_without_input(out),
                "logs": iter(
                    [talk.replace(str(folder / "ZQXPLANTarchive"), "").encode(), triton.log.read_bytes(), milvus.log.read_bytes()]
                ),
                "gallery files": files_under(folder / "gallery.db"),
                "gallery rows": iter([json.dumps(row, default=str).encode() for row in _rows_of(milvus_port)]),
                "client's home": files_under(client.folder / "home"),
                "wire to Triton": wire(records["triton"]),
                "wire to Milvus": wire(records["milvus"]),
            }
        )
        found["wire_bytes"] = {name: sum(path.stat().st_size for path in record.iterdir()) for name, record in records.items()}
    return found


def _spread(rows: tuple[ManifestRow, ...], count: int) -> list[ManifestRow]:
    """So many rows, evenly taken; all where `count` is 0."""
    return list(rows) if not count else [rows[i] for i in np.linspace(0, len(rows) - 1, count).astype(int)]


def _manifest(path: Path, source: Path, rows: list[ManifestRow]) -> Path:
    """The chosen rows of the public manifest as they are, with absolute paths."""
    wanted = {row.image_id: row for row in rows}
    with source.open(newline="") as read, path.open("w", newline="") as written:
        reader = csv.DictReader(read)
        writer = csv.DictWriter(written, reader.fieldnames or ())
        writer.writeheader()
        for line in reader:
            if line["image_id"] in wanted:
                writer.writerow({**line, "path": str(wanted[line["image_id"]].path)})
    return path


def _films(folder: Path, rows: list[ManifestRow]) -> dict[Path, ManifestRow]:
    """The rows' pictures as DICOM, whose squares are those of the originals."""
    folder.mkdir()
    films: dict[Path, ManifestRow] = {}
    for number, row in enumerate(rows):
        original = read_radiograph(row.path)
        film = planted_film(folder, original.pixels, number)
        assert (letterbox(read_radiograph(film).pixels)[0] == letterbox(original.pixels)[0]).all(), film
        films[film] = row
    return films


def _done(client: Client, *codes: int) -> Client:
    code = client.process.wait(7200)
    assert code in (codes or (0,)), (client.folder / "client.err").read_text()[-2000:]
    return client


def _kill_while(client: Client, out: Path, triton: Service, films: int) -> int:
    """kill -9 of Triton as the results grow; it comes back, by itself or by us."""
    done, kills = counted(out), 0
    while client.process.poll() is None and kills < len(KILLED_AT):
        if done() >= KILLED_AT[kills] * films:
            triton.kill()
            kills += 1
            console.print(f"Triton killed, {done()} of {films} answered")
            triton.bring_back()
        time.sleep(0.05)
    return kills


def _counted(out: Path, films: dict[Path, ManifestRow], summary: dict[str, Any]) -> dict[str, Any]:
    lines = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    count = Counter(str(line["input"]) for line in lines)
    return {
        "lost": sum(str(film) not in count for film in films),
        "doubled": sum(n - 1 for n in count.values()),
        "statuses": dict(Counter(line["status"] for line in lines)),
        "seconds": summary["seconds"],
        "per_second": summary["per_second"],
    }


def _agreement(
    folder: Path, out: Path, films: dict[Path, ManifestRow], listed: dict[str, Path], direct: list[str], milvus_port: int
) -> dict[str, Any]:
    """Labels of the batch beside those of `cxr evaluate`, film by film.

    `cxr evaluate` prints figures, not labels: what it computes (exact neighbours of the originals' embeddings, the same vote) is computed here
    from embeddings that the commands give, and must have exactly its accuracy.
    """
    evaluated = _done(
        Client.start(
            folder / "evaluate",
            "",
            *("evaluate", "--gallery", listed["train"], "--queries", listed["val"], "--top-k", str(K), "--json"),
            *direct,
        )
    )
    figures = json.loads((evaluated.folder / "client.out").read_text())["overall"]
    originals = [row.path for row in films.values()]
    lines = folder / "originals.jsonl"
    _done(Client.start(folder / "originals", "", "batch", *originals, "--embed-only", "--out", lines, *direct[:2]), 0, 1)
    embeddings = {
        line["input"]: comparable(np.array([*line["embedding"], *line["appearance"]], np.float32), DEFAULT_BALANCE)
        for line in map(json.loads, lines.open())
        if "embedding" in line
    }
    gallery = _rows_of(milvus_port)
    vectors = comparable(np.array([row["embedding"] for row in gallery], np.float32), DEFAULT_BALANCE)
    labels = [str(row["label"]) for row in gallery]
    evaluate: dict[str, str] = {}
    for film, row in films.items():
        if str(row.path) in embeddings:
            similarity: Any = vectors @ embeddings[str(row.path)]
            nearest = np.argsort(-similarity, kind="stable")[:K]
            evaluate[str(film)] = str(weighted_vote([(labels[i], float(similarity[i])) for i in nearest]).label)
    mine = float(np.mean([evaluate[str(film)] == row.label for film, row in films.items() if str(film) in evaluate]))
    answered = {
        str(line["input"]): line["prediction"]["label"]
        for line in map(json.loads, out.open())
        if line["status"] == "answered" and line["prediction"]["label"] is not None
    }
    compared = evaluate.keys() & answered.keys()
    return {
        "evaluate_accuracy": figures["accuracy"],
        "accuracy_of_the_labels_compared_with": mine,
        "labels_compared": len(compared),
        "labels_equal": sum(evaluate[film] == answered[film] for film in compared),
        "batch_accuracy": float(np.mean([answered[str(film)] == row.label for film, row in films.items() if str(film) in answered])),
    }


def _rows_of(port: int) -> list[dict[str, Any]]:
    """Every case of the gallery, with its embedding."""
    client: Any = MilvusClient(f"http://127.0.0.1:{port}", timeout=60)
    with closing(client):
        name = next(name for name in sorted(client.list_collections()) if name.startswith("cxr_"))
        client.load_collection(name)
        return [dict(row) for row in client.query(name, filter='key != ""', output_fields=["*"], limit=16_384, consistency_level="Strong")]


def main() -> None:
    """All of it, or a rehearsal."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="folder of the public radiographs, with manifest.csv")
    parser.add_argument("--train", type=int, default=0, help="so many gallery films only")
    parser.add_argument("--val", type=int, default=0, help="so many films only")
    parser.add_argument("--gallery", type=Path, help="a Milvus Lite folder that holds the train split already")
    parser.add_argument("--json", type=Path, default=Path("runs/night.json"), help="where the figures go")
    asked = parser.parse_args()
    found = night(Asked(asked.data, asked.train, asked.val, asked.gallery))
    asked.json.parent.mkdir(parents=True, exist_ok=True)
    asked.json.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))
    if found["lost"] or found["doubled"] or any(found["planted_found"].values()) or found["labels_equal"] != found["labels_compared"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
