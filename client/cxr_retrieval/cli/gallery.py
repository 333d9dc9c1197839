"""`cxr gallery`: cases and whole galleries out of Milvus, into files and back; each time the audit log says so. Who a pseudonym is."""

from __future__ import annotations

import json as jsonlib
import re
import threading
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from cxr_retrieval.cli import options
from cxr_retrieval.cli.console import INTERRUPTED, print_json, progress
from cxr_retrieval.cli.watched import Watched
from cxr_retrieval.errors import InputError, UsageError
from cxr_retrieval.interruption import until_interrupted
from cxr_retrieval.settings import IndexName, MilvusSettings, PseudonymSettings

app = typer.Typer(
    help="Take cases, or a gallery, out of Milvus; back one up, choose one; by what it is searched; ask who a pseudonym is.",
    no_args_is_help=True,
)

_Reason = Annotated[str, typer.Option(help="Why, for the audit log; name no patient.")]
_Version = Annotated[str | None, typer.Option(metavar="VERSION", help="Whose gallery.", show_default="what alias cxr points to")]


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
    model_version: _Version = None,
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
    bulk: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Send no rows: have the server read files that are put there; into a new gallery alone."),
    ] = None,
    bulk_as: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="What the server calls that folder, or a prefix in its bucket.", show_default="the same"),
    ] = None,
    audit: options.Audit = options.AUDIT_DEFAULT,
    json: options.Json = False,
) -> None:
    """Restore a gallery from a file, which is checked from end to end first. It becomes its own model version's gallery, no other's."""
    from cxr_retrieval.archive.audit import audited
    from cxr_retrieval.cases.pseudonyms import open_pseudonyms
    from cxr_retrieval.gallery.backup import import_gallery, read_backup
    from cxr_retrieval.gallery.bulk import Imported, bulk_import
    from cxr_retrieval.gallery.store import KEPT

    if bulk is not None and merge:
        raise UsageError(
            "--bulk with --merge", expected="one of them: a server looks for no doubles in what it reads", next_step="leave one out"
        )
    about = read_backup(file)
    told = {"model_version": about.model_version, "sha256": about.sha256}
    with (
        audited(audit.expanduser(), "gallery import", told) as operation,
        open_pseudonyms(pseudonyms) as keys,
        until_interrupted() if bulk else nullcontext(threading.Event()) as stop,
        progress("importing", about.rows * (2 if bulk else 1)) as advance,
    ):
        if bulk is None:
            done = Imported(import_gallery(milvus, keys, file, about, merge=merge, model_version=model_version, advance=advance))
        else:
            seen_as = bulk_as or str(bulk.resolve())
            done = bulk_import(milvus, keys, file, about, bulk, seen_as, stop, model_version=model_version, advance=advance)
        taken = [KEPT[name] for name in done.restored]
        operation.outcome.update(cases=about.rows if done.whole else 0, restored=taken)
    if not done.whole:
        typer.echo("interrupted; the gallery does not answer. Next: give the same command again, it begins anew", err=True)
        raise typer.Exit(INTERRUPTED)
    if json:
        print_json({**told, "cases": about.rows, "restored": taken})
    elif done.already:
        typer.echo(f"the gallery of model version {about.model_version} was made of this file before; nothing to do")
    else:
        typer.echo(f"{about.rows} cases{_beside(taken)} restored to the gallery of model version {about.model_version}")


@app.command(name="map")
@options.with_servers
def map_(
    milvus: MilvusSettings,
    pseudonyms: PseudonymSettings,
    model_version: _Version = None,
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


@app.command()
@options.with_servers
def index(
    milvus: MilvusSettings,
    seen: Watched,
    wanted: Annotated[IndexName | None, typer.Argument(metavar="[INDEX]", help=options.INDEXES, show_default="the one that it has")] = None,
    recall: Annotated[
        float | None, typer.Option(help="recall@10 that its searches are to reach, 0.5 to 0.999.", show_default="as before; at first 0.99")
    ] = None,
    model_version: _Version = None,
    audit: options.Audit = options.AUDIT_DEFAULT,
    json: options.Json = False,
) -> None:
    """Give a gallery another index, and wait until it is whole; or say which it has. Meanwhile it does not answer.

    Interrupt it at will: Milvus goes on by itself, and the same command waits for it.
    """
    from cxr_retrieval.archive.audit import audited
    from cxr_retrieval.gallery.aliases import collection_of, the_version
    from cxr_retrieval.gallery.indexes import Index, checked_recall, rebuild

    version = model_version or the_version(milvus)
    told = {
        "model_version": version,
        "index": wanted.value if wanted else None,
        "recall": recall if recall is None else checked_recall(recall),
    }
    with (
        audited(audit.expanduser(), "gallery index", told) as operation,
        until_interrupted() as stop,
        seen.bar("indexing") as bar,
    ):

        def begun(before: Index | None, after: Index, cases: int) -> None:
            bar.describe("indexing", cases)
            seen.tell(f"{cases} cases: {after}" if before == after else f"{cases} cases: {before or 'no index'} → {after}")

        done = rebuild(milvus, collection_of(version), wanted, recall, stop, begun=begun, advance=bar.advance)
        result = {
            "model_version": version,
            "before": None if done.before is None else str(done.before),
            "index": str(done.after),
            "recall": done.recall,
            "cases": done.cases,
            "whole": done.whole,
            "seconds": round(done.seconds, 1),
        }
        operation.outcome.update(result)
    if json:
        print_json(result)
    else:
        typer.echo(f"{version}: {done.after} over {done.cases} cases, searched for a recall of {done.recall:g}")
    if not done.whole:
        seen.tell("interrupted; Milvus goes on building it, and answers miss cases until it has. Next: give the same command again")
        raise typer.Exit(INTERRUPTED)


@app.command(name="audit")
@options.with_servers
def audit_(
    milvus: MilvusSettings,
    pseudonyms: PseudonymSettings,
    seen: Watched,
    where: Annotated[
        list[str] | None,
        typer.Option(metavar="EXPR", help="A filter to ask with, too; may be repeated.", show_default="that of its rarest label"),
    ] = None,
    sample: Annotated[int, typer.Option(min=1, help="Cases of the gallery to ask about, each left out of its own answer.")] = 200,
    top_k: Annotated[int, typer.Option(min=1, max=1000, help="Nearest cases that are to be found.")] = 10,
    recall: Annotated[
        float | None,
        typer.Option(help="Least recall that passes; below it the exit code is 1.", show_default="what its searches are to reach"),
    ] = None,
    model_version: _Version = None,
    json: options.Json = False,
) -> None:
    """Compare what its index finds with what comparing with every case finds, with a filter and without. Reads every vector."""
    from cxr_retrieval.cases.pseudonyms import open_pseudonyms
    from cxr_retrieval.evaluation.exact import audit_index
    from cxr_retrieval.gallery.aliases import the_version
    from cxr_retrieval.gallery.indexes import checked_recall
    from cxr_retrieval.gallery.store import Store

    version = model_version or the_version(milvus)
    with open_pseudonyms(pseudonyms) as keys, Store(milvus, version, keys) as store:
        wanted = store.recall if recall is None else checked_recall(recall)
        with seen.bar("comparing with every case") as bar:
            found = audit_index(store, where or (), queries=sample, k=top_k, begun=bar.describe, advance=bar.advance)
        index, effort = str(store.index), store.index.search(top_k + 1, store.recall)
    missed = [one for one in found if one.recall < wanted]
    if json:
        print_json(
            {
                "model_version": version,
                "index": index,
                "search": effort,
                "wanted": wanted,
                "passed": not missed,
                "audited": [one.as_json() for one in found],
            }
        )
    else:
        typer.echo(f"{version}: {index}{''.join(f', {name} {value:g}' for name, value in effort.items())}; wanted: {wanted:g}")
        for one in found:
            low, high = one.interval
            among = f"where {one.where}" if one.where else "without a filter"
            typer.echo(
                f"recall@{one.k} {one.recall:.4f} [{low:.4f}, {high:.4f}], {one.worst:.2f} at worst, {among}: "
                f"{one.queries} queries, {one.cases} cases"
            )
    if missed:
        raise InputError(
            f"the index finds too little: recall@{top_k} {min(one.recall for one in missed):.4f}",
            expected=f"{wanted:g} or more",
            next_step="`cxr gallery index --recall` with more than you want, or `cxr gallery index flat`, which misses none",
        )


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
