"""`cxr serve`: reads its options, calls the library, prints."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from cxr_retrieval.cli import options
from cxr_retrieval.cli.console import talk
from cxr_retrieval.errors import SetupError, UsageError
from cxr_retrieval.serving.choices import Embedder, Precision, Segmentation, networks_of
from cxr_retrieval.settings import DEFAULT_STORE, Tls

_LOCKED = "Encryption and credentials"


def serve(
    repository: options.Repository = None,
    precision: Annotated[
        Precision, typer.Option(help="Arithmetic of the engines; auto: the fastest that this CPU has and that passed its parity gates.")
    ] = Precision.auto,
    segmentation: Annotated[
        Segmentation, typer.Option(help="The five published networks, or the small one that learnt from them, with a gallery of its own.")
    ] = Segmentation.ensemble,
    embedder: Annotated[
        Embedder, typer.Option(help="The tuned network, or that of Zhong et al. 2020, where its weights are, with a gallery of its own.")
    ] = Embedder.tuned,
    outcome: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Serve this model of `cxr build outcome`, too, for `cxr query --outcome`."),
    ] = None,
    multilabel: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Serve this network of `cxr build multilabel`, too, for --space findings."),
    ] = None,
    multimodal: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Serve these networks of `cxr build multimodal`, too, for --space reports and questions in words."
        ),
    ] = None,
    store: Annotated[Path, typer.Option(help="Gallery to serve: a Milvus Lite folder ending in .db.")] = DEFAULT_STORE,
    no_store: Annotated[bool, typer.Option("--no-store", help="Serve no gallery; clients use another Milvus.")] = False,
    host: Annotated[
        str, typer.Option(help="Address to listen on. Beyond this machine clients must show a certificate, over TLS.")
    ] = "127.0.0.1",
    grpc_port: Annotated[int, typer.Option(min=0, max=65535, help="Triton gRPC; 0 takes any free port, here and below.")] = 8001,
    http_port: Annotated[int, typer.Option(min=0, max=65535, help="Triton HTTP.")] = 8000,
    metrics_port: Annotated[int, typer.Option(min=0, max=65535, help="Prometheus metrics.")] = 8002,
    milvus_port: Annotated[int, typer.Option(min=0, max=65535, help="Milvus gRPC.")] = 19530,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads of each engine; 0 takes all cores.")] = 0,
    ready_timeout: Annotated[float, typer.Option(min=1, help="Seconds to wait for the models.")] = 120.0,
    restarts: Annotated[int, typer.Option(min=0, help="Tries in a row to bring a crashed Triton back; 0 ends with it.")] = 5,
    tls_cert: Annotated[
        Path | None,
        typer.Option(envvar="CXR_SERVE_TLS_CERT", help="Certificate (PEM): both servers speak TLS.", rich_help_panel=_LOCKED),
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option(envvar="CXR_SERVE_TLS_KEY", help="Private key of --tls-cert.", rich_help_panel=_LOCKED)
    ] = None,
    tls_client_ca: Annotated[
        Path | None,
        typer.Option(
            envvar="CXR_SERVE_TLS_CLIENT_CA",
            help="Authorities (PEM): both serve only clients that show a certificate of theirs.",
            rich_help_panel=_LOCKED,
        ),
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(
            envvar="CXR_SERVE_TOKEN_FILE",
            help="File with the token, or user:password, that clients of the gallery must give; or CXR_SERVE_TOKEN holds it.",
            rich_help_panel=_LOCKED,
        ),
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Serve whoever reaches --host, unlocked.", rich_help_panel=_LOCKED)] = False,
) -> None:
    """Run the embedded Triton and Milvus until Ctrl-C; a Triton that crashes is started again."""
    from cxr_retrieval.locations import default_repository
    from cxr_retrieval.serving.access import Access, refuse_exposure
    from cxr_retrieval.serving.choices import cpu_flags, doubts
    from cxr_retrieval.serving.repository import model_version
    from cxr_retrieval.serving.restarts import Restarts, keep_running
    from cxr_retrieval.serving.server import Endpoints, ServerOptions, embedded_milvus

    console = talk()
    tls = Tls(tls_client_ca, tls_cert, tls_key) if tls_cert or tls_key or tls_client_ca else None
    access = Access(tls, options.secret(token_file, "CXR_SERVE_TOKEN"))
    if access.token and no_store:
        raise UsageError("a token with --no-store", expected="a gallery, which alone can check one", next_step="leave one of them out")
    try:
        refuse_exposure(host, access)
    except SetupError as error:
        if not insecure:
            raise
        console.print(Text.assemble(("warning", "yellow"), f"  {error.what}; {error.expected} would not let them"), soft_wrap=True)
    models = repository or default_repository()
    networks = networks_of(segmentation, embedder)
    ports = (grpc_port, http_port, metrics_port)
    settings = ServerOptions(models, precision, networks, host, *ports, threads, ready_timeout, tls, outcome, multilabel, multimodal)
    chosen = settings.chosen_precision
    try:
        with ExitStack() as stack:
            console.print(f"loading  model version {model_version(models, networks)}, {chosen.value}, {networks.told}", soft_wrap=True)
            if settings.further:
                console.print(f"beside   {', '.join(settings.further)}", soft_wrap=True)
            if doubt := doubts(models, chosen, networks, cpu_flags()):
                console.print(Text.assemble(("warning", "yellow"), f"  {doubt}"), soft_wrap=True)
            if not no_store:
                milvus = stack.enter_context(embedded_milvus(store.expanduser(), host, milvus_port, access))
                console.print(f"milvus   {milvus}   gallery {store}", soft_wrap=True)

            def ready(triton: Endpoints) -> None:
                console.print(f"triton   grpc {triton.grpc}   http {triton.http}   metrics {triton.metrics}/metrics", soft_wrap=True)
                console.print(Text.assemble(("ready", "bold green"), "    stop with Ctrl-C"))

            def tell(words: str) -> None:
                console.print(Text.assemble(("warning", "yellow"), f"  {words}"), soft_wrap=True)

            if access.tls or access.token:
                asked = ["TLS"] if access.tls else []
                asked += ["a client certificate"] if access.mutual else []
                asked += ["a token (the gallery)"] if access.token else []
                console.print(f"locked   clients need {', '.join(asked)}")
            keep_running(settings, Restarts(tries=restarts), ready, tell)
    except KeyboardInterrupt:
        console.print("stopped")
