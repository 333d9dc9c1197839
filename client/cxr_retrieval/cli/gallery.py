"""`cxr gallery`: cases and whole galleries out of Milvus, into files and back; each time the audit log says so. Who a pseudonym is."""

from __future__ import annotations

import json as jsonlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from cxr_retrieval.cli import options
from cxr_retrieval.cli.console import print_json, progress
from cxr_retrieval.errors import InputError, UsageError
from cxr_retrieval.settings import MilvusSettings, PseudonymSettings

app = typer.Typer(help="Take cases, or a gallery, out of Milvus; back one up, choose one; ask who a pseudonym is.", no_args_is_help=True)

_Reason = Annotated[str, typer.Option(help="Why, for the audit log; name no patient.")]


@app.command()
@options.with_servers
def remove(
    milvus: MilvusSettings,
    pseudonyms: PseudonymSettings,
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
    from cxr_retrieval.cases.pseudonyms import open_pseudonyms
    from cxr_retrieval.gallery.store import remove_cases

    clause = _clause(image or [], patient, source, where)
    with open_pseudonyms(pseudonyms) as keys:
        if dry_run:
            found = remove_cases(milvus, keys, clause, dry_run=True)
        else:
            with audited(audit.expanduser(), "gallery remove", {"reason": reason}) as operation:
                found = remove_cases(milvus, keys, clause)
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
    collection: Annotated[str, typer.Argument(help="As `cxr info --collections` lists it, such as cxr_0123456789ab.")],
    reason: _Reason = "",
    audit: options.Audit = options.AUDIT_DEFAULT,
) -> None:
    """Remove a whole gallery, such as one of a model version that is no longer served."""
    from cxr_retrieval.archive.audit import audited
    from cxr_retrieval.gallery.store import drop_gallery

    with audited(audit.expanduser(), "gallery drop", {"collection": collection, "reason": reason}) as operation:
        rows = operation.outcome["cases_dropped"] = drop_gallery(milvus, collection)
    typer.echo(f"{collection}: dropped, {rows} cases")


@app.command()
@options.with_servers
def whois(
    pseudonyms: PseudonymSettings,
    pseudonym: Annotated[
        list[str], typer.Argument(metavar="PSEUDONYM...", help="Of an image or a patient; its first 8 hex digits are enough.")
    ],
    reason: _Reason = "",
    audit: options.Audit = options.AUDIT_DEFAULT,
    json: options.Json = False,
) -> None:
    """Lead pseudonyms, as pages, results and the audit log show them, back to image, file and patient; for whoever has the local table.

    The audit log says who asked for whom, before the answer is given.
    """
    from cxr_retrieval.archive.audit import audited
    from cxr_retrieval.cases.pseudonyms import DIGITS, MIN_PREFIX, open_pseudonyms

    for digits in pseudonym:
        if not re.fullmatch(rf"[0-9a-f]{{{MIN_PREFIX},{DIGITS}}}", digits):
            raise UsageError(
                "not a pseudonym",
                expected=f"{MIN_PREFIX} to {DIGITS} hex digits",
                got=repr(digits),
                next_step="copy it from a page or result",
            )
    unknown: list[str] = []
    people: list[dict[str, Any]] = []
    with open_pseudonyms(pseudonyms) as keys, audited(audit.expanduser(), "gallery whois", {"reason": reason}) as operation:
        for digits in pseudonym:
            images, patients = keys.images_like(digits), keys.patients_like(digits)
            people += [
                {
                    "pseudonym": key,
                    "image_id": original.image_id,
                    "path": str(original.path),
                    "member": original.member,
                    "patient_id": original.patient_id,
                }
                for key, original in images.items()
            ]
            people += [{"pseudonym": key, "patient_id": patient, "images": of} for key, (patient, of) in patients.items()]
            unknown += [] if images or patients else [digits]
        operation.note({one["pseudonym"]: "led back" for one in people})
    if json:
        print_json({"known": people, "unknown": unknown})
    else:
        for one in people:
            told = {name: ", ".join(value) if isinstance(value, list) else value for name, value in one.items() if value is not None}
            typer.echo("  ".join(f"{name} {value}" for name, value in told.items()))
    if unknown:
        raise InputError(
            f"unknown pseudonym: {', '.join(unknown)}",
            expected=f"one that {keys.table} leads back",
            next_step="ask where the case was ingested, or give that table with --pseudonym-table",
        )


@app.command(name="export")
@options.with_servers
def export_(
    milvus: MilvusSettings,
    pseudonyms: PseudonymSettings,
    out: Annotated[Path, typer.Argument(help="Parquet file; it is there whole or not at all.")],
    model_version: Annotated[
        str | None, typer.Option(metavar="VERSION", help="Whose gallery.", show_default="what alias cxr points to")
    ] = None,
    thumbnails: Annotated[bool, typer.Option("--thumbnails", help="Also the pictures that are kept of its cases.")] = False,
    audit: options.Audit = options.AUDIT_DEFAULT,
    json: options.Json = False,
) -> None:
    """Back a gallery up: every case, calibration, profiles of sites and clusters, in one file. Queries and ingests may go on."""
    from cxr_retrieval.archive.audit import audited
    from cxr_retrieval.cases.pseudonyms import open_pseudonyms
    from cxr_retrieval.gallery.aliases import the_version
    from cxr_retrieval.gallery.backup import export_gallery
    from cxr_retrieval.gallery.store import KEPT, Store

    version = model_version or the_version(milvus)
    with (
        audited(audit.expanduser(), "gallery export", {"model_version": version, "thumbnails": thumbnails}) as operation,
        open_pseudonyms(pseudonyms) as keys,
        Store(milvus, version, keys) as store,
    ):
        with progress("exporting", store.count()) as advance:
            about = export_gallery(store, out, advance, thumbnails=thumbnails)
        operation.outcome.update(cases=about.rows, sha256=about.sha256)
    if json:
        print_json({"model_version": about.model_version, "cases": about.rows, "sha256": about.sha256, "file": str(out)})
    else:
        beside = _beside(KEPT[name] for name in sorted(about.kept))
        typer.echo(f"{out}: {about.rows} cases{beside} of model version {about.model_version}, digest {about.sha256}")


@app.command(name="import")
@options.with_servers
def import_(
    milvus: MilvusSettings,
    pseudonyms: PseudonymSettings,
    file: Annotated[Path, typer.Argument(help="As `cxr gallery export` wrote it.")],
    merge: Annotated[
        bool, typer.Option("--merge", help="Into a gallery that holds cases already; those of the same key are replaced.")
    ] = False,
    model_version: Annotated[str | None, typer.Option(metavar="VERSION", help="Refuse a file of another one.")] = None,
    audit: options.Audit = options.AUDIT_DEFAULT,
    json: options.Json = False,
) -> None:
    """Restore a gallery from a file, which is checked from end to end first. It becomes its own model version's gallery, no other's."""
    from cxr_retrieval.archive.audit import audited
    from cxr_retrieval.cases.pseudonyms import open_pseudonyms
    from cxr_retrieval.gallery.backup import import_gallery, read_backup
    from cxr_retrieval.gallery.store import KEPT

    about = read_backup(file)
    told = {"model_version": about.model_version, "sha256": about.sha256}
    with (
        audited(audit.expanduser(), "gallery import", told) as operation,
        open_pseudonyms(pseudonyms) as keys,
        progress("importing", about.rows) as advance,
    ):
        names = import_gallery(milvus, keys, file, about, merge=merge, model_version=model_version, advance=advance)
        taken = [KEPT[name] for name in names]
        operation.outcome.update(cases=about.rows, restored=taken)
    if json:
        print_json({**told, "cases": about.rows, "restored": taken})
    else:
        typer.echo(f"{about.rows} cases{_beside(taken)} restored to the gallery of model version {about.model_version}")


@app.command(name="map")
@options.with_servers
def map_(
    milvus: MilvusSettings,
    pseudonyms: PseudonymSettings,
    model_version: Annotated[
        str | None, typer.Option(metavar="VERSION", help="Whose gallery.", show_default="what alias cxr points to")
    ] = None,
    maps: options.Maps = options.MAPS_DEFAULT,
    audit: options.Audit = options.AUDIT_DEFAULT,
    json: options.Json = False,
) -> None:
    """Compute the map that `cxr view` shows of a gallery, and keep it on this machine. Needs the extra `map`; minutes for 50,000 cases."""
    from cxr_retrieval.archive.audit import audited
    from cxr_retrieval.cases.pseudonyms import open_pseudonyms
    from cxr_retrieval.gallery.aliases import the_version
    from cxr_retrieval.gallery.store import Store
    from cxr_retrieval.retrieval.atlas import PASSES, draw, keep, kept_at

    version = model_version or the_version(milvus)
    with (
        audited(audit.expanduser(), "gallery map", {"model_version": version}) as operation,
        open_pseudonyms(pseudonyms) as keys,
        Store(milvus, version, keys) as store,
    ):
        with progress("reading, comparing, laying out", PASSES * store.count()) as advance:
            drawn = draw(store, advance)
        path = kept_at(maps, milvus, store)
        keep(drawn, path, store)
        operation.outcome["cases"] = len(drawn.keys)
    if json:
        print_json({"model_version": version, "cases": len(drawn.keys), "file": str(path)})
    else:
        typer.echo(f"{path}: {len(drawn.keys)} cases of model version {version}")


@app.command()
@options.with_servers
def use(
    milvus: MilvusSettings,
    version: Annotated[str, typer.Argument(help="A model version, as `cxr info --collections` lists them after cxr_.")],
    reason: _Reason = "",
    audit: options.Audit = options.AUDIT_DEFAULT,
) -> None:
    """Point the alias cxr at a version's gallery, at once. Clients ask the gallery of the version that their Triton serves, as ever."""
    from cxr_retrieval.archive.audit import audited
    from cxr_retrieval.gallery.aliases import PREFIX, use_gallery

    with audited(audit.expanduser(), "gallery use", {"model_version": version, "reason": reason}) as operation:
        before = operation.outcome["before"] = use_gallery(milvus, version)
    back = f"; back by `cxr gallery use {before.removeprefix(PREFIX)}`" if before else ""
    typer.echo(f"the gallery is now that of {version}{back}")


def _beside(kept: Iterable[str]) -> str:
    """What goes along with the cases, in words."""
    return "".join(f" and its {what}" for what in kept)


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
