"""`cxr serve`: reads its options, calls the library, prints."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from cxr_retrieval.cli import options
from cxr_retrieval.cli.console import talk
from cxr_retrieval.errors import SetupError
from cxr_retrieval.serving.choices import Precision, Segmentation
from cxr_retrieval.settings import DEFAULT_STORE


def serve(
    repository: options.Repository = None,
    precision: Annotated[
        Precision, typer.Option(help="Arithmetic of the engines; auto: the fastest that this CPU has and that passed its parity gates.")
    ] = Precision.auto,
    segmentation: Annotated[
        Segmentation, typer.Option(help="The five published networks, or the small one that learnt from them, with a gallery of its own.")
    ] = Segmentation.ensemble,
    store: Annotated[Path, typer.Option(help="Gallery to serve: a Milvus Lite folder ending in .db.")] = DEFAULT_STORE,
    no_store: Annotated[bool, typer.Option("--no-store", help="Serve no gallery; clients use another Milvus.")] = False,
    host: Annotated[
        str, typer.Option(help="Address to listen on. Beyond this machine there is no authentication: use a proxy.")
    ] = "127.0.0.1",
    grpc_port: Annotated[int, typer.Option(min=0, max=65535, help="Triton gRPC; 0 takes any free port, here and below.")] = 8001,
    http_port: Annotated[int, typer.Option(min=0, max=65535, help="Triton HTTP.")] = 8000,
    metrics_port: Annotated[int, typer.Option(min=0, max=65535, help="Prometheus metrics.")] = 8002,
    milvus_port: Annotated[int, typer.Option(min=0, max=65535, help="Milvus gRPC.")] = 19530,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads of each engine; 0 takes all cores.")] = 0,
    ready_timeout: Annotated[float, typer.Option(min=1, help="Seconds to wait for the models.")] = 120.0,
) -> None:
    """Run the embedded Triton and Milvus until Ctrl-C."""
    from cxr_retrieval.locations import default_repository
    from cxr_retrieval.serving.choices import cpu_flags, doubts
    from cxr_retrieval.serving.repository import model_version
    from cxr_retrieval.serving.server import ServerOptions, embedded_milvus, embedded_triton

    console = talk()
    models = repository or default_repository()
    settings = ServerOptions(models, precision, segmentation, host, grpc_port, http_port, metrics_port, threads, ready_timeout)
    chosen = settings.chosen_precision
    try:
        with ExitStack() as stack:
            console.print(
                f"loading  model version {model_version(models, segmentation)}, {chosen.value}, segmentation by {segmentation.value}"
            )
            if doubt := doubts(models, chosen, segmentation, cpu_flags()):
                console.print(Text.assemble(("warning", "yellow"), f"  {doubt}"), soft_wrap=True)
            triton = stack.enter_context(embedded_triton(settings))  # first: it forks, and Milvus Lite brings threads
            console.print(f"triton   grpc {triton.grpc}   http {triton.http}   metrics {triton.metrics}/metrics", soft_wrap=True)
            if not no_store:
                milvus = stack.enter_context(embedded_milvus(store.expanduser(), host, milvus_port))
                console.print(f"milvus   {milvus}   gallery {store}", soft_wrap=True)
            console.print(Text.assemble(("ready", "bold green"), "    stop with Ctrl-C"))
            while triton.process.poll() is None:
                time.sleep(0.5)
            raise SetupError(
                "Triton ended by itself", next_step="start it again; if this repeats, look for memory pressure in the system log"
            )
    except KeyboardInterrupt:
        console.print("stopped")
