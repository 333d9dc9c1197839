"""`cxr gallery`: takes cases out of the galleries, and says so in the audit log."""

from __future__ import annotations

import json as jsonlib
from typing import Annotated

import typer

from cxr_retrieval.cli import options
from cxr_retrieval.cli.console import print_json
from cxr_retrieval.errors import InputError, UsageError
from cxr_retrieval.settings import MilvusSettings

app = typer.Typer(help="Take cases, or a whole gallery, out of Milvus.", no_args_is_help=True)

_Reason = Annotated[str, typer.Option(help="Why, for the audit log; name no patient.")]


@app.command()
@options.with_servers
def remove(
    milvus: MilvusSettings,
    image: Annotated[list[str] | None, typer.Option(metavar="ID", help="The case with this image_id; may be repeated.")] = None,
    patient: Annotated[str | None, typer.Option(metavar="ID", help="Every case with this patient_id.")] = None,
    source: Annotated[str | None, typer.Option(help="Of --patient: only cases of this source.")] = None,
    where: Annotated[str, typer.Option(metavar="EXPR", help="Every case that meets this, such as 'source == \"north\"'.")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say how many that are.")] = False,
    reason: _Reason = "",
    audit: options.Audit = options.AUDIT_DEFAULT,
    json: options.Json = False,
) -> None:
    """Remove cases from the galleries of every model version: a patient who withdrew consent, a wrong file, a whole source."""
    from cxr_retrieval.archive.audit import audited
    from cxr_retrieval.gallery.store import remove_cases

    clause = _clause(image or [], patient, source, where)
    if dry_run:
        found = remove_cases(milvus, clause, dry_run=True)
    else:
        with audited(audit.expanduser(), "gallery remove", {"reason": reason}) as operation:
            found = remove_cases(milvus, clause)
            operation.outcome["removed"] = found
    if json:
        print_json({"dry_run": dry_run, "removed": {name: len(keys) for name, keys in found.items()}})
    else:
        for name, keys in found.items():
            typer.echo(f"{name}: {len(keys)} cases {'would be removed' if dry_run else 'removed'}")
    if not found:
        raise InputError("no case to remove", expected="cases that meet it", got="none in any gallery", next_step="correct the choice")


@app.command()
@options.with_servers
def drop(
    milvus: MilvusSettings,
    collection: Annotated[str, typer.Argument(help="As `cxr info --collections` lists it, such as cxr_2bbd38cfa579.")],
    reason: _Reason = "",
    audit: options.Audit = options.AUDIT_DEFAULT,
) -> None:
    """Remove a whole gallery, such as one of a model version that is no longer served."""
    from cxr_retrieval.archive.audit import audited
    from cxr_retrieval.gallery.store import drop_gallery

    with audited(audit.expanduser(), "gallery drop", {"collection": collection, "reason": reason}) as operation:
        rows = operation.outcome["cases_dropped"] = drop_gallery(milvus, collection)
    typer.echo(f"{collection}: dropped, {rows} cases")


def _clause(images: list[str], patient: str | None, source: str | None, where: str) -> str:
    chosen = sum((bool(images), patient is not None, bool(where)))
    if chosen != 1 or (source is not None and patient is None):
        raise UsageError(
            "which cases?", expected="one of --image, --patient (with --source or without) and --where", next_step="give one of them"
        )
    if images:
        return f"image_id in {jsonlib.dumps(images, ensure_ascii=False)}"
    if patient is not None:
        clause = f"patient_id == {jsonlib.dumps(patient, ensure_ascii=False)}"
        return clause if source is None else f"{clause} and source == {jsonlib.dumps(source, ensure_ascii=False)}"
    return where
