"""`cxr evaluate`: reads its options, calls the library, prints."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from cxr_retrieval.cli import options
from cxr_retrieval.cli.console import print_json, print_problems, progress, results, talk
from cxr_retrieval.errors import SetupError, StoreError, UsageError
from cxr_retrieval.settings import MilvusSettings, PseudonymSettings, TritonSettings

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from cxr_retrieval.archive.embedding import Embedded
    from cxr_retrieval.cases.manifest import ManifestRow
    from cxr_retrieval.evaluation.metrics import LabelledSet


@options.with_servers
def evaluate(
    triton: TritonSettings,
    milvus: MilvusSettings,
    pseudonyms: PseudonymSettings,
    gallery: Annotated[Path, typer.Option(help="Manifest of the gallery.")],
    queries: Annotated[Path, typer.Option(help="Manifest of the queries.")],
    gallery_split: Annotated[str | None, typer.Option(help="Only gallery rows of this split; without it all but 'extra'.")] = None,
    queries_split: Annotated[str | None, typer.Option(help="Only query rows of this split; without it all but 'extra'.")] = None,
    top_k: Annotated[int, typer.Option(min=1, max=1000, help="Neighbours that vote.")] = 10,
    error_rate: options.ErrorRate = options.ERROR_RATE_DEFAULT,
    balance: options.Balance = options.BALANCE_DEFAULT,
    space: options.Space = options.SPACE_DEFAULT,
    calibration: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also fit a calibration on the queries, and put it into this file of calibrations.")
    ] = None,
    feedback: Annotated[
        bool, typer.Option("--feedback", help="Also measure what simulated readers gain by marking cases; a minute for 759 queries.")
    ] = False,
    json: options.Json = False,
) -> None:
    """Measure retrieval: recall@k, accuracy, mAP@R per class and source, within and across sources. Never counts a query's own patient.

    Vectors already ingested are taken from the gallery; others are computed now and not kept. Neighbours are exact.
    """
    from cxr_retrieval.archive import embedding
    from cxr_retrieval.cases.manifest import read_manifest
    from cxr_retrieval.cases.pseudonyms import open_pseudonyms
    from cxr_retrieval.evaluation import confidence, metrics
    from cxr_retrieval.evaluation import feedback as feedback_
    from cxr_retrieval.gallery.balance import DEFAULT_BALANCE, checked
    from cxr_retrieval.gallery.spaces import FILM, SPACES
    from cxr_retrieval.gallery.store import Store
    from cxr_retrieval.inference.triton import TritonClient
    from cxr_retrieval.radiograph.decoding import FilmReader
    from cxr_retrieval.retrieval.calibration import put_calibration

    if checked(balance) != DEFAULT_BALANCE and calibration:
        raise UsageError(
            "--calibration with another balance",
            expected=f"--balance {DEFAULT_BALANCE:g}, for which one is kept",
            next_step="leave one out",
        )
    compared = SPACES[space]
    if compared is not FILM and (calibration or feedback):
        raise UsageError(
            f"--space {space.value} with --calibration or --feedback",
            expected=f"--space {FILM.name.value}, of which both are",
            next_step="leave one out",
        )
    rows: dict[str, Sequence[ManifestRow]] = {
        "gallery": read_manifest(gallery).require(split=gallery_split),
        "queries": read_manifest(queries).require(split=queries_split),
    }
    found: dict[str, Embedded] = {}
    with ExitStack() as opened:
        reader = opened.enter_context(FilmReader())
        client = opened.enter_context(TritonClient(triton))
        version = compared.version(client)
        try:
            keys = opened.enter_context(open_pseudonyms(pseudonyms))
            store = opened.enter_context(Store(milvus, version, keys, space=compared))
        except (StoreError, SetupError) as error:
            talk().print(f"computing every vector now: {error}", soft_wrap=True)
            store = None
        for name, wanted in rows.items():
            with progress(name, len(wanted)) as advance:
                found[name] = embedding.embed_rows(wanted, reader, client, store, advance, compared)
            talk().print(f"{name}: {found[name].from_store} of {len(wanted)} vectors from the store")
    problems = [problem for part in found.values() for problem in part.problems]
    print_problems(problems)
    rows_of = {name: part.rows for name, part in found.items()}
    *patients, warnings = metrics.comparable_patients(rows_of["gallery"], rows_of["queries"])
    sets = [
        _labelled(found[name], compared.comparable(found[name].vectors, balance), keys) for name, keys in zip(found, patients, strict=True)
    ]
    how = {"balance": balance} if compared is FILM else {"space": space.value}
    result = {**how, **metrics.evaluate(*sets, k=top_k, model_version=version, warnings=warnings, error_rate=error_rate)}
    if calibration:
        about = {
            "made_by": "cxr evaluate",
            "made": datetime.now(timezone.utc).date().isoformat(),
            "balance": balance,
            "patients": len(set(patients[1])),
        }
        votes = metrics.answered(metrics.Ranking(*sets), top_k)
        put_calibration(confidence.fit(votes, version, top_k, len(sets[0].labels), about), calibration)
        talk().print(f"wrote {calibration}")
    if feedback:
        result["feedback"] = feedback_.measured(metrics.Ranking(*sets), top_k)
    if json:
        print_json(result)
    else:
        _print(result)
    if problems:
        raise typer.Exit(1)


def _labelled(embedded: Embedded, vectors: NDArray[np.float32], patients: Sequence[str]) -> LabelledSet:
    from cxr_retrieval.evaluation.metrics import LabelledSet

    rows = embedded.rows
    return LabelledSet(
        [row.image_id for row in rows],
        vectors,
        [row.label for row in rows],
        patients,
        [row.source or "" for row in rows],
        embedded.pixels,
    )


def _how(result: dict[str, Any]) -> str:
    return f"balance {result['balance']:g}" if "balance" in result else f"space {result['space']}"


def _print(result: dict[str, Any]) -> None:
    console = results()
    console.print(
        f"model {result['model_version']}, {_how(result)}, k = {result['k']}, "
        f"gallery {result['gallery']['n']} images of {result['gallery']['patients']} patients, "
        f"queries {result['queries']['n']} of {result['queries']['patients']}"
    )
    table = Table("", "n", "accuracy", "balanced", "recall@1", "@4", "@10", "mAP@R", box=None, header_style="dim", pad_edge=False)
    for name, part in {"overall": result["overall"], **result["per_source"]}.items():
        recall, interval = part["recall_at"], part["recall_at_ci"]
        table.add_row(
            name,
            str(part["n"]),
            _with_interval(part["accuracy"], part["accuracy_ci"]),
            _with_interval(part["balanced_accuracy"], part["balanced_accuracy_ci"]),
            _with_interval(recall["1"], interval["1"]),
            f"{recall['4']:.3f}",
            f"{recall['10']:.3f}",
            _with_interval(part["map_at_r"], part["map_at_r_ci"]),
        )
    console.print(table)
    console.print(_restricted_table(result))
    if found := result["calibration"]["cross_fitted"]:
        console.print(_calibration_table(found))
    if marked := result.get("feedback"):
        console.print(_feedback_table(marked))
    table = Table("", "label", "n", "sensitivity", "PPV", "F1", "recall@1", "@4", "@10", box=None, header_style="dim", pad_edge=False)
    for name, part in {"overall": result, **result["per_source"]}.items():
        for label, row in part["per_class"].items():
            recall = row["recall_at"]
            table.add_row(
                name,
                label,
                str(row["n"]),
                _number(row["sensitivity"]),
                _number(row["ppv"]),
                _number(row["f1"]),
                *(_number(recall[at]) for at in ("1", "4", "10")),
            )
    console.print(table)
    if found := result.get("findings"):
        console.print(_findings_table(found))
    for warning in result["warnings"]:
        console.print(Text.assemble(("warning:", "yellow"), f" {warning}"))
    console.print(
        "Brackets: 95 % bootstrap intervals over patients, none of too few. Where label and source are tied, read each source by itself.",
        style="dim",
    )


def _restricted_table(result: dict[str, Any]) -> Table:
    """Balanced accuracy with the gallery cut to the query's own source, and without it; how the vote's confidence fares."""
    table = Table("", "n", "balanced accuracy", box=None, header_style="dim", pad_edge=False)
    for title, part in (("only own source", result["within_source"]), ("without own source", result["cross_source"])):
        if part["n"]:
            for name, row in {"all": part["overall"], **part["per_source"]}.items():
                table.add_row(f"{title}: {name}", str(row["n"]), _with_interval(row["balanced_accuracy"], row["balanced_accuracy_ci"]))
    own, selective = result["nearest_from_own_source"], result["calibration"]["selective"]
    if own["n"]:
        table.add_row("nearest neighbour from own source, label held elsewhere, too (share)", str(own["n"]), _number(own["share"]))
        table.add_row("the same, were all cases of the label as near", str(own["n"]), _number(own["by_chance"]))
    table.add_row("without the least confident tenth (accuracy)", str(selective["n"]), _number(selective["accuracy"]))
    table.add_row("expected calibration error of the vote", "", _number(result["calibration"]["ece"]))
    return table


def _findings_table(found: dict[str, Any]) -> Table:
    """Of labels that hold several findings: what the nearest have in common with the query, and how well each finding is told."""
    table = Table("by finding", "n", "area under the curve", box=None, header_style="dim", pad_edge=False)
    for name, one in found["per_finding"].items():
        table.add_row(name, str(one["n"]), "–" if one["auroc"] is None else _with_interval(one["auroc"], one["auroc_ci"]))
    for title, key in (
        ("alike, of all findings (ACG)", "acg"),
        ("alike, of those that either has (ACGp)", "acg_p"),
        ("any in common", "precision"),
    ):
        table.add_row(title, "", f"{found[key]:.3f}")
    table.add_row("the same findings", "", f"{found['exact']:.3f}")
    table.add_row("findings in common (gain)", "", f"{found['gain']:.3f}")
    return table


def _calibration_table(found: dict[str, Any]) -> Table:
    """What a calibration on such queries gives on patients it was not fitted on."""
    table = Table(
        *("calibrated, cross-fitted", "n", "right", "said", f"in the set ({found['error_rate']:g})", "labels in it", "right if one"),
        box=None,
        header_style="dim",
        pad_edge=False,
    )
    for name, part in {"all": found["overall"], **found["per_source"]}.items():
        single = part["single"]
        table.add_row(
            name or "unknown source",
            str(part["n"]),
            f"{part['accuracy']:.3f}",
            f"{part['calibrated']:.3f}",
            _with_interval(part["coverage"], part["coverage_ci"]),
            f"{part['set_size']:.2f}",
            f"{_number(single['accuracy'])} of {single['n']}",
        )
    table.add_row("expected calibration error", "", "", _with_interval(found["ece"], found["ece_ci"]))
    return table


def _feedback_table(found: dict[str, Any]) -> Table:
    """What readers who mark cases are shown next."""
    table = Table(
        *("marking cases", "round", "shown and right", "new and right", "any right shown", "any right new"),
        box=None,
        header_style="dim",
        pad_edge=False,
    )
    for reader in found["readers"]:
        name = f"by {reader['looks_for']}, {reader['errs']:.0%} wrong"
        for way, rounds in reader["ways"].items():
            for number, row in enumerate(rounds):
                shares = [_with_interval(row[key], row[f"{key}_ci"]) for key in ("shown", "new")]
                anys = [f"{row[key]:.3f}" for key in ("recall_shown", "recall_new")]
                table.add_row(f"{name}; {way}" if number == 0 else "", str(number), *shares, *anys)
    return table


def _with_interval(value: float, interval: list[float] | None) -> str:
    return f"{value:.3f} –" if interval is None else f"{value:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
