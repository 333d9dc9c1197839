"""`cxr query`: reads its options, calls the library, prints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from cxr_retrieval.cli import options
from cxr_retrieval.cli.console import print_json, results, talk
from cxr_retrieval.errors import ImageError, UsageError
from cxr_retrieval.settings import Match, Method, MilvusSettings, PseudonymSettings, SpaceName, TritonSettings

if TYPE_CHECKING:
    from cxr_retrieval.gallery.store import Neighbour
    from cxr_retrieval.retrieval.clusters import Clustering
    from cxr_retrieval.retrieval.query import QueryResult


@options.with_servers
def query(
    triton: TritonSettings,
    milvus: MilvusSettings,
    pseudonyms: PseudonymSettings,
    image: Annotated[
        Path | None, typer.Argument(help="A frontal chest radiograph: DICOM, PNG, JPEG or TIFF; without one --text is the question.")
    ] = None,
    top_k: Annotated[int, typer.Option(min=1, max=1000, help="How many cases to retrieve and let vote.")] = 10,
    where: options.Where = "",
    text: Annotated[
        str,
        typer.Option(
            "--text",
            metavar="WORDS",
            help="Only cases whose clinical notes hold all these words, a '\"phrase so\"', and no '-word'. Without IMAGE, or with "
            "--text-weight, it is what is asked: cases whose films are like it, in the space of reports.",
        ),
    ] = "",
    text_weight: Annotated[
        float | None,
        typer.Option(min=0, max=1, metavar="W", help="Ask with film and text together, the text weighed W and the film 1 − W."),
    ] = None,
    match: Annotated[Match, typer.Option(help="In the space of reports: compare the cases' films, or their reports.")] = Match.film,
    json: options.Json = False,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write one self-contained page.")] = None,
    picture: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write one PNG.")] = None,
    patient: Annotated[
        str | None,
        typer.Option(
            metavar="ID", help="The patient_id of this patient, whose films in the gallery do not vote.", show_default="DICOM's Patient ID"
        ),
    ] = None,
    include_own: Annotated[
        bool, typer.Option("--include-own", help="Let films of the same patient, and the same picture, vote like any other.")
    ] = False,
    no_gate: options.NoGate = False,
    error_rate: options.ErrorRate = options.ERROR_RATE_DEFAULT,
    balance: options.Balance = options.BALANCE_DEFAULT,
    source: options.Source = None,
    space: options.Space = options.SPACE_DEFAULT,
    method: Annotated[
        Method, typer.Option(help="nearest: the nearest of all cases; cluster: those of the closest clusters that `cxr cluster` has made.")
    ] = Method.nearest,
    outcome: Annotated[
        bool, typer.Option("--outcome", help="Also what becomes of such patients, by the outcome model that the server has.")
    ] = False,
    fact: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="For --outcome, what is known of the patient: age=67, sex=F; may be given several times."),
    ] = None,
    audit: options.Audit = options.AUDIT_DEFAULT,
) -> None:
    """Find the confirmed cases of other patients that look most like one radiograph, or like what a text says."""
    if fact and not outcome:
        raise UsageError("--fact without --outcome", expected="an outcome model to tell it to", next_step="add --outcome")
    if text_weight is not None and not (image and text):
        raise UsageError("--text-weight without both", expected="IMAGE and --text, which it weighs", next_step="give both, or leave it out")
    if image is None:
        refused = {"--html": html, "--picture": picture, "--outcome": outcome, "--patient": patient}
        if not text or any(refused.values()):
            given = ", ".join(name for name, value in refused.items() if value)
            raise UsageError(
                f"{given} without a film" if text else "nothing to ask with",
                expected="IMAGE, or --text with what is sought",
                next_step="add IMAGE" if text else "see `cxr query --help`",
            )
        _query_text(triton, milvus, pseudonyms, text, top_k, where, match, audit, json=json)
        return
    from cxr_retrieval.radiograph.decoding import FilmReader

    if text_weight is not None:
        space = SpaceName.reports
    with FilmReader() as reader:  # first: its workers start while the rest is loaded and connected
        from cxr_retrieval.archive.audit import audited, film_pseudonym
        from cxr_retrieval.cases.pseudonyms import open_pseudonyms
        from cxr_retrieval.gallery.spaces import SPACES
        from cxr_retrieval.gallery.store import Store
        from cxr_retrieval.inference.triton import TritonClient
        from cxr_retrieval.retrieval.outcome import OutcomeModel
        from cxr_retrieval.retrieval.picture import write_html, write_montage
        from cxr_retrieval.retrieval.query import query as answer
        from cxr_retrieval.retrieval.reports import ReportReader

        compared = SPACES[space]
        with (
            TritonClient(triton) as client,
            open_pseudonyms(pseudonyms) as keys,
            Store(milvus, compared.version(client), keys, space=compared) as store,
            audited(audit.expanduser(), "query", {"model_version": store.model_version, "film": film_pseudonym(image)}) as operation,
        ):
            wording = None if text_weight is None else ReportReader.served_by(client).worded(client, text, text_weight)
            model = OutcomeModel.served_by(client) if outcome else None
            result = answer(
                image,
                reader,
                client,
                store,
                top_k=top_k,
                where=where,
                text="" if wording else text,
                patient=patient,
                include_own=include_own,
                gate=not no_gate,
                error_rate=error_rate,
                balance=balance,
                source=source,
                method=method,
                outcome=model,
                facts=model.read(fact or []) if model else {},
                wording=wording,
                match=match,
            )
            operation.outcome["answer"] = "refused" if result.ood.refused else "answered"
            if html:
                write_html(result, html, reader, store.thumbnails)
            if picture:
                write_montage(result, picture, reader, store.thumbnails)
    if json:
        print_json(result.as_json())
    else:
        print_result(result, str(image))
    for path in filter(None, (html, picture)):
        talk().print(f"wrote {path}")
    if result.ood.refused:
        raise ImageError(
            f"{image.name}: refused",
            expected="an upright frontal chest radiograph",
            got=result.ood.reason or "",
            next_step="look at the picture; if it is one, --no-gate lets the cases vote",
        )


def _query_text(
    triton: TritonSettings,
    milvus: MilvusSettings,
    pseudonyms: PseudonymSettings,
    text: str,
    top_k: int,
    where: str,
    match: Match,
    audit: Path,
    *,
    json: bool,
) -> None:
    """A question without a film. What it says is not written into the audit log."""
    from cxr_retrieval.archive.audit import audited
    from cxr_retrieval.cases.pseudonyms import open_pseudonyms
    from cxr_retrieval.gallery.spaces import REPORTS
    from cxr_retrieval.gallery.store import Store
    from cxr_retrieval.inference.triton import TritonClient
    from cxr_retrieval.retrieval.reports import ReportReader, query_text

    with (
        TritonClient(triton) as client,
        open_pseudonyms(pseudonyms) as keys,
        Store(milvus, REPORTS.version(client), keys, space=REPORTS) as store,
        audited(audit.expanduser(), "query", {"model_version": store.model_version, "film": None}) as operation,
    ):
        reader = ReportReader.served_by(client)
        answer = query_text(text, reader, client, store, top_k=top_k, where=store.clause(where), match=match)
        operation.outcome["answer"] = "answered"
    if json:
        print_json(answer.as_json())
        return
    from cxr_retrieval.retrieval.picture import DISCLAIMER

    console, vote = results(), answer.prediction
    console.print(Text.assemble("cases whose ", (f"{match.value}s", "bold"), " are most like ", (repr(text), "bold")))
    shares = vote.findings or vote.scores
    console.print(f"by weight of similarity: {', '.join(f'{name} {share:.0%}' for name, share in shares.items())}")
    console.print(_table(answer.neighbours, numbered=True))
    console.print(Text(f"of these {len(answer.neighbours)} cases: {'; '.join(answer.summary.lines())}"), soft_wrap=True)
    for warning in answer.warnings:
        console.print(Text.assemble(("warning:", "yellow"), f" {warning}"))
    timings = ", ".join(f"{name} {value:.1f} ms" for name, value in answer.timings_ms.items())
    console.print(f"{timings}. Model {answer.model_version}. {DISCLAIMER}", style="dim")


def print_result(result: QueryResult, name: str) -> None:
    """The answer as a table on stdout; `name` is what its reader calls the film."""
    from cxr_retrieval.retrieval.picture import DISCLAIMER

    console = results()
    vote = result.prediction
    if vote.label is None:
        console.print(Text.assemble((name, "bold"), ": ", ("no label", "bold yellow"), f", {result.ood.reason}"))
        console.print("the nearest cases, for information only; they did not vote:", style="bold")
    else:
        shares = ", ".join(f"{label} {share:.0%}" for label, share in vote.scores.items())
        console.print(Text.assemble((name, "bold"), ": ", (vote.label, "bold"), f", confidence {vote.confidence:.0%}   ({shares})"))
        console.print(result.sentence)
        if vote.findings:
            console.print(f"by finding: {', '.join(f'{name} {share:.0%}' for name, share in vote.findings.items())}")
        if result.trust.labels is not None:
            console.print(f"labels at an error rate of {result.trust.error_rate:g}: {', '.join(result.trust.labels) or 'none'}")
        if result.trust.abstained:
            console.print(Text.assemble(("do not rely on the label: ", "yellow"), result.trust.abstained))
    console.print(_table(result.neighbours, numbered=True, clustering=result.clustering))
    console.print(Text(f"of these {len(result.neighbours)} cases: {'; '.join(result.summary.lines())}"), soft_wrap=True)
    for one in result.outcomes:
        console.print(Text(one.words()), soft_wrap=True)
    if result.own:
        console.print("earlier films of this patient, or this very picture; not in the vote:", style="bold")
        console.print(_table(result.own, numbered=False))
    for warning in result.warnings:
        console.print(Text.assemble(("warning:", "yellow"), f" {warning}"))
    timings = ", ".join(f"{name} {value:.1f} ms" for name, value in result.timings_ms.items())
    how = f"balance {result.balance:g}" if result.space is SpaceName.film else f"space {result.space.value}"
    console.print(f"{timings}. Model {result.model_version}, {how}. {DISCLAIMER}", style="dim")


def _table(hits: Sequence[Neighbour], *, numbered: bool, clustering: Clustering | None = None) -> Table:
    from cxr_retrieval.retrieval.picture import facts_line

    table = Table(box=None, header_style="dim", pad_edge=False)
    for name in ("rank", "image", "similarity", "label"):
        table.add_column(name, no_wrap=True)
    if clustering is not None:
        table.add_column("cluster")
    table.add_column("clinical facts")
    for rank, hit in enumerate(hits, start=1):
        shown = (str(rank) if numbered else "–", hit.case.image_id, f"{hit.similarity:.4f}", hit.case.label)
        table.add_row(*shown, *_cluster(hit, clustering), facts_line(hit.case.metadata))
    return table


def _cluster(hit: Neighbour, clustering: Clustering | None) -> tuple[str, ...]:
    """What is said of a case's cluster, such as "3: 41 of 52 covid19"; nothing where it is not asked for."""
    number = None if clustering is None else clustering.number(hit.case.cluster)
    if clustering is None or number is None:
        return ()
    cluster = clustering.clusters[number]
    label, count = next(iter(cluster.labels.items()))
    return (f"{number}: {count} of {cluster.cases} {label}",)
