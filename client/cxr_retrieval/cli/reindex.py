"""`cxr reindex`: reads its options, calls the library, prints."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from cxr_retrieval.cli import options
from cxr_retrieval.cli.console import INTERRUPTED, print_json, print_problems, results
from cxr_retrieval.cli.watched import Watched, first_contact
from cxr_retrieval.errors import InputError
from cxr_retrieval.interruption import until_interrupted
from cxr_retrieval.settings import MilvusSettings, PseudonymSettings, TritonSettings

if TYPE_CHECKING:
    from cxr_retrieval.archive.embedding import Problem


@options.with_servers
def reindex(
    triton: TritonSettings,
    milvus: MilvusSettings,
    pseudonyms: PseudonymSettings,
    seen: Watched,
    former: Annotated[
        str | None,
        typer.Option("--from", metavar="VERSION", help="Version whose gallery is carried over.", show_default="what alias cxr points to"),
    ] = None,
    compare: Annotated[
        Path | None, typer.Option(metavar="MANIFEST", help="Compare both versions on these films.", show_default="a sample of the gallery")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Of --compare: only rows of this split; without it all but 'extra'.")] = None,
    former_triton: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Of --compare: serves the former version, for films its gallery lacks.")
    ] = None,
    sample: Annotated[int, typer.Option(min=0, help="Cases of the gallery to compare on, each without its own patient's; 0: none.")] = 1000,
    top_k: Annotated[int, typer.Option(min=1, max=1000, help="Neighbours that vote, and that are compared.")] = 10,
    switch: Annotated[bool, typer.Option("--switch", help="Then point the alias cxr at the new gallery.")] = False,
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Let the new gallery answer without the cases that cannot be embedded again.")
    ] = False,
    patience: options.Patience = options.PATIENCE_DEFAULT,
    audit: options.Audit = options.AUDIT_DEFAULT,
    json: options.Json = False,
) -> None:
    """Fill the gallery of another model version from the present one, which answers meanwhile; compare the two; switch.

    Give the Triton that serves the new weights. Kill it at will: the same command goes on. `cxr gallery use VERSION` switches back.
    """
    from cxr_retrieval.archive import reindex as library
    from cxr_retrieval.archive.audit import audited
    from cxr_retrieval.archive.patience import Patience
    from cxr_retrieval.cases.manifest import read_manifest
    from cxr_retrieval.cases.pseudonyms import open_pseudonyms
    from cxr_retrieval.gallery.aliases import the_version, use_gallery
    from cxr_retrieval.gallery.spaces import FILM
    from cxr_retrieval.gallery.store import Store
    from cxr_retrieval.inference.triton import TritonClient
    from cxr_retrieval.radiograph.decoding import FilmReader

    rows = read_manifest(compare).require(split=split) if compare else ()
    compared: dict[str, Any] | None = None
    problems: tuple[Problem, ...] = ()
    with ExitStack() as opened, until_interrupted() as stop:
        reader = opened.enter_context(FilmReader())
        wait = Patience(stop, patience, seen.tell, seen.watch)
        client = opened.enter_context(first_contact(wait, "triton", lambda: TritonClient(triton)))
        other = opened.enter_context(TritonClient(replace(triton, url=former_triton))) if former_triton else None
        keys = opened.enter_context(open_pseudonyms(pseudonyms))
        version = former or first_contact(wait, "milvus", lambda: the_version(milvus))
        about = {"model_version": client.model_version, "from": version}
        operation = opened.enter_context(audited(audit.expanduser(), "reindex", about))
        with (
            Store(milvus, version, keys, outdated=True, space=FILM) as old,
            Store(milvus, client.model_version, keys, fill=True, beside=old, expected=old.count(), by_source=old.by_source) as new,
        ):
            with seen.bar("embedding anew", None) as bar:
                report = library.reindex(
                    old,
                    new,
                    reader,
                    client,
                    begun=lambda total: bar.describe("embedding anew", total),
                    advance=bar.advance,
                    stop=stop,
                    tell=seen.tell,
                    watch=seen.watch,
                    patience_s=patience,
                )
            if not report.interrupted and rows:
                with seen.bar("comparing", len(rows)) as bar:
                    compared, problems = library.compare_on_manifest(rows, old, new, reader, client, other, bar.advance, k=top_k)
            elif not report.interrupted and sample:
                compared = library.compare_on_gallery(old, new, sample=sample, k=top_k)
            ready = report.is_whole or (allow_missing and not report.interrupted)
            if ready:
                new.filled()
        if switch and ready:
            use_gallery(milvus, client.model_version)
        result = {
            **about,
            **{name: getattr(report, name) for name in ("cases", "embedded", "corrected", "kept", "removed", "interrupted")},
            "missing": [{"key": problem.image_id, "error": str(problem.error)} for problem in report.problems],
            "answers": ready,
            "switched": switch and ready,
            "comparison": compared,
        }
        operation.outcome.update({**result, "missing": [problem.image_id for problem in report.problems]})
    if seen.speaks:
        print_problems([*report.problems, *problems])
    if json:
        print_json(result)
    else:
        _print(result)
    if report.interrupted:
        seen.tell("interrupted. Next: give the same command again, it goes on from here")
        raise typer.Exit(INTERRUPTED)
    if report.problems:
        raise InputError(
            f"{len(report.problems)} cases cannot be embedded again",
            got="the new gallery answers without them" if ready else "the new gallery does not answer yet",
            next_step="ingest them again into the former gallery, remove them, or give --allow-missing",
        )


def _print(result: dict[str, Any]) -> None:
    done = ", ".join(f"{result[name]} {name}" for name in ("embedded", "corrected", "kept", "removed") if result[name])
    missing = f", {len(result['missing'])} missing" if result["missing"] else ""
    state = "the gallery from now on" if result["switched"] else "answers" if result["answers"] else "does not answer yet"
    typer.echo(f"{result['from']} → {result['model_version']}: {result['cases']} cases, {done or 'nothing to do'}{missing}; {state}")
    if compared := result["comparison"]:
        table = Table("", "former", "new", box=None, header_style="dim", pad_edge=False)
        for at in compared["former"]["recall_at"]:
            table.add_row(f"recall@{at}", *(f"{compared[side]['recall_at'][at]:.3f}" for side in ("former", "latter")))
        table.add_row("accuracy of the vote", *(f"{compared[side]['accuracy']:.3f}" for side in ("former", "latter")))
        console = results()
        console.print(f"{compared['queries']} queries over {compared['gallery']} cases, k = {compared['k']}")
        console.print(table)
        votes, kept = compared["votes"], compared["kept"]
        console.print(f"votes that change: {votes['changed']}; {votes['become_right']} become right, {votes['were_right']} were right")
        console.print(f"neighbours kept: {kept['neighbours']:.1%}; the nearest one in {kept['nearest']:.1%} of the queries")
