"""`cxr cluster`: reads its options, calls the library, prints."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from cxr_retrieval.cli import options
from cxr_retrieval.cli.console import INTERRUPTED, print_json, results
from cxr_retrieval.cli.watched import Watched, first_contact
from cxr_retrieval.errors import UsageError
from cxr_retrieval.interruption import until_interrupted
from cxr_retrieval.settings import MilvusSettings, PseudonymSettings

if TYPE_CHECKING:
    from cxr_retrieval.archive.clustering import Added
    from cxr_retrieval.retrieval.clusters import Clustering

_SHOWN = 20
"""Clusters, the largest first."""


@options.with_servers
def cluster(
    milvus: MilvusSettings,
    pseudonyms: PseudonymSettings,
    seen: Watched,
    neighbours: Annotated[int, typer.Option(min=1, max=100, help="Nearest cases that each has edges to in the graph.")] = 10,
    seeds: Annotated[
        int, typer.Option(min=1, max=100, help="Runs that begin by chance; the best is kept, and how far they agree told.")
    ] = 5,
    new: Annotated[bool, typer.Option("--new", help="Only put cases that are in no cluster yet into those that there are.")] = False,
    undo: Annotated[bool, typer.Option("--undo", help="Forget the clusters.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would come of it, keep nothing.")] = False,
    space: options.Space = options.SPACE_DEFAULT,
    patience: options.Patience = options.PATIENCE_DEFAULT,
    audit: options.Audit = options.AUDIT_DEFAULT,
    json: options.Json = False,
) -> None:
    """Put a gallery's cases into clusters of similar ones, found in the graph of each case's nearest; `query --method cluster` uses them.

    No case changes but for its cluster. Ingest nothing meanwhile.
    """
    from cxr_retrieval.archive.audit import audited
    from cxr_retrieval.archive.clustering import add_new, find_clusters, keep_clusters
    from cxr_retrieval.archive.patience import Patience
    from cxr_retrieval.cases.pseudonyms import open_pseudonyms
    from cxr_retrieval.gallery.aliases import the_version
    from cxr_retrieval.gallery.store import CLUSTERS, Store

    if new and undo:
        raise UsageError("--new with --undo", expected="one of them", next_step="leave one out")
    with ExitStack() as opened, until_interrupted() as stop:
        wait = Patience(stop, patience, seen.tell, seen.watch)
        version = first_contact(wait, "milvus", lambda: the_version(milvus, space))
        keys = opened.enter_context(open_pseudonyms(pseudonyms))
        store = opened.enter_context(first_contact(wait, "milvus", lambda: Store(milvus, version, keys)))
        about = {"model_version": version, "new": new, "undo": undo, "dry_run": dry_run}
        operation = opened.enter_context(audited(audit.expanduser(), "cluster", about))
        if undo:
            had = bool(store.clusters)
            if had and not dry_run:
                store.keep({CLUSTERS: ""})
            operation.outcome["had_clusters"] = had
            _print_undone(version, had=had, dry_run=dry_run, json=json)
            return
        if new:
            with seen.bar("putting new cases into clusters") as bar:
                added = add_new(store, wait, bar.advance, dry_run=dry_run)
            operation.outcome.update(added=sum(added.cases.values()), whole=added.whole)
            _print_added(added, dry_run=dry_run, json=json)
            if not added.whole:
                seen.tell("interrupted; the other cases are in no cluster yet. Next: give the same command again")
                raise typer.Exit(INTERRUPTED)
            return
        with seen.bar("comparing cases", store.count()) as bar:
            found = find_clusters(store, wait, bar.advance, k=neighbours, seeds=seeds)
        if found is None:
            seen.tell("interrupted; nothing was changed. Next: give the same command again")
            raise typer.Exit(INTERRUPTED)
        if not dry_run:
            with seen.bar("writing clusters", len(found.of)) as bar:
                whole = keep_clusters(store, found, wait, bar.advance)
            if not whole:
                seen.tell("interrupted; no clusters are in force until all are written. Next: give the same command again")
                raise typer.Exit(INTERRUPTED)
        operation.outcome.update(run=found.clustering.run, cases=len(found.of), clusters=len(found.clustering.clusters))
    _print(found.clustering, dry_run=dry_run, json=json)


def _print_undone(version: str, *, had: bool, dry_run: bool, json: bool) -> None:
    if json:
        print_json({"model_version": version, "had_clusters": had, "dry_run": dry_run})
    elif not had:
        typer.echo(f"the gallery of {version} has no clusters; nothing to forget")
    else:
        typer.echo(f"the gallery of {version} {'would forget' if dry_run else 'has forgotten'} its clusters")


def _print_added(added: Added, *, dry_run: bool, json: bool) -> None:
    count = sum(added.cases.values())
    if json:
        cases = {str(number): some for number, some in sorted(added.cases.items())}
        print_json({"run": added.clustering.run, "added": count, "to": cases, "whole": added.whole, "dry_run": dry_run})
    else:
        state = "would be put" if dry_run else "put"
        typer.echo(f"{count} new cases {state} into {len(added.cases)} of {len(added.clustering.clusters)} clusters")


def _print(clustering: Clustering, *, dry_run: bool, json: bool) -> None:
    if json:
        print_json({**clustering.as_json(), "dry_run": dry_run})
        return
    console, stability = results(), clustering.stability
    state = "nothing is kept" if dry_run else "`cxr query --method cluster` looks in them from now on"
    console.print(f"{clustering.cases} cases in {len(clustering.clusters)} clusters; {state}", soft_wrap=True)
    console.print(
        f"weighted modularity {max(clustering.modularities):.3f}, of each seed {', '.join(f'{q:.3f}' for q in clustering.modularities)}"
    )
    if stability is not None:
        console.print(f"adjusted Rand index between seeds: {stability['mean']:.3f} in the mean, {stability['least']:.3f} at least")
    table = Table("cluster", "cases", "labels", box=None, header_style="dim", pad_edge=False)
    for number, one in enumerate(clustering.clusters[:_SHOWN]):
        table.add_row(str(number), str(one.cases), ", ".join(f"{label} {count}" for label, count in one.labels.items()))
    console.print(table)
    if len(clustering.clusters) > _SHOWN:
        console.print(f"{len(clustering.clusters) - _SHOWN} smaller ones more", style="dim")
