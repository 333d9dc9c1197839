"""`cxr view`: reads its options, calls the library, prints where the page is."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from cxr_retrieval.cli import options
from cxr_retrieval.cli.console import results as print_results
from cxr_retrieval.cli.console import talk
from cxr_retrieval.errors import SetupError, UsageError
from cxr_retrieval.settings import MilvusSettings, PseudonymSettings, Tls, TritonSettings

_LOCKED = "Encryption and credentials"


@options.with_servers
def view(
    triton: TritonSettings,
    milvus: MilvusSettings,
    pseudonyms: PseudonymSettings,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Where the page is served; 0 takes any free port.")] = 8080,
    host: Annotated[
        str, typer.Option(help="Address to listen on. Beyond this machine over TLS, to who has the token or a certificate.")
    ] = "127.0.0.1",
    results: Annotated[
        list[Path] | None, typer.Option(metavar="JSONL", help="Results of `cxr batch`, as a worklist; may be given several times.")
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            envvar="CXR_SOURCE",
            help="The hospital that dropped films come from: its profile votes (`cxr adapt`); the page says if the gallery has none of it.",
        ),
    ] = None,
    max_upload: Annotated[int, typer.Option(min=1, max=1024, metavar="MIB", help="Of one file that is dropped.")] = 256,
    server_name: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Under which browsers may reach the page, beside IP addresses and localhost.")
    ] = None,
    tls_cert: Annotated[
        Path | None,
        typer.Option(envvar="CXR_VIEW_TLS_CERT", help="Certificate (PEM): the page is served over TLS.", rich_help_panel=_LOCKED),
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option(envvar="CXR_VIEW_TLS_KEY", help="Private key of --tls-cert.", rich_help_panel=_LOCKED)
    ] = None,
    tls_client_ca: Annotated[
        Path | None,
        typer.Option(
            envvar="CXR_VIEW_TLS_CLIENT_CA",
            help="Authorities (PEM): only browsers that show a certificate of theirs are served.",
            rich_help_panel=_LOCKED,
        ),
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(
            envvar="CXR_VIEW_TOKEN_FILE",
            help="File with the token that the page asks for; or CXR_VIEW_TOKEN holds it.",
            rich_help_panel=_LOCKED,
        ),
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Serve whoever reaches --host, unlocked.", rich_help_panel=_LOCKED)] = False,
    collections: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", envvar="CXR_COLLECTIONS", help="Where collections of cases are kept.", show_default="beside the audit log"
        ),
    ] = None,
    maps: options.Maps = options.MAPS_DEFAULT,
    audit: options.Audit = options.AUDIT_DEFAULT,
) -> None:
    """Serve the page that shows a query: drop a film, see its neighbours, compare. Runs until Ctrl-C."""
    import threading

    from cxr_retrieval.serving.access import Access
    from cxr_retrieval.view.access import refuse_exposure
    from cxr_retrieval.view.room import ReadingRoom
    from cxr_retrieval.view.server import listening, serve, url_of
    from cxr_retrieval.view.servers import Servers
    from cxr_retrieval.view.web import application
    from cxr_retrieval.view.worklist import Results

    console = talk()
    tls = Tls(tls_client_ca, tls_cert, tls_key) if tls_cert or tls_key or tls_client_ca else None
    access = Access(tls, options.secret(token_file, "CXR_VIEW_TOKEN"))
    try:
        refuse_exposure(host, access)
    except SetupError as error:
        if not insecure:
            raise
        console.print(Text.assemble(("warning", "yellow"), f"  {error.what}; {error.expected} would not let them"), soft_wrap=True)
    for path in results or ():
        if not path.is_file():
            raise UsageError(
                f"{path}: no results", expected="a file of `cxr batch --out`", got="nothing there", next_step="correct --results"
            )
    lists = [Results(path) for path in results or ()]
    servers, kept = Servers(triton, milvus, pseudonyms), collections and collections.expanduser()
    with listening(host, port) as at, closing(ReadingRoom(servers, lists, audit.expanduser(), source, kept, maps)) as room:
        app = application(room, access, server_name or (), int(at.getsockname()[1]), max_upload * 2**20)
        threading.Thread(target=room.read_results, name="cxr-results", daemon=True).start()

        def ready() -> None:
            print_results().print(url_of(at, access), soft_wrap=True)
            console.print("the page is served there; stop with Ctrl-C")

        try:
            serve(app, at, access, ready)
        except KeyboardInterrupt:
            console.print("stopped")
