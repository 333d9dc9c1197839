"""`cxr calibrate`: reads its options, calls the library, prints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from cxr_retrieval.cli import options
from cxr_retrieval.cli.console import print_json, results, talk
from cxr_retrieval.errors import UsageError
from cxr_retrieval.settings import MilvusSettings, PseudonymSettings

if TYPE_CHECKING:
    from cxr_retrieval.evaluation.recalibration import Recalibration


@options.with_servers
def calibrate(
    milvus: MilvusSettings,
    pseudonyms: PseudonymSettings,
    manifest: Annotated[Path | None, typer.Option(metavar="CSV", help="Only cases of this manifest, all of them ingested before.")] = None,
    where: Annotated[str, typer.Option(metavar="EXPR", help="Only cases that meet this, such as 'source == \"st-mary\"'.")] = "",
    include_train: Annotated[
        bool, typer.Option("--include-train", help="Also cases of split train, whose labels the networks may have learnt.")
    ] = False,
    top_k: Annotated[int, typer.Option(min=1, max=1000, help="Neighbours that vote; other numbers stay unmeasured.")] = 10,
    error_rate: options.ErrorRate = options.ERROR_RATE_DEFAULT,
    model_version: Annotated[
        str | None, typer.Option(metavar="VERSION", help="Whose gallery.", show_default="what alias cxr points to")
    ] = None,
    reset: Annotated[bool, typer.Option("--reset", help="Forget the gallery's own calibration; the one that ships answers again.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Measure, change nothing.")] = False,
    audit: options.Audit = options.AUDIT_DEFAULT,
    json: options.Json = False,
) -> None:
    """Measure on a gallery's own cases how often its votes are right, and answer by that from now on. No Triton is needed.

    Each case is asked about as if it were new, without its own patient's films. What is printed holds for patients left out of the fit.
    """
    from cxr_retrieval.archive.audit import audited
    from cxr_retrieval.cases.manifest import read_manifest
    from cxr_retrieval.cases.pseudonyms import open_pseudonyms
    from cxr_retrieval.evaluation.recalibration import recalibrate
    from cxr_retrieval.gallery.aliases import the_version
    from cxr_retrieval.gallery.spaces import FILM
    from cxr_retrieval.gallery.store import CALIBRATION, Store

    if reset and (manifest or where or include_train):
        raise UsageError("--reset with a choice of cases", expected="--reset alone", next_step="leave out the other options")
    version = model_version or the_version(milvus)
    about = {"model_version": version, "reset": reset, "dry_run": dry_run}
    with (
        audited(audit.expanduser(), "calibrate", about) as operation,
        open_pseudonyms(pseudonyms) as keys,
        Store(milvus, version, keys, space=FILM) as store,
    ):
        if reset:
            had = bool(store.calibration)
            if had and not dry_run:
                store.keep({CALIBRATION: ""})
            operation.outcome["had_its_own"] = had
            _print_reset({"model_version": version, "had_its_own": had, "dry_run": dry_run}, json=json)
            return
        chosen = {keys.image(row.image_id) for row in read_manifest(manifest).require()} if manifest else None
        found = recalibrate(store, where=where, keys=chosen, include_train=include_train, top_k=top_k, error_rate=error_rate)
        if found.is_new and not dry_run:
            store.keep({CALIBRATION: found.calibration.as_text()})
        operation.outcome.update(changed=found.is_new, cases=found.after["overall"]["n"], ece=found.after["ece"])
    if json:
        print_json({**found.as_json(), "dry_run": dry_run})
    else:
        _print(found, dry_run=dry_run)


def _print_reset(told: dict[str, Any], *, json: bool) -> None:
    if json:
        print_json(told)
    elif not told["had_its_own"]:
        typer.echo(f"the gallery of {told['model_version']} has no calibration of its own; nothing to forget")
    else:
        typer.echo(f"the gallery of {told['model_version']} {'would forget' if told['dry_run'] else 'has forgotten'} its own calibration")


def _print(found: Recalibration, *, dry_run: bool) -> None:
    console, before, after = results(), found.before, found.after
    if found.learnt_from:
        talk().print(f"{found.learnt_from} cases of split train do not count: the networks may know their labels", soft_wrap=True)
    if found.missing:
        talk().print(f"{found.missing} cases of the manifest are not in the gallery. Next: ingest them, then calibrate", soft_wrap=True)
    state = "nothing is changed" if dry_run else "the gallery answers by it from now on" if found.is_new else "as it was: the same cases"
    cases = ", ".join(f"{label} {count}" for label, count in found.calibration.about["of_a_label"].items())
    console.print(f"calibrated on {after['overall']['n']} cases ({cases}) of {found.calibration.about['patients']} patients; {state}")
    table = Table(
        "", "n", "right", "said before", "now", "in the set before", "now", "labels in it", box=None, header_style="dim", pad_edge=False
    )
    for name, now in {"overall": after["overall"], **after["per_source"]}.items():
        was = before and (before["overall"] if name == "overall" else before["per_source"].get(name))
        table.add_row(
            name or "unknown source",
            str(now["n"]),
            f"{now['accuracy']:.3f}",
            f"{was['calibrated']:.3f}" if was else "–",
            f"{now['calibrated']:.3f}",
            f"{was['coverage']:.3f}" if was else "–",
            f"{now['coverage']:.3f}",
            f"{now['set_size']:.2f}",
        )
    console.print(table)
    error = f"{before['ece']:.3f}" if before else "unknown"
    console.print(f"expected calibration error: {error} before, {after['ece']:.3f} now")
    if before and before["without"]:
        console.print(f"before, {before['without']} of these answers had no confidence: their neighbours were of other labels or sources")
    console.print(
        f"sets at an error rate of {after['error_rate']:g}. Now: on patients left out of the fit, in {after['folds']} groups. "
        "It holds for patients like these.",
        style="dim",
    )
