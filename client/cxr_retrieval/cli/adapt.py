"""`cxr adapt`: reads its options, calls the library, prints."""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from cxr_retrieval.cli import options
from cxr_retrieval.cli.console import INTERRUPTED, print_json, print_problems, results
from cxr_retrieval.cli.watched import Watched, first_contact
from cxr_retrieval.errors import UsageError
from cxr_retrieval.interruption import until_interrupted
from cxr_retrieval.settings import MilvusSettings, PseudonymSettings, TritonSettings

if TYPE_CHECKING:
    from cxr_retrieval.archive.adapting import AdaptReport
    from cxr_retrieval.retrieval.site import Adapted


@options.with_servers
def adapt(
    triton: TritonSettings,
    milvus: MilvusSettings,
    pseudonyms: PseudonymSettings,
    seen: Watched,
    source: Annotated[str, typer.Option(metavar="NAME", envvar="CXR_SOURCE", help="The hospital, as its cases have it under source.")],
    paths: Annotated[list[str] | None, typer.Argument(metavar="[PATH...]", help=options.INPUTS)] = None,
    share: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LABEL[=NUMBER]",
            help="A label that the hospital sees, and how often; give one for each. Without numbers all are alike.",
        ),
    ] = None,
    split: Annotated[str | None, typer.Option(help="Of a manifest only rows of this split; without it all but 'extra'.")] = None,
    no_gate: options.NoGate = False,
    undo: Annotated[bool, typer.Option("--undo", help="Forget the hospital's profile; its films are asked about like any other.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would change, keep nothing.")] = False,
    patience: options.Patience = options.PATIENCE_DEFAULT,
    audit: options.Audit = options.AUDIT_DEFAULT,
    json: options.Json = False,
) -> None:
    """Learn from a few hundred films of a hospital, without labels, how its films must be asked about; `--source NAME` then uses it.

    Give films as they come, of all that the hospital sees. Nothing of them is kept, and no case of the gallery changes.
    """
    from cxr_retrieval.archive.adapting import adapt as learn
    from cxr_retrieval.archive.audit import audited
    from cxr_retrieval.archive.inputs import find_inputs
    from cxr_retrieval.archive.objects import ObjectReader
    from cxr_retrieval.archive.patience import Patience
    from cxr_retrieval.cases.pseudonyms import open_pseudonyms
    from cxr_retrieval.gallery.aliases import the_version
    from cxr_retrieval.gallery.spaces import FILM
    from cxr_retrieval.gallery.store import SITES, Store
    from cxr_retrieval.inference.triton import TritonClient
    from cxr_retrieval.radiograph.decoding import DecodingLimits
    from cxr_retrieval.retrieval.site import normalised, read_sites, sites_as_text

    if undo == bool(paths):
        raise UsageError(
            "--undo with films" if undo else "nothing to learn from",
            expected="PATHs of films, or --undo",
            next_step="see `cxr adapt --help`",
        )
    shares = shares_of(share or [])
    about = {"source": source, "undo": undo, "dry_run": dry_run}
    if undo:
        version = the_version(milvus)
        with (
            audited(audit.expanduser(), "adapt", {"model_version": version, **about}),
            open_pseudonyms(pseudonyms) as keys,
            Store(milvus, version, keys, space=FILM) as store,
        ):
            left = dict(read_sites(store.sites))
            _refuse_unknown(source, list(left))
            del left[source]
            if not dry_run:
                store.keep({SITES: sites_as_text(left)})
        _print_undone(source, list(left), dry_run=dry_run, json=json)
        return
    normalised(shares)  # refused before anything is looked at
    with ExitStack() as opened, until_interrupted() as stop:
        wait = Patience(stop, patience, seen.tell, seen.watch)
        reader = opened.enter_context(ObjectReader(DecodingLimits(), wait))
        client = opened.enter_context(first_contact(wait, "triton", lambda: TritonClient(triton)))
        keys = opened.enter_context(open_pseudonyms(pseudonyms))
        store = opened.enter_context(first_contact(wait, "milvus", lambda: Store(milvus, client.model_version, keys)))
        operation = opened.enter_context(audited(audit.expanduser(), "adapt", {"model_version": client.model_version, **about}))
        with seen.bar("looking at films") as bar:
            report = learn(
                source,
                find_inputs(paths or [], reader, split=split, stop=stop),
                shares,
                reader,
                client,
                store,
                gate=not no_gate,
                assumed=not any("=" in one for one in share or []),
                advance=bar.advance,
                stop=stop,
                tell=seen.tell,
                watch=seen.watch,
                patience_s=patience,
            )
        if report.found is not None and not dry_run:
            store.keep({SITES: sites_as_text({**read_sites(store.sites), source: report.found.site})})
        operation.outcome.update(films=report.found.site.films if report.found else 0, failed=len(report.problems))
    if seen.speaks:
        print_problems(report.problems)
    if report.found is None:
        seen.tell("interrupted; nothing was kept. Next: give the same command again")
        raise typer.Exit(INTERRUPTED)
    _print(report, report.found, dry_run=dry_run, json=json)


def shares_of(given: list[str]) -> dict[str, float]:
    """What --share says: label → number, 1 for each where none has one.

    Raises:
        UsageError: One is no LABEL or LABEL=NUMBER, a label comes twice, or some have a number and some have none.
    """
    shares: dict[str, float] = {}
    for one in given:
        label, equals, number = one.partition("=")
        try:
            share = float(number) if equals else 1.0
        except ValueError:
            share = math.nan
        if not label or math.isnan(share) or label in shares:
            raise UsageError(
                f"--share {one!r} says nothing" if label not in shares else f"--share {label} comes twice",
                expected="LABEL=NUMBER, once for each label, such as control=0.7",
                next_step="correct --share",
            )
        shares[label] = share
    if len({"=" in one for one in given}) > 1:
        raise UsageError("--share with a number and without", expected="numbers for all labels, or for none", next_step="correct --share")
    return shares


def _refuse_unknown(source: str, known: list[str]) -> None:
    if source not in known:
        raise UsageError(
            f"{source} has no profile in this gallery",
            expected=", ".join(sorted(known)) or "one that has; there is none",
            next_step="correct --source",
        )


def _print_undone(source: str, kept: list[str], *, dry_run: bool, json: bool) -> None:
    if json:
        print_json({"source": source, "undone": not dry_run, "profiles": sorted(kept), "dry_run": dry_run})
    else:
        typer.echo(f"the profile of {source} {'would be' if dry_run else 'is'} forgotten; {len(kept)} left")


def _print(report: AdaptReport, found: Adapted, *, dry_run: bool, json: bool) -> None:
    if json:
        told = {"unusable": len(report.problems), "copies": report.copies, "dry_run": dry_run}
        print_json({**found.as_json(), **told})
        return
    console, site = results(), found.site
    state = "nothing is kept" if dry_run else f"--source {site.name} answers by it from now on"
    console.print(f"learnt from {site.films} films of {site.name}, {len(report.problems)} unusable, {report.copies} copies; {state}")
    table = Table("", "share said", "films before", "now", box=None, header_style="dim", pad_edge=False)
    for label in sorted({*site.shares, *found.before}):
        said = f"{site.shares[label]:.0%}" if label in site.shares else "–"
        table.add_row(label, said, str(found.before.get(label, 0)), str(found.after.get(label, 0)))
    console.print(table)
    console.print(f"{found.changed} of {site.films} films get another label than their nearest cases vote for")
    console.print(
        f"were one share a quarter larger or smaller than said, up to {found.unsteady:.0%} of them would get yet another", style="dim"
    )
    for warning in found.warnings:
        console.print(Text.assemble(("warning:", "yellow"), f" {warning}"), soft_wrap=True)
