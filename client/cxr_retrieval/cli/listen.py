"""`cxr listen`: reads its options, calls the library, prints."""

from __future__ import annotations

import importlib.util
import math
import threading
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from cxr_retrieval.cli import options
from cxr_retrieval.cli.console import print_json, talk
from cxr_retrieval.cli.console import results as print_results
from cxr_retrieval.cli.watched import Watched, first_contact
from cxr_retrieval.errors import SetupError, UsageError
from cxr_retrieval.interruption import until_interrupted
from cxr_retrieval.settings import DEFAULT_SPOOL, MilvusSettings, PseudonymSettings, Tls, TritonSettings

if TYPE_CHECKING:
    from cxr_retrieval.pacs.arrivals import Arrivals, Standing
    from cxr_retrieval.pacs.node import Node

_LOCKED = "Encryption and credentials"
_SWEEP_S = 60.0


@options.with_servers
def listen(
    triton: TritonSettings,
    milvus: MilvusSettings,
    pseudonyms: PseudonymSettings,
    seen: Watched,
    out: Annotated[Path | None, typer.Option(help="Results, a line of JSON for each instance; is appended to.")] = None,
    aet: Annotated[str, typer.Option(help="Our AE title.")] = "CXR",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Where the node listens; 0 takes any free port.")] = 11112,
    host: Annotated[
        str, typer.Option(help="Address to listen on. Beyond this machine over TLS, to who shows a certificate; or --unencrypted.")
    ] = "127.0.0.1",
    rules: Annotated[
        Path | None, typer.Option(metavar="TOML", help="Who may send, which gallery is asked, where answers go; see docs/hospital.md.")
    ] = None,
    keep: Annotated[
        str, typer.Option(metavar="nothing|deidentified|received", help="Without --rules: what stays of an instance once it is answered.")
    ] = "nothing",
    spool: Annotated[
        Path, typer.Option(envvar="CXR_SPOOL", help="Folder for what waits: films that came, answers to be sent.")
    ] = DEFAULT_SPOOL,
    tls_cert: Annotated[
        Path | None,
        typer.Option(envvar="CXR_LISTEN_TLS_CERT", help="Certificate (PEM): the node speaks TLS.", rich_help_panel=_LOCKED),
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option(envvar="CXR_LISTEN_TLS_KEY", help="Private key of --tls-cert.", rich_help_panel=_LOCKED)
    ] = None,
    tls_client_ca: Annotated[
        Path | None,
        typer.Option(
            envvar="CXR_LISTEN_TLS_CLIENT_CA",
            help="Authorities (PEM): only callers that show a certificate of theirs are served.",
            rich_help_panel=_LOCKED,
        ),
    ] = None,
    unencrypted: Annotated[
        bool, typer.Option("--unencrypted", help="Serve whoever reaches --host, as plain DICOM.", rich_help_panel=_LOCKED)
    ] = False,
    status: Annotated[bool, typer.Option("--status", help="Say how things stand in the spool, and end.")] = False,
    retry: Annotated[bool, typer.Option("--retry", help="Also send again what was given up.")] = False,
    audit: options.Audit = options.AUDIT_DEFAULT,
    json: options.Json = False,
) -> None:
    """Be a DICOM node: films come by C-STORE, are answered, and answers go to the archive. Nothing confirmed is lost."""
    if importlib.util.find_spec("pynetdicom") is None or importlib.util.find_spec("highdicom") is None:
        raise SetupError("what speaks DICOM is not installed", expected="the extra dicom", next_step="pip install 'cxr-retrieval[dicom]'")
    folder = spool.expanduser()
    if status:
        from cxr_retrieval.pacs.arrivals import standing_of

        _print_standing(standing_of(folder), json=json)
        return
    if out is None:
        raise UsageError("no --out", expected="a file for the results", next_step="give --out results.jsonl")
    from cxr_retrieval.pacs.dimse import checked_title
    from cxr_retrieval.pacs.rules import read_rules, rules_of
    from cxr_retrieval.radiograph.decoding import FilmReader

    wanted = rules_of(keep) if rules is None else read_rules(rules)
    tls = _locked(host, tls_cert, tls_key, tls_client_ca, unencrypted=unencrypted)
    title = checked_title(aet, "--aet")
    limits = wanted.node
    destinations = {name: one.opened() for name, one in wanted.destinations.items()}
    with ExitStack() as opened, until_interrupted() as stop:
        reader = opened.enter_context(FilmReader())  # first: its workers start while the rest is loaded and connected
        from cxr_retrieval import __version__
        from cxr_retrieval.archive import pipeline
        from cxr_retrieval.archive.audit import audited
        from cxr_retrieval.archive.patience import Patience
        from cxr_retrieval.archive.watching import Arrived, Listening, Queue
        from cxr_retrieval.cases.pseudonyms import open_pseudonyms
        from cxr_retrieval.inference.triton import TritonClient
        from cxr_retrieval.pacs.arrivals import Arrivals
        from cxr_retrieval.pacs.delivery import Delivery
        from cxr_retrieval.pacs.listening import Answers, Galleries
        from cxr_retrieval.pacs.node import Node, NodeSettings
        from cxr_retrieval.pacs.report import Reporter

        keys = opened.enter_context(open_pseudonyms(pseudonyms))
        arrivals = opened.enter_context(Arrivals(folder, out, most_waiting=limits.waiting, free_bytes=limits.free_mib * 2**20))
        if retry:
            seen.tell(f"{arrivals.retry()} parcels are sent again")
        with (
            _swept(arrivals),
            Delivery(arrivals, destinations, title, limits.patience_h * 3600, tell=seen.tell, watch=seen.watch),
            Node(NodeSettings(title, host, port, tls), wanted, arrivals, reader, lambda what: seen.watch(Arrived(what))) as node,
        ):

            def look() -> Queue:
                now = arrivals.standing()
                return Queue(node.associations, now.waiting, now.oldest_s, sum(now.to_send.values()), now.oldest_parcel_s)

            seen.watch(Listening(look))
            print_results().print(f"{title}@{f'[{host}]' if ':' in host else host}:{node.port}", soft_wrap=True)
            seen.tell("the node listens there, and answers once Triton and Milvus do; stop with Ctrl-C")
            wait = Patience(stop, math.inf, seen.tell, seen.watch)
            client = opened.enter_context(first_contact(wait, "triton", lambda: TritonClient(triton)))
            galleries = opened.enter_context(
                Galleries(milvus, client.model_version, keys, wanted, lambda call: first_contact(wait, "milvus", call))
            )
            about = {"model_version": client.model_version}
            with audited(audit.expanduser(), "listen", about) as operation:
                answers = Answers(
                    arrivals,
                    wanted,
                    galleries,
                    reader,
                    Reporter(keys.secret("objects"), __version__),
                    keys.secret("deidentification"),
                    client.model_version,
                    stop=stop,
                    tell=seen.tell,
                    watch=seen.watch,
                    noted=operation.note,
                )
                pipeline.run(
                    arrivals.feed(stop),
                    reader,
                    client,
                    answers,
                    probe_store=galleries.probe,
                    stop=stop,
                    tell=seen.tell,
                    watch=seen.watch,
                    patience_s=math.inf,
                )
                _wind_up(node, limits.idle_s, seen)
                operation.outcome.update(arrivals.standing().as_json())
    seen.tell("stopped; what waits is answered when the node runs again")


def _locked(host: str, certificate: Path | None, key: Path | None, authority: Path | None, *, unencrypted: bool) -> Tls | None:
    from cxr_retrieval.serving.access import Access, refuse_exposure

    access = Access(Tls(authority, certificate, key) if certificate or key or authority else None)
    try:
        refuse_exposure(host, access)
    except SetupError as error:
        if not unencrypted:
            raise SetupError(
                f"whoever reaches {host} could send films to this node, and read along",
                expected="TLS, and callers that show a certificate",
                got=error.got,
                next_step="give --tls-cert, --tls-key and --tls-client-ca, or say --unencrypted where the network is the PACS's own",
            ) from error
        talk().print(
            Text.assemble(("warning", "yellow"), f"  plain DICOM at {host}: whoever reaches it can send, and read along"), soft_wrap=True
        )
    return access.tls


@contextmanager
def _swept(arrivals: Arrivals) -> Generator[None]:
    """Now and then, and at the end."""
    ended = threading.Event()

    def sweep() -> None:
        while not ended.wait(_SWEEP_S):
            with suppress(SetupError):  # a full disk: the next time
                arrivals.sweep()

    thread = threading.Thread(target=sweep, name="cxr-sweep", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        arrivals.sweep()


def _wind_up(node: Node, grace_s: float, seen: Watched) -> None:
    if open_ones := node.associations:
        seen.tell(f"{open_ones} associations may still end; a second Ctrl-C does not wait for them")
    node.close(grace_s)


def _print_standing(now: Standing, *, json: bool) -> None:
    if json:
        print_json(now.as_json())
        return
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_row("waiting", f"{now.waiting}", f"the oldest for {now.oldest_s:.0f} s" if now.waiting else "")
    for name, count in sorted(now.to_send.items()):
        table.add_row(f"to send to {name}", f"{count}", f"the oldest for {now.oldest_parcel_s:.0f} s")
    for name, count in sorted(now.given_up.items()):
        table.add_row(Text(f"given up for {name}", "red"), f"{count}", "`cxr listen … --retry` sends them again")
    for name, count in now.tally.items():
        table.add_row(name, f"{count}", "")
    print_results().print(table)
