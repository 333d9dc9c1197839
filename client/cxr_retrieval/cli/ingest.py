"""`cxr ingest`: reads its options, calls the library, prints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cxr_retrieval.cli import options
from cxr_retrieval.cli.console import print_json, print_problems, progress, talk
from cxr_retrieval.errors import UsageError
from cxr_retrieval.settings import MilvusSettings, TritonSettings

if TYPE_CHECKING:
    from cxr_retrieval.manifest import ManifestRow


def ingest(
    manifest: Annotated[Path, typer.Option(help="CSV with image_id,path,label and any clinical columns.")],
    paths: Annotated[
        list[Path] | None, typer.Argument(metavar="[PATH]...", help="Only rows whose file is, or lies under, one of these.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Only rows of this split; without it all but 'extra'.")] = None,
    json: options.Json = False,
    triton: options.Triton = options.TRITON_DEFAULT,
    timeout: options.Timeout = options.TIMEOUT_DEFAULT,
    milvus: options.Milvus = options.MILVUS_DEFAULT,
    milvus_user: options.MilvusUser = "",
    milvus_password: options.MilvusPassword = "",
    milvus_token: options.MilvusToken = "",
    milvus_database: options.MilvusDatabase = "",
) -> None:
    """Embed confirmed cases and keep them, with their clinical facts. Repeat it at will: only what changed is done again."""
    from cxr_retrieval import embedding
    from cxr_retrieval.manifest import read_manifest
    from cxr_retrieval.store import LITE_COMFORTABLE_ROWS, Store
    from cxr_retrieval.triton import TritonClient

    rows = _under(read_manifest(manifest).require(split=split), paths or [])
    milvus_settings = MilvusSettings(milvus, milvus_user, milvus_password, milvus_token, milvus_database, timeout)
    with TritonClient(TritonSettings(triton, timeout)) as client, Store(milvus_settings, client.model_version, create=True) as store:
        with progress("ingesting", len(rows)) as advance:
            report = embedding.ingest(rows, client, store, advance)
        total = store.count()
        version, collection = client.model_version, store.collection
    print_problems(report.problems)
    if json:
        print_json(
            {
                "model_version": version,
                "collection": collection,
                "stored": report.stored,
                "unchanged": report.unchanged,
                "failed": [{"image_id": problem.image_id, "error": str(problem.error)} for problem in report.problems],
                "gallery": total,
            }
        )
    else:
        typer.echo(f"{report.stored} stored, {report.unchanged} unchanged, {len(report.problems)} failed; the gallery holds {total} cases")
    if total > LITE_COMFORTABLE_ROWS and milvus_settings.is_lite:
        talk().print(f"Milvus Lite gets slow beyond {LITE_COMFORTABLE_ROWS} cases: consider a Milvus server")
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
