"""`cxr ingest`: reads its options, calls the library, prints."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cxr_retrieval.cli import options
from cxr_retrieval.cli.console import INTERRUPTED, print_doubts, print_json, print_problems
from cxr_retrieval.cli.watched import Watched, first_contact
from cxr_retrieval.errors import UsageError
from cxr_retrieval.interruption import until_interrupted
from cxr_retrieval.settings import (
    EngineName,
    EngineSettings,
    IndexName,
    MilvusSettings,
    PseudonymSettings,
    SpaceName,
    ThumbnailKind,
    TritonSettings,
)

if TYPE_CHECKING:
    from cxr_retrieval.cases.manifest import ManifestRow


@options.with_servers
def ingest(
    triton: TritonSettings,
    milvus: MilvusSettings,
    pseudonyms: PseudonymSettings,
    engine: EngineSettings,
    seen: Watched,
    paths: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PATH]...", help=f"{options.INPUTS} With --manifest: only rows whose file is, or lies under, one of these."
        ),
    ] = None,
    manifest: Annotated[Path | None, typer.Option(help="CSV with image_id,path,label and any clinical columns.")] = None,
    fhir: Annotated[
        list[Path] | None,
        typer.Option("--fhir", metavar="BUNDLE", help="FHIR R4 bundle (JSON) with facts of the films' patients; may be repeated."),
    ] = None,
    label: Annotated[str | None, typer.Option(help="Of all films that no manifest lists.")] = None,
    source: Annotated[str | None, typer.Option(help="Where those films come from.")] = None,
    split: Annotated[
        str | None, typer.Option(help="Of a manifest only rows of this split, without it all but 'extra'; noted of films it does not list.")
    ] = None,
    prune: Annotated[
        bool, typer.Option("--prune", help="Then remove the cases of the manifest's sources that it no longer lists, and log that.")
    ] = False,
    thumbnails: Annotated[
        ThumbnailKind,
        typer.Option("--thumbnails", help="Also keep each picture in Milvus: nothing outside the lungs, or all of it."),
    ] = ThumbnailKind.none,
    index: Annotated[
        IndexName, typer.Option("--index", help=f"Of a gallery that is made: {options.INDEXES} Later: `cxr gallery index`.")
    ] = IndexName.auto,
    by_source: Annotated[
        bool, typer.Option("--by-source", help="Of a gallery that is made on a server: keep it by source, for searches within one.")
    ] = False,
    no_gate: options.NoGate = False,
    space: options.Space = options.SPACE_DEFAULT,
    patience: options.Patience = options.PATIENCE_DEFAULT,
    audit: options.Audit = options.AUDIT_DEFAULT,
    json: options.Json = False,
) -> None:
    """Embed confirmed cases and keep them, with their clinical facts. Repeat it at will: only what changed is done again."""
    from cxr_retrieval.archive import embedding
    from cxr_retrieval.archive.audit import audited
    from cxr_retrieval.archive.inputs import as_cases, find_inputs
    from cxr_retrieval.archive.objects import ObjectReader
    from cxr_retrieval.archive.patience import Patience
    from cxr_retrieval.archive.stages import Plan
    from cxr_retrieval.cases.fhir import read_chart
    from cxr_retrieval.cases.manifest import read_manifest
    from cxr_retrieval.cases.pseudonyms import Pseudonyms, open_pseudonyms
    from cxr_retrieval.cli.on_cluster import networks_of_workers, on_cluster
    from cxr_retrieval.gallery.indexes import INDEXES, outgrown
    from cxr_retrieval.gallery.spaces import REPORTS, SPACES, Space
    from cxr_retrieval.gallery.store import LITE_COMFORTABLE_ROWS, Store
    from cxr_retrieval.inference.triton import TritonClient
    from cxr_retrieval.radiograph.decoding import DecodingLimits
    from cxr_retrieval.retrieval.reports import ReportReader
    from cxr_retrieval.retrieval.site import read_sites

    paths = paths or []
    _refuse_what_does_not_go_together(paths, manifest, label, source, prune=prune)
    if space is not SpaceName.film and not engine.asks_triton:
        raise UsageError(
            "--space with networks in the workers",
            expected="--inference triton, of a server that has that further model",
            got=f"--inference {engine.inference.value}",
            next_step="leave one of them out",
        )
    listed = read_manifest(manifest) if manifest else None
    chosen = _under(listed.require(split=split), [Path(path) for path in paths]) if listed else None
    chart = read_chart(fhir) if fhir else None
    gone: Sequence[str] = ()

    def made(version: str, keys: Pseudonyms, compared: Space) -> Store:
        expected = None if chosen is None else len(chosen)
        return Store(milvus, version, keys, create=True, space=compared, new_index=index, expected=expected, by_source=by_source)

    with ExitStack() as opened:
        with until_interrupted() as stop:
            wait = Patience(stop, patience, seen.tell, seen.watch)
            reader = opened.enter_context(ObjectReader(DecodingLimits(), wait))
            client = opened.enter_context(first_contact(wait, "triton", lambda: TritonClient(triton))) if engine.asks_triton else None
            networks, weights = networks_of_workers(engine, triton, client)
            keys = opened.enter_context(open_pseudonyms(pseudonyms, create=True))
            compared = SPACES[space]
            version = first_contact(wait, "triton", partial(compared.version, client)) if client else weights
            reports = first_contact(wait, "triton", partial(ReportReader.served_by, client)) if client and compared is REPORTS else None
            store = opened.enter_context(first_contact(wait, "milvus", lambda: made(version, keys, compared)))
            about = {"model_version": version, "collection": store.collection, "manifest": listed.sha256 if listed else None}
            found = find_inputs(paths, reader, split=split, stop=stop)
            through = identify = None
            if engine.name is EngineName.ray:
                outputs = embedding.outputs_of(compared, thumbnails, gate=not no_gate)
                plan = Plan(networks, weights, outputs, gpu=engine.on_gpus, patience_s=patience)
                through, identify = opened.enter_context(on_cluster(engine, pseudonyms, plan))
            with (
                audited(audit.expanduser(), "ingest", about) as operation,
                seen.bar("ingesting", None if chosen is None else len(chosen)) as bar,
            ):
                report = embedding.ingest(
                    as_cases(found, label, source, split) if chosen is None else chosen,
                    reader,
                    client,
                    store,
                    advance=bar.advance,
                    thumbnails=thumbnails,
                    stop=stop,
                    tell=seen.tell,
                    watch=seen.watch,
                    noted=operation.note,
                    patience_s=patience,
                    gate=not no_gate,
                    chart=chart,
                    reports=reports,
                    engine=through,
                    identify=identify,
                )
                counts = {name: getattr(report, name) for name in ("stored", "corrected", "unchanged", "pending")}
                operation.outcome.update(counts, failed=len(report.problems))
        if listed and prune and not report.pending:
            with audited(audit.expanduser(), "ingest --prune", about) as operation:
                gone = store.prune({keys.image(row.image_id) for row in listed.rows}, {row.source for row in listed.rows})
                operation.outcome["removed"] = {store.collection: gone}
        total = store.count()
        of = {source, *(row.source for row in chosen or ())}
        profiled = [name for name in sorted(read_sites(store.sites)) if name in of] if report.stored else []
        unplaced = report.stored if store.clusters else 0
        collection, searched_by = store.collection, store.index
    if seen.speaks:
        print_problems(report.problems)
        print_doubts(report.doubts, report.doubted)
    if report.left_out:
        advice = "One that does not can be stored under another name"
        seen.tell(f"not stored, for by their names they tell who somebody is: {', '.join(report.left_out)}. {advice}")
    for column, name in report.misnamed.items():
        seen.tell(f"column {column} is kept as one of your own; to be the standard feature it would be called {name}")
    if chart:
        seen.tell(f"{report.charted} films are of a patient in the FHIR bundles, which tell of {chart.patients}")
        for warning in chart.warnings:
            seen.tell(f"FHIR: {warning}")
    if json:
        print_json(
            {
                "model_version": version,
                "collection": collection,
                "stored": report.stored,
                "corrected": report.corrected,
                "unchanged": report.unchanged,
                "pruned": len(gone),
                "left_out": list(report.left_out),
                "doubts": [{"image_id": doubt.image_id, "doubt": doubt.words} for doubt in report.doubts],
                "doubted": report.doubted,
                "misnamed": dict(report.misnamed),
                "fhir": {"patients": chart.patients, "films": report.charted, "warnings": list(chart.warnings)} if chart else None,
                "failed": [{"image_id": problem.image_id, "error": str(problem.error)} for problem in report.problems],
                "gallery": total,
            }
        )
    else:
        changes = {"corrected": report.corrected, "pruned": len(gone)}
        further = "".join(f", {count} {name}" for name, count in changes.items() if count)
        typer.echo(
            f"{report.stored} stored, {report.unchanged} unchanged, {len(report.problems)} failed{further}; the gallery holds {total} cases"
        )
    for name in profiled:
        seen.tell(f"the profile of {name} was learnt without these cases. Next: `cxr adapt --source {name}` with its films again")
    if unplaced:
        seen.tell(f"{unplaced} of the cases are in no cluster. Next: `cxr cluster --new`")
    if total > LITE_COMFORTABLE_ROWS and milvus.is_lite:
        seen.tell(f"Milvus Lite gets slow beyond {LITE_COMFORTABLE_ROWS} cases: consider a Milvus server")
    elif not milvus.is_lite and outgrown(searched_by, total):
        seen.tell(f"the gallery has outgrown {searched_by}. Next: `cxr gallery index auto`")
    if index is not IndexName.auto and searched_by != INDEXES[index]:
        seen.tell(f"the gallery was there before, and keeps {searched_by}. Next: `cxr gallery index {index.value}`")
    if report.pending:
        left = f", {report.pending} to go" if listed else ""
        seen.tell(f"interrupted{left}. Next: give the same command again, it goes on from here")
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


def _refuse_what_does_not_go_together(
    paths: Sequence[str], manifest: Path | None, label: str | None, source: str | None, *, prune: bool
) -> None:
    if manifest:
        for name, value in (("--label", label), ("--source", source)):
            if value is not None:
                raise UsageError(
                    f"{name} with --manifest", expected="a column of the manifest", next_step=f"leave {name} out, or leave --manifest out"
                )
    elif not paths:
        raise UsageError("nothing to ingest", expected="--manifest, or PATHs with --label", next_step="see `cxr ingest --help`")
    elif prune:
        raise UsageError("--prune without --manifest", expected="a manifest that lists what is to stay", next_step="give --manifest")
    elif not label and not all(path.lower().endswith((".csv", ".parquet")) for path in paths):
        raise UsageError(
            "films without a label", expected="--label for all of them, or a manifest that gives each its own", next_step="give --label"
        )
