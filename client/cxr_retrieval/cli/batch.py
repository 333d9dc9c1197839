"""`cxr batch`: reads its options, calls the library, prints."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from cxr_retrieval.archive.results import Format, write_table
from cxr_retrieval.cli import options
from cxr_retrieval.cli.console import INTERRUPTED, print_json
from cxr_retrieval.cli.watched import Watched, first_contact
from cxr_retrieval.errors import InputError, UsageError
from cxr_retrieval.interruption import until_interrupted
from cxr_retrieval.settings import EngineName, EngineSettings, MilvusSettings, PseudonymSettings, TritonSettings


@options.with_servers
def batch(
    triton: TritonSettings,
    milvus: MilvusSettings,
    pseudonyms: PseudonymSettings,
    engine: EngineSettings,
    seen: Watched,
    paths: Annotated[list[str], typer.Argument(metavar="PATH...", help=options.INPUTS)],
    out: Annotated[Path, typer.Option(help="Results; its journal, by which an interrupted run goes on, lies beside it.")],
    form: Annotated[Format, typer.Option("--format", help="A line of JSON for each input, or a table.")] = Format.jsonl,
    top_k: Annotated[int, typer.Option(min=1, max=1000, help="How many cases to retrieve and let vote.")] = 10,
    where: options.Where = "",
    text: options.Words = "",
    include_own: Annotated[
        bool, typer.Option("--include-own", help="Let films of the same patient, and the same picture, vote like any other.")
    ] = False,
    no_gate: options.NoGate = False,
    error_rate: options.ErrorRate = options.ERROR_RATE_DEFAULT,
    balance: options.Balance = options.BALANCE_DEFAULT,
    source: options.Source = None,
    embed_only: Annotated[
        bool, typer.Option("--embed-only", help="Embeddings and appearances instead of answers; no gallery is needed.")
    ] = False,
    attention: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Also draw contour and attention over each film, one PNG each.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Of a manifest only rows of this split; without it all but 'extra'.")] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Ask again what failed in an earlier run.")] = False,
    patience: options.Patience = options.PATIENCE_DEFAULT,
    audit: options.Audit = options.AUDIT_DEFAULT,
    json: options.Json = False,
) -> None:
    """Answer a whole archive. Kill it, lose a server, fill the disk: the same command finishes the rest, and answers nothing twice."""
    from cxr_retrieval.archive.objects import ObjectReader
    from cxr_retrieval.archive.patience import Patience
    from cxr_retrieval.radiograph.decoding import DecodingLimits

    if engine.name is EngineName.ray and milvus.is_lite and not embed_only:
        raise UsageError(
            "a gallery of Milvus Lite cannot be asked by several workers",
            expected="--milvus http://HOST:PORT",
            got=milvus.uri,
            next_step="serve it (`cxr serve`), or give a Milvus server",
        )
    if embed_only and attention:
        raise UsageError("--embed-only with --attention", expected="one of them", next_step="leave one out")
    lines = out if form is Format.jsonl else out.with_suffix(".jsonl")  # from which the table is written at the end
    started = time.monotonic()
    with ExitStack() as opened, until_interrupted() as stop:
        wait = Patience(stop, patience, seen.tell, seen.watch)
        reader = opened.enter_context(
            ObjectReader(DecodingLimits(), wait)
        )  # first: its workers start while the rest is loaded and connected
        from cxr_retrieval.archive import pipeline
        from cxr_retrieval.archive.audit import audited
        from cxr_retrieval.archive.batch import Answering, BatchOptions, asker, run_batch
        from cxr_retrieval.archive.inputs import find_inputs
        from cxr_retrieval.archive.journal import Journal
        from cxr_retrieval.archive.stages import Plan
        from cxr_retrieval.cases.pseudonyms import open_pseudonyms
        from cxr_retrieval.cli.on_cluster import networks_of_workers, on_cluster
        from cxr_retrieval.gallery.balance import checked
        from cxr_retrieval.gallery.store import Store
        from cxr_retrieval.inference.triton import TritonClient
        from cxr_retrieval.retrieval.site import read_sites

        client = opened.enter_context(first_contact(wait, "triton", lambda: TritonClient(triton))) if engine.asks_triton else None
        networks, version = networks_of_workers(engine, triton, client)
        store = clause = profile = None
        if not embed_only:
            keys = opened.enter_context(open_pseudonyms(pseudonyms))
            gallery = store = opened.enter_context(first_contact(wait, "milvus", lambda: Store(milvus, version, keys)))
            clause = first_contact(wait, "milvus", lambda: gallery.clause(where, text))
            profile = read_sites(store.sites).get(source) if source else None
        decisive = {
            "model_version": version,
            "gallery": None if embed_only else milvus.uri,
            "top_k": top_k,
            "where": clause.given if clause else "",
            "include_own": include_own,
            "gate": not no_gate,
            "error_rate": error_rate,
            "balance": None if embed_only else checked(balance),
            **({"source": source, "profile": profile and asdict(profile)} if source and not embed_only else {}),
            "attention": str(attention) if attention else None,
        }
        journal = opened.enter_context(Journal(lines, decisive))
        if attention:
            attention.mkdir(mode=0o700, parents=True, exist_ok=True)
        if retry_failed:
            journal.retry_failed()
        before = journal.counts()
        about = {"model_version": version, "journal": journal.id}
        asked = BatchOptions(store, top_k, clause, include_own, attention, not no_gate, error_rate, balance, source)
        if client is not None and engine.name is EngineName.local:
            through = pipeline.here(reader, client)
        else:
            there = replace(asked, store=None, where=None)
            answers = None if embed_only else partial(asker, milvus, version, where, text, there)
            outputs = Answering(version, asked, seen.watch).outputs
            plan = Plan(networks, version, outputs, answers, gpu=engine.on_gpus, patience_s=patience)
            through, _ = opened.enter_context(on_cluster(engine, pseudonyms, plan))
        with audited(audit.expanduser(), "batch", about) as operation, seen.bar("answering") as bar:

            def found(looked_at: int, all_found: bool) -> None:
                if all_found:
                    seen.tell(f"{looked_at} inputs found")
                    bar.describe("answering", to_go=journal.counts()["pending"])
                else:
                    bar.describe(f"answering; {looked_at} inputs found so far")

            complete = run_batch(
                journal,
                through,
                version,
                asked,
                stop=stop,
                advance=bar.advance,
                tell=seen.tell,
                inputs=find_inputs(paths, reader, split=split, left_out=attention, stop=stop),
                found=found,
                noted=operation.note,
                watch=seen.watch,
                patience_s=patience,
            )
            operation.outcome.update(before=before, after=journal.counts())
        seconds, counts = time.monotonic() - started, journal.counts()
        done = before["pending"] - counts["pending"] + sum(counts.values()) - sum(before.values())
        if complete:
            journal.finish()
            if form is not Format.jsonl:
                write_table(lines, out, form)
        summary: dict[str, Any] = {
            "model_version": version,
            "inputs": sum(counts.values()),
            **counts,
            "copies": journal.copies(),
            "seconds": round(seconds, 1),
            "per_second": round(done / seconds, 2),
            "results": str(out),
            "dead_letters": str(journal.dead_letters) if counts["failed"] else None,
        }
    _report(summary, seen, complete=complete, json=json)


def _report(summary: dict[str, Any], seen: Watched, *, complete: bool, json: bool) -> None:
    if json:
        print_json(summary)
    else:
        told = ", ".join(f"{summary[name]} {name}" for name in ("answered", "refused", "failed", "pending") if summary[name])
        copies = f", {summary['copies']} of them copies of another" if summary["copies"] else ""
        typer.echo(
            f"{summary['inputs']} inputs: {told or 'nothing to do'}{copies}; {summary['seconds']} s, {summary['per_second']} a second; "
            f"{summary['results']}"
        )
    if not complete:
        seen.tell("interrupted; what was in flight is kept. Next: give the same command again, it goes on from here")
        raise typer.Exit(INTERRUPTED)
    if summary["failed"] or summary["refused"]:
        reasons = f"see {summary['dead_letters']}; --retry-failed asks them again" if summary["failed"] else "see their reasons"
        raise InputError(f"{summary['failed']} inputs failed, {summary['refused']} were refused", next_step=reasons)
