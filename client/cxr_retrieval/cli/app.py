"""Assembles the command `cxr` and turns expected errors into one clear line and an exit code."""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import sys
from types import FrameType

import typer
from rich.console import Console
from rich.text import Text

from cxr_retrieval.cli.adapt import adapt
from cxr_retrieval.cli.audit import app as audit_app
from cxr_retrieval.cli.batch import batch
from cxr_retrieval.cli.calibrate import calibrate
from cxr_retrieval.cli.cluster import cluster
from cxr_retrieval.cli.demo import demo
from cxr_retrieval.cli.evaluate import evaluate
from cxr_retrieval.cli.gallery import app as gallery_app
from cxr_retrieval.cli.info import info
from cxr_retrieval.cli.ingest import ingest
from cxr_retrieval.cli.listen import listen
from cxr_retrieval.cli.loadtest import loadtest
from cxr_retrieval.cli.manifest import manifest
from cxr_retrieval.cli.plan import plan
from cxr_retrieval.cli.pull import pull
from cxr_retrieval.cli.query import query
from cxr_retrieval.cli.reindex import reindex
from cxr_retrieval.cli.serve import serve
from cxr_retrieval.cli.view import view
from cxr_retrieval.errors import CxrError
from cxr_retrieval_build.cli import app as build_app
from cxr_retrieval_training.cli import app as train_app

app = typer.Typer(
    name="cxr",
    help="Which confirmed chest radiographs looked like this one, and what became of them? Research use only, not for diagnosis.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)
for command in (
    demo,
    serve,
    manifest,
    ingest,
    query,
    view,
    batch,
    listen,
    pull,
    evaluate,
    calibrate,
    adapt,
    cluster,
    reindex,
    loadtest,
    plan,
    info,
):
    app.command()(command)

app.add_typer(gallery_app, name="gallery")
app.add_typer(audit_app, name="audit")
app.add_typer(train_app, name="train", hidden=importlib.util.find_spec("torch") is None)
app.add_typer(build_app, name="build", hidden=importlib.util.find_spec("onnx") is None)


def main() -> None:
    """Entry point. Exit codes: 0 done, 1 some inputs failed, 2 could not run."""
    for noisy in ("pymilvus", "milvus_lite", "pynetdicom", "dicomweb_client", "retrying", "urllib3", "highdicom", "pydicom"):
        # their log lines repeat what our errors say, and name patients
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # so do its own
    signal.signal(signal.SIGTERM, _unwind)
    try:
        app()
    except CxrError as error:
        Console(stderr=True).print(Text.assemble(("error: ", "bold red"), str(error)), soft_wrap=True)
        sys.exit(error.exit_code)


def _unwind(number: int, frame: FrameType | None) -> None:
    """SIGTERM unwinds like Ctrl-C, so that servers, files and shared memory are cleaned up."""
    raise SystemExit(128 + number)
