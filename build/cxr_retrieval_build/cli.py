"""`cxr build …`: light to import; PyTorch, ONNX and TensorRT are loaded inside the commands."""

from __future__ import annotations

import importlib.util
import json as jsonlib
from pathlib import Path
from typing import Annotated

import typer

from cxr_retrieval.cli import options
from cxr_retrieval.cli.console import talk
from cxr_retrieval.errors import SetupError
from cxr_retrieval.serving.choices import Embedder as EmbedderName
from cxr_retrieval.serving.choices import EnginePrecision, Networks, Precision, Segmentation, networks_of

app = typer.Typer(help="Export the networks, lower their precision, build TensorRT engines.", no_args_is_help=True)

Target = Annotated[Path, typer.Option("--repository", help="Production model repository to write into.")]
Segmenter = Annotated[Path, typer.Option(help="segmenter.pt of `cxr train segmentation`.")]
Embedder = Annotated[Path, typer.Option(help="embedder.pt of `cxr train embedder`.")]
Student = Annotated[Path | None, typer.Option(help="student.pt of `cxr train student`.")]
Published = Annotated[Path | None, typer.Option(help="embedder.pt of `cxr train embedder --config embedder-published`.")]
Manifest = Annotated[Path, typer.Option("--manifest", help="CSV with the splits train and val.")]

SegmentationBy = Annotated[Segmentation, typer.Option(help="The five published networks, or the small one.")]
EmbeddedBy = Annotated[EmbedderName, typer.Option(help="The tuned one, or the published.")]

DEFAULT_TARGET = Path("model_repository")


@app.command()
def onnx(
    segmenter: Segmenter,
    embedder: Embedder,
    student: Student = None,
    published: Published = None,
    repository: Target = DEFAULT_TARGET,
) -> None:
    """Write the ONNX graphs (fp16 weights), check them against PyTorch, and announce the new model version.

    Nothing in the repository changes unless every output passes its tolerance.
    """
    _require("cxr build onnx", "build", "torch", "onnx", "onnxruntime")
    from cxr_retrieval_build.release import release

    report = release(segmenter, embedder, student, published, repository, talk())
    typer.echo(jsonlib.dumps(report, indent=2))


@app.command()
def checkpoints(
    out: Annotated[
        Path, typer.Argument(help="Folder for segmenter.pt, embedder.pt, and student.pt and published.pt where there are such weights.")
    ],
    source: options.Repository = None,
) -> None:
    """Write the weights that ship as checkpoints again: to measure gates, train on the lungs they find, or export anew from a clone.

    Exported again they give the same weights. Batch norms, folded on export, are there and change nothing.
    """
    _require("cxr build checkpoints", "build", "torch", "onnx")
    from cxr_retrieval.locations import default_repository
    from cxr_retrieval_build.published import write_checkpoints

    for path in write_checkpoints(source or default_repository(), out):
        typer.echo(path)


@app.command()
def parity(
    manifest: Manifest,
    segmenter: Segmenter,
    embedder: Embedder,
    student: Student = None,
    published: Published = None,
    repository: Target = DEFAULT_TARGET,
) -> None:
    """Measure on the val split how far each runtime and precision is from PyTorch in fp32, and record which passed their gates.

    `cxr serve --precision auto` takes only what passed. Fails if fp32 itself misses, for then the export is wrong.
    """
    _require("cxr build parity", "build", "torch", "onnx", "onnxruntime")
    from cxr_retrieval.cases.manifest import read_manifest
    from cxr_retrieval_build.gates import Checkpoints, measure_gates, record, require_passed, table

    sets = [Checkpoints(Networks.ensemble, segmenter, embedder)]
    if student is not None:
        sets.append(Checkpoints(Networks.student, student, embedder))
    if published is not None:
        sets.append(Checkpoints(Networks.published, segmenter, published))
    rows = read_manifest(manifest)
    gates = [gate for checkpoints in sets for gate in measure_gates(repository, rows, checkpoints)]
    record(repository, gates)
    talk().print(table(gates))
    require_passed([gate for gate in gates if gate["precision"] == "fp32"])
    typer.echo(repository / "parity.json")


@app.command()
def int8(
    manifest: Manifest,
    segmenter: Segmenter,
    embedder: Embedder,
    images: Annotated[int, typer.Option(min=1, help="Radiographs of the train split to calibrate on.")] = 100,
    repository: Target = DEFAULT_TARGET,
) -> None:
    """Quantise the segmentation networks to int8 (NNCF), and keep the graph if it passes its parity gate on the val split.

    Nothing of the radiographs calibrated on is kept but scales and biases. Takes about a quarter of an hour on two cores.
    """
    _require("cxr build int8", "build", "torch", "onnx", "nncf")
    from cxr_retrieval.cases.manifest import read_manifest
    from cxr_retrieval_build.gates import Checkpoints, build_int8, table

    gates = build_int8(repository, read_manifest(manifest), Checkpoints(Networks.ensemble, segmenter, embedder), images)
    talk().print(table(gates))
    typer.echo(repository / "lung_segmentation" / "1" / "model.int8.onnx")


@app.command()
def outcome(
    checkpoint: Annotated[Path, typer.Argument(help="outcome.pt of `cxr train outcome`.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; must not exist.")],
) -> None:
    """Write a model of what becomes of patients, with its card, for `cxr serve --outcome`; in production copy it beside the engines."""
    _require("cxr build outcome", "build", "torch", "onnx", "onnxruntime")
    from cxr_retrieval_build.outcome import build_outcome

    typer.echo(jsonlib.dumps(build_outcome(checkpoint, out), indent=2))


@app.command()
def multilabel(
    checkpoint: Annotated[Path, typer.Argument(help="multilabel.pt of `cxr train multilabel`.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; must not exist.")],
) -> None:
    """Write a network of several findings, with its card, for `cxr serve --multilabel`; in production copy it beside the engines."""
    _require("cxr build multilabel", "build", "torch", "onnx", "onnxruntime")
    from cxr_retrieval_build.multilabel import build_multilabel

    typer.echo(jsonlib.dumps(build_multilabel(checkpoint, out), indent=2))


@app.command()
def multimodal(
    checkpoint: Annotated[Path, typer.Argument(help="multimodal.pt of `cxr train multimodal`.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; must not exist.")],
) -> None:
    """Write the networks of films and reports, with their card, for `cxr serve --multimodal`; in production copy both beside engines."""
    _require("cxr build multimodal", "build", "torch", "onnx", "onnxruntime")
    from cxr_retrieval_build.multimodal import build_multimodal

    typer.echo(jsonlib.dumps(build_multimodal(checkpoint, out), indent=2))


@app.command()
def engines(
    out: Annotated[
        Path, typer.Argument(help="Folder for the repository with engines; engines that fit are kept, configurations written anew.")
    ],
    source: options.Repository = None,
    precision: Annotated[EnginePrecision, typer.Option(help="Arithmetic of the convolutions; all else is fp32.")] = EnginePrecision.fp16,
    segmentation: SegmentationBy = Segmentation.ensemble,
    embedder: EmbeddedBy = EmbedderName.tuned,
    check: Annotated[
        bool,
        typer.Option("--check", help="Build nothing: fail unless engines fit this TensorRT and GPU, and configurations the repository."),
    ] = False,
) -> None:
    """Build a TensorRT engine from each graph, into a model repository that Triton serves as it is."""
    _require("cxr build engines", "engines", "onnx")
    from cxr_retrieval.locations import default_repository
    from cxr_retrieval_build.tensorrt_engine import build_engines, find_tensorrt, require_fitting

    found = find_tensorrt()
    if check:
        require_fitting(out, source or default_repository(), found)
        talk().print(f"all engines in {out} fit {found.name}, and their configurations the repository")
        return
    report = build_engines(source or default_repository(), out, precision, networks_of(segmentation, embedder), found, talk())
    typer.echo(jsonlib.dumps(report, indent=2))


@app.command()
def repository(
    out: Annotated[Path, typer.Argument(help="Folder to write; must not exist.")],
    source: options.Repository = None,
    precision: Annotated[Precision, typer.Option(help="Arithmetic of the engines.")] = Precision.auto,
    segmentation: SegmentationBy = Segmentation.ensemble,
    embedder: EmbeddedBy = EmbedderName.tuned,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of each engine.")] = 2,
) -> None:
    """Derive the embedded model repository (Python backend, OpenVINO) from the production one, as `cxr serve` does."""
    from cxr_retrieval.locations import default_repository
    from cxr_retrieval.serving.choices import resolve
    from cxr_retrieval.serving.repository import derive_embedded

    if out.exists():
        raise SetupError(f"{out}: already exists", expected="a new folder", next_step="remove it, or give another")
    models, networks = source or default_repository(), networks_of(segmentation, embedder)
    derive_embedded(models, out, resolve(models, precision, networks), networks, threads)
    typer.echo(out)


def _require(command: str, extra: str, *modules: str) -> None:
    if any(importlib.util.find_spec(module) is None for module in modules):
        raise SetupError(
            f"`{command}` is not installed", expected=f"the extra '{extra}'", next_step=f"pip install 'cxr-retrieval[{extra}]'"
        )
