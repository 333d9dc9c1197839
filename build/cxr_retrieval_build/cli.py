"""`cxr build …`: light to import; PyTorch and ONNX are loaded inside the commands."""

from __future__ import annotations

import importlib.util
import json as jsonlib
from pathlib import Path
from typing import Annotated

import typer

from cxr_retrieval.cli import options
from cxr_retrieval.cli.console import talk
from cxr_retrieval.errors import SetupError
from cxr_retrieval.serving.precision import Precision

app = typer.Typer(help="Export the networks, derive the embedded model repository.", no_args_is_help=True)


@app.command()
def onnx(
    segmenter: Annotated[Path, typer.Option(help="segmenter.pt of `cxr train segmentation`.")],
    embedder: Annotated[Path, typer.Option(help="embedder.pt of `cxr train embedder`.")],
    repository: Annotated[Path, typer.Option(help="Production model repository to write into.")] = Path("model_repository"),
) -> None:
    """Write the three ONNX graphs (fp16 weights), check them against PyTorch, and announce the new model version.

    Nothing in the repository changes unless every output passes its tolerance.
    """
    for module in ("torch", "onnx", "onnxruntime"):
        if importlib.util.find_spec(module) is None:
            raise SetupError(
                "`cxr build onnx` is not installed", expected="the extra 'build'", next_step="pip install 'cxr-retrieval[build]'"
            )
    from cxr_retrieval_build.release import release

    report = release(segmenter, embedder, repository, talk())
    typer.echo(jsonlib.dumps(report, indent=2))


@app.command()
def repository(
    out: Annotated[Path, typer.Argument(help="Folder to write; must not exist.")],
    source: options.Repository = None,
    precision: Annotated[Precision, typer.Option(help="Arithmetic of the engines.")] = Precision.fp32,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of each engine.")] = 2,
) -> None:
    """Derive the embedded model repository (Python backend, OpenVINO) from the production one, as `cxr serve` does."""
    from cxr_retrieval.locations import default_repository
    from cxr_retrieval.serving.repository import derive_embedded

    if out.exists():
        raise SetupError(f"{out}: already exists", expected="a new folder", next_step="remove it, or give another")
    derive_embedded(source or default_repository(), out, precision, threads)
    typer.echo(out)
