"""`cxr ingest`: reads its options, calls the library, prints."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cxr_retrieval.cli import options
from cxr_retrieval.cli.console import INTERRUPTED, print_json, print_problems, until_interrupted
from cxr_retrieval.cli.watched import Watched, first_contact
from cxr_retrieval.errors import UsageError
from cxr_retrieval.settings import MilvusSettings, TritonSettings

if TYPE_CHECKING:
    from cxr_retrieval.cases.manifest import ManifestRow


@options.with_servers
def ingest(
    triton: TritonSettings,
    milvus: MilvusSettings,
    seen: Watched,
    manifest: Annotated[Path, typer.Option(help="CSV with image_id,path,label and any clinical columns.")],
    paths: Annotated[
        list[Path] | None, typer.Argument(metavar="[PATH]...", help="Only rows whose file is, or lies under, one of these.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Only rows of this split; without it all but 'extra'.")] = None,
    prune: Annotated[
        bool, typer.Option("--prune", help="Then remove the cases of the manifest's sources that it no longer lists, and log that.")
    ] = False,
    patience: options.Patience = options.PATIENCE_DEFAULT,
    audit: options.Audit = options.AUDIT_DEFAULT,
    json: options.Json = False,
) -> None:
    """Embed confirmed cases and keep them, with their clinical facts. Repeat it at will: only what changed is done again."""
    from cxr_retrieval.archive import embedding
    from cxr_retrieval.archive.audit import audited
    from cxr_retrieval.archive.patience import Patience
    from cxr_retrieval.cases.manifest import read_manifest
    from cxr_retrieval.gallery.store import LITE_COMFORTABLE_ROWS, Store, case_key
    from cxr_retrieval.inference.triton import TritonClient
    from cxr_retrieval.radiograph.decoding import FilmReader

    listed = read_manifest(manifest)
    rows = _under(listed.require(split=split), paths or [])
    gone: Sequence[str] = ()
    with ExitStack() as opened:
        with until_interrupted() as stop:
            reader = opened.enter_context(FilmReader())
            wait = Patience(stop, patience, seen.tell, seen.watch)
            client = opened.enter_context(first_contact(wait, "triton", lambda: TritonClient(triton)))
            store = opened.enter_context(first_contact(wait, "milvus", lambda: Store(milvus, client.model_version, create=True)))
            with seen.bar("ingesting", len(rows)) as advance:
                report = embedding.ingest(
                    rows, reader, client, store, advance, stop=stop, tell=seen.tell, watch=seen.watch, patience_s=patience
                )
        if prune and not report.pending:
            with audited(audit.expanduser(), "ingest --prune", listed.path.name) as removed:
                gone = store.prune({case_key(row.image_id) for row in listed.rows}, {row.source for row in listed.rows})
                removed[store.collection] = gone
        total = store.count()
        version, collection = client.model_version, store.collection
    if seen.speaks:
        print_problems(report.problems)
    if json:
        print_json(
            {
                "model_version": version,
                "collection": collection,
                "stored": report.stored,
                "corrected": report.corrected,
                "unchanged": report.unchanged,
                "pruned": len(gone),
                "failed": [{"image_id": problem.image_id, "error": str(problem.error)} for problem in report.problems],
                "gallery": total,
            }
        )
    else:
        counts = {"corrected": report.corrected, "pruned": len(gone)}
        further = "".join(f", {count} {name}" for name, count in counts.items() if count)
        typer.echo(
            f"{report.stored} stored, {report.unchanged} unchanged, {len(report.problems)} failed{further}; the gallery holds {total} cases"
        )
    if total > LITE_COMFORTABLE_ROWS and milvus.is_lite:
        seen.tell(f"Milvus Lite gets slow beyond {LITE_COMFORTABLE_ROWS} cases: consider a Milvus server")
    if report.pending:
        seen.tell(f"interrupted, {report.pending} to go. Next: give the same command again, it goes on from here")
        raise typer.Exit(INTERRUPTED)
    if report.problems:
        raise typer.Exit(1)


def _under(rows: Sequence[ManifestRow], paths: Sequence[Path]) -> Sequence[ManifestRow]:
    if not paths:
        return rows
    roots = [path.resolve() for path in paths]
    chosen = {root: [row for row in rows if row.path.resolve() == root or root in row.path.resolve().parents] for root in roots}
    for root, matching in chosen.items():
        if not matching:
            raise UsageError(
                f"{root}: no row of the manifest lies there", expected="a listed file, or a folder above one", next_step="correct the path"
            )
    wanted = {row.image_id for matching in chosen.values() for row in matching}
    return [row for row in rows if row.image_id in wanted]
