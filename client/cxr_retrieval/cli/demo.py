"""`cxr demo`: reads its options, calls the library, prints."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from cxr_retrieval.cli import options
from cxr_retrieval.cli.console import print_json, print_problems, progress, talk
from cxr_retrieval.cli.query import print_result
from cxr_retrieval.errors import SetupError
from cxr_retrieval.settings import MilvusSettings, PseudonymSettings, TritonSettings

_PER_CLASS = 12
_QUERY_SEED, _QUERY_LABEL = 1001, "covid19"


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the synthetic gallery, the picture and the page.")] = Path("cxr-demo"),
    repository: options.Repository = None,
    json: options.Json = False,
) -> None:
    """Show the whole path on synthetic radiographs: serve, ingest, query, picture, page; then stop everything."""
    from cxr_retrieval.archive import embedding
    from cxr_retrieval.cases.manifest import read_manifest
    from cxr_retrieval.cases.pseudonyms import open_pseudonyms
    from cxr_retrieval.gallery.store import Store
    from cxr_retrieval.inference.triton import TritonClient
    from cxr_retrieval.locations import default_repository
    from cxr_retrieval.radiograph.decoding import FilmReader
    from cxr_retrieval.radiograph.phantoms import PHANTOM_LABELS, PhantomLabel, make_phantom, write_dicom, write_phantoms
    from cxr_retrieval.retrieval.picture import write_html, write_montage
    from cxr_retrieval.retrieval.query import query
    from cxr_retrieval.serving.server import ServerOptions, embedded_triton

    console = talk()
    console.print(
        Text.assemble(("cxr-retrieval demo", "bold"), " on synthetic phantoms: no patient is shown. Research use only, not for diagnosis.")
    )
    manifest, image = out / "gallery" / "manifest.csv", out / "query.dcm"
    if not manifest.is_file():
        wanted: list[tuple[int, PhantomLabel]] = [(seed, label) for label in PHANTOM_LABELS for seed in range(_PER_CLASS)]
        phantoms = []
        with progress("drawing phantoms", len(wanted)) as advance:
            for seed, label in wanted:
                phantoms.append(make_phantom(seed, label))
                advance(1)
        write_phantoms(manifest.parent, phantoms)
    write_dicom(make_phantom(_QUERY_SEED, _QUERY_LABEL), image)
    rows = read_manifest(manifest).rows
    console.print("starting Triton with the ensemble …")
    with ExitStack() as stack:
        server_options = ServerOptions(repository or default_repository(), grpc_port=0, http_port=0, metrics_port=0)
        server = stack.enter_context(embedded_triton(server_options))
        reader = stack.enter_context(FilmReader())
        client = stack.enter_context(TritonClient(TritonSettings(server.grpc)))
        keys = stack.enter_context(open_pseudonyms(PseudonymSettings(out / "pseudonym.key"), create=True))
        store = stack.enter_context(Store(MilvusSettings(str(out / "gallery.db")), client.model_version, keys, create=True))
        with progress("ingesting", len(rows)) as advance:
            report = embedding.ingest(rows, reader, client, store, advance)
        print_problems(report.problems)
        if report.problems:
            raise SetupError("the demo gallery is damaged", next_step=f"remove {out} and run the demo again")
        result = query(image, reader, client, store)
        write_montage(result, out / "query.png", reader, store.thumbnails)
        write_html(result, out / "query.html", reader, store.thumbnails)
    console.print(
        f"The query was drawn as {_QUERY_LABEL}. The shipped weights learnt from real radiographs, never from phantoms: "
        "this shows the path, not how well they tell diseases apart."
    )
    if json:
        print_json(result.as_json())
    else:
        print_result(result, image.name)
    console.print(f"picture  {(out / 'query.png').resolve()}\npage     {(out / 'query.html').resolve()}", soft_wrap=True)
    command = sys.argv[0]
    console.print(
        f"\nTo open this gallery in a browser, and drop {image} on it:\n"
        f"  {command} serve --store {out / 'gallery.db'} &\n  {command} view --pseudonym-key {out / 'pseudonym.key'}     http://127.0.0.1:8080/",
        soft_wrap=True,
    )
