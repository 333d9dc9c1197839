"""`cxr query`: reads its options, calls the library, prints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from cxr_retrieval.cli import options
from cxr_retrieval.cli.console import print_json, results, talk
from cxr_retrieval.settings import MilvusSettings, TritonSettings

if TYPE_CHECKING:
    from cxr_retrieval.gallery.store import Neighbour
    from cxr_retrieval.retrieval.query import QueryResult


@options.with_servers
def query(
    triton: TritonSettings,
    milvus: MilvusSettings,
    image: Annotated[Path, typer.Argument(help="A frontal chest radiograph: DICOM, PNG, JPEG or TIFF.")],
    top_k: Annotated[int, typer.Option(min=1, max=1000, help="How many cases to retrieve and let vote.")] = 10,
    where: Annotated[str, typer.Option(metavar="EXPR", help="Only cases that meet this, such as 'age > 60 and went_icu == true'.")] = "",
    json: options.Json = False,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write one self-contained page.")] = None,
    picture: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write one PNG.")] = None,
    patient: Annotated[
        str | None,
        typer.Option(
            metavar="ID", help="The gallery's patient_id of this patient, whose films do not vote.", show_default="DICOM's Patient ID"
        ),
    ] = None,
    include_own: Annotated[
        bool, typer.Option("--include-own", help="Let films of the same patient, and the same picture, vote like any other.")
    ] = False,
    audit: options.Audit = options.AUDIT_DEFAULT,
) -> None:
    """Find the confirmed cases of other patients that look most like one radiograph."""
    from cxr_retrieval.radiograph.decoding import FilmReader

    with FilmReader() as reader:  # first: its workers start while the rest is loaded and connected
        from cxr_retrieval.archive.audit import audited, film_pseudonym
        from cxr_retrieval.gallery.store import Store
        from cxr_retrieval.inference.triton import TritonClient
        from cxr_retrieval.retrieval.picture import write_html, write_montage
        from cxr_retrieval.retrieval.query import query as answer

        with (
            TritonClient(triton) as client,
            Store(milvus, client.model_version) as store,
            audited(audit.expanduser(), "query", {"model_version": client.model_version, "film": film_pseudonym(image)}),
        ):
            result = answer(image, reader, client, store, top_k=top_k, where=where, patient=patient, include_own=include_own)
        if html:
            write_html(result, html, reader)
        if picture:
            write_montage(result, picture, reader)
    if json:
        print_json(result.as_json())
    else:
        print_result(result)
    for path in filter(None, (html, picture)):
        talk().print(f"wrote {path}")


def print_result(result: QueryResult) -> None:
    """The answer as a table on stdout."""
    from cxr_retrieval.retrieval.picture import DISCLAIMER

    console = results()
    shares = ", ".join(f"{label} {share:.0%}" for label, share in result.prediction.scores.items())
    vote = result.prediction
    console.print(Text.assemble((result.image_id, "bold"), ": ", (vote.label, "bold"), f", confidence {vote.confidence:.0%}   ({shares})"))
    console.print(_table(result.neighbours, numbered=True))
    if result.own:
        console.print("earlier films of this patient, or this very picture; not in the vote:", style="bold")
        console.print(_table(result.own, numbered=False))
    for warning in result.warnings:
        console.print(Text.assemble(("warning:", "yellow"), f" {warning}"))
    timings = ", ".join(f"{name} {value:.1f} ms" for name, value in result.timings_ms.items())
    console.print(f"{timings}. Model {result.model_version}. {DISCLAIMER}", style="dim")


def _table(hits: Sequence[Neighbour], *, numbered: bool) -> Table:
    from cxr_retrieval.retrieval.picture import facts_line

    table = Table(box=None, header_style="dim", pad_edge=False)
    for name in ("rank", "image", "similarity", "label"):
        table.add_column(name, no_wrap=True)
    table.add_column("clinical facts")
    for rank, hit in enumerate(hits, start=1):
        shown = (str(rank) if numbered else "–", hit.case.image_id, f"{hit.similarity:.4f}", hit.case.label)
        table.add_row(*shown, facts_line(hit.case.metadata))
    return table
