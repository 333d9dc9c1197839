"""`cxr train …`: light to import. A command reads its configuration and manifest first, then loads PyTorch, which takes seconds."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from cxr_retrieval.cli import options
from cxr_retrieval.errors import SetupError
from cxr_retrieval.progress import progress_bar
from cxr_retrieval.settings import TritonSettings

app = typer.Typer(help="Train the lung-segmentation ensemble and the embedder.", no_args_is_help=True)


Manifest = Annotated[Path, typer.Option("--manifest", help="CSV with the splits train and val.")]
Segmenter = Annotated[Path, typer.Option("--segmenter", help="segmenter.pt of `cxr train segmentation`.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]


@app.callback()
def require_training() -> None:
    """Train the lung-segmentation ensemble and the embedder."""
    if importlib.util.find_spec("torch") is None:
        raise SetupError("`cxr train` is not installed", expected="the extra 'training'", next_step="pip install 'cxr-retrieval[training]'")


@app.command()
def segmentation(
    manifest: Manifest,
    out: Annotated[Path, typer.Option(help="Folder for checkpoints and log; an interrupted run goes on from there.")],
    config: Annotated[str, typer.Option(help="Name of a shipped config, or a TOML file.")] = "segmentation",
    device: Device = "auto",
) -> None:
    """Train the five segmentation networks on rows that have a lung mask (column lung_mask_path)."""
    from cxr_retrieval.cases.manifest import read_manifest
    from cxr_retrieval_training.config import SegmentationConfig, config_path, load_config

    settings, rows = load_config(config_path(config), SegmentationConfig), read_manifest(manifest)

    from cxr_retrieval_training.checkpoints import pick_device
    from cxr_retrieval_training.segmentation.train_segmenter import train_segmentation

    typer.echo(train_segmentation(settings, rows, out, pick_device(device)))


@app.command()
def student(
    manifest: Manifest,
    segmenter: Segmenter,
    out: Annotated[Path, typer.Option(help="Folder for checkpoints and log; an interrupted run goes on from there.")],
    config: Annotated[str, typer.Option(help="Name of a shipped config, or a TOML file.")] = "segmentation-student",
    device: Device = "auto",
) -> None:
    """Train one small network to find the lungs that the five find, for `cxr serve --segmentation student`."""
    from cxr_retrieval.cases.manifest import read_manifest
    from cxr_retrieval_training.config import SegmentationConfig, config_path, load_config

    settings, rows = load_config(config_path(config), SegmentationConfig), read_manifest(manifest)

    from cxr_retrieval_training.checkpoints import pick_device
    from cxr_retrieval_training.segmentation.train_segmenter import train_student

    typer.echo(train_student(settings, rows, segmenter, out, pick_device(device)))


@app.command()
def embedder(
    manifest: Manifest,
    segmenter: Segmenter,
    out: Annotated[Path, typer.Option(help="Folder for checkpoints and log; an interrupted run goes on from there.")],
    config: Annotated[str, typer.Option(help="Name of a shipped config, or a TOML file.")] = "embedder",
    device: Device = "auto",
    init: Annotated[Path | None, typer.Option(help="A torchvision ResNet-50 state dict to start from (ImageNet, say).")] = None,
) -> None:
    """Train the attention embedder on the lungs that the segmentation networks find."""
    from cxr_retrieval.cases.manifest import read_manifest
    from cxr_retrieval_training.config import EmbedderConfig, config_path, load_config

    settings, rows = load_config(config_path(config), EmbedderConfig), read_manifest(manifest)

    from cxr_retrieval_training.checkpoints import pick_device
    from cxr_retrieval_training.embedding.train_embedder import train_embedder

    typer.echo(train_embedder(settings, rows, segmenter, out, pick_device(device), init))


@app.command()
def ablation(
    name: Annotated[str, typer.Argument(help="Which comparison; an unknown name gets the list.")],
    manifest: Manifest,
    segmenter: Segmenter,
    out: Annotated[Path, typer.Option(help="Folder of all comparisons; this one goes into a folder of its name there.")],
    base: Annotated[str, typer.Option(help="Config that the comparison changes.")] = "short",
    device: Device = "auto",
) -> None:
    """Train one of the paper's comparisons or ours: the loss, attention, embedding size, baseline, a source left out."""
    from cxr_retrieval.cases.manifest import read_manifest
    from cxr_retrieval_training.embedding.ablations import ablation_config

    settings, rows = ablation_config(name, base), read_manifest(manifest)

    from cxr_retrieval_training.checkpoints import pick_device
    from cxr_retrieval_training.embedding.train_embedder import train_embedder

    typer.echo(train_embedder(settings, rows, segmenter, out / name, pick_device(device)))


@app.command()
def unseen(
    manifest: Manifest,
    segmenter: Segmenter,
    out: Annotated[Path, typer.Option(help="Folder for all runs and unseen.md; an interrupted command goes on from there.")],
    config: Annotated[str, typer.Option(help="Name of a shipped config, or a TOML file.")] = "unseen",
    ablation: Annotated[str, typer.Option(metavar="NAME", help="With this change, of those of `cxr train ablation`.")] = "shipped-recipe",
    source: Annotated[list[str] | None, typer.Option(help="Only this one; may be given several times.", show_default="each")] = None,
    in_folds: Annotated[
        list[str] | None,
        typer.Option(metavar="SOURCE", help="Also ask about new patients of it, when others were learnt from; four trainings more."),
    ] = None,
    device: Device = "auto",
) -> None:
    """Leave one source after another out of training, then ask about it, with more and more films of its own in the gallery."""
    from cxr_retrieval.cases.manifest import read_manifest
    from cxr_retrieval_training.embedding.ablations import ablation_config

    settings, rows = ablation_config(ablation, config), read_manifest(manifest)

    from cxr_retrieval_training.checkpoints import pick_device
    from cxr_retrieval_training.report.unseen import leave_sources_out

    typer.echo(leave_sources_out(settings, rows, segmenter, out, pick_device(device), source or (), in_folds or ()))


@app.command()
@options.with_servers
def gate(
    triton: TritonSettings,
    manifest: Manifest,
    out: Annotated[Path, typer.Option(help="Where to write the coefficients.")],
) -> None:
    """Fit what refuses a picture that is no upright frontal chest film, with the networks as Triton serves them."""
    from cxr_retrieval.cases.manifest import read_manifest

    rows = read_manifest(manifest)

    from cxr_retrieval.inference.triton import TritonClient
    from cxr_retrieval_training.gate.fit_gate import fit_gate

    with TritonClient(triton) as client, progress_bar() as bar:
        parts = {name: bar.add_task(name, total=None) for name in ("train", "val")}
        said = fit_gate(rows, client, out, advance=lambda name, count: bar.update(parts[name], advance=count))
    typer.echo(said)


@app.command()
@options.with_servers
def outcome(
    triton: TritonSettings,
    manifest: Annotated[Path, typer.Option("--manifest", help="CSV with facts and outcomes; any split but extra.")],
    out: Annotated[Path, typer.Option(help="Folder for outcome.pt and outcome.md; an interrupted run goes on from there.")],
    config: Annotated[str, typer.Option(help="Name of a shipped config, or a TOML file.")] = "outcome",
    outcomes: Annotated[
        list[str] | None,
        typer.Option(
            "--outcome",
            metavar="COLUMN",
            help="What may become of patients, Y or N; may be given several times.",
            show_default="went_icu, intubated",
        ),
    ] = None,
    fact: Annotated[
        list[str] | None,
        typer.Option(metavar="COLUMN", help="What is known before that; may be given several times.", show_default="of the config"),
    ] = None,
    label: Annotated[
        list[str] | None, typer.Option(help="Films of this label; may be given several times.", show_default="of the config")
    ] = None,
    within: Annotated[
        float | None,
        typer.Option(min=0, metavar="HOURS", help="Only what begins so soon after the film counts; column COLUMN_hours says when it did."),
    ] = None,
) -> None:
    """Predict what becomes of patients (intensive care, say) from their films' features and facts, and say how well that can be done.

    The features are those of the embedder as Triton serves it. Then `cxr build outcome` makes a model of it that Triton serves, too.
    """
    from cxr_retrieval.cases.manifest import read_manifest
    from cxr_retrieval_training.config import OutcomeConfig, config_path, load_config

    settings, rows = load_config(config_path(config), OutcomeConfig), read_manifest(manifest)
    chosen = {name: tuple(given) for name, given in (("facts", fact), ("labels", label)) if given}

    from cxr_retrieval.inference.triton import TritonClient
    from cxr_retrieval_training.outcome.cases import OUTCOMES
    from cxr_retrieval_training.outcome.train_outcome import Progress, train_outcome

    with TritonClient(triton) as client, progress_bar() as bar:
        parts = {name: bar.add_task(name, total=None) for name in ("films", "fits")}
        told = Progress(
            lambda name, count: bar.update(parts[name], total=count), lambda name, count: bar.update(parts[name], advance=count)
        )
        page = train_outcome(settings.model_copy(update=chosen), rows, client, out, outcomes or OUTCOMES, within, told)
    typer.echo(page)


@app.command()
def multilabel(
    manifest: Manifest,
    out: Annotated[Path, typer.Option(help="Folder for multilabel.pt and multilabel.md; an interrupted run goes on from there.")],
    config: Annotated[str, typer.Option(help="Name of a shipped config, or a TOML file.")] = "multilabel",
    device: Device = "auto",
    column: Annotated[str, typer.Option(help="With a film's findings, | between several.")] = "label",
    finding: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Learn this one; may be given several times.", show_default="all that enough films have"),
    ] = None,
    init: Annotated[Path | None, typer.Option(help="A torchvision DenseNet-121 state dict to start from (ImageNet, say).")] = None,
    beside: Annotated[
        list[Path] | None, typer.Option(metavar="RUN", help="Another run's folder to compare with on the page; may be given several times.")
    ] = None,
) -> None:
    """Learn all findings of films at once; 1024 features of each film come of it, by which alike ones are found.

    Then `cxr build multilabel` makes a model of it that Triton serves.
    """
    from cxr_retrieval.cases.manifest import read_manifest
    from cxr_retrieval_training.config import MultilabelConfig, config_path, load_config

    settings, rows = load_config(config_path(config), MultilabelConfig), read_manifest(manifest)

    from cxr_retrieval_training.checkpoints import pick_device
    from cxr_retrieval_training.multilabel.train_multilabel import train_multilabel

    typer.echo(train_multilabel(settings, rows, out, pick_device(device), column, finding or (), init, beside or ()))


@app.command()
def multimodal(
    manifest: Manifest,
    multilabel: Annotated[Path, typer.Option("--multilabel", help="multilabel.pt of `cxr train multilabel`, whose features are a film's.")],
    out: Annotated[
        Path, typer.Option(help="Folder for multimodal.pt and multimodal.md; films that were looked at are not looked at again.")
    ],
    config: Annotated[str, typer.Option(help="Name of a shipped config, or a TOML file.")] = "multimodal",
    device: Device = "auto",
    column: Annotated[str, typer.Option(help="With a film's labels, | between several.")] = "label",
    judged_by: Annotated[
        str | None, typer.Option(help="Column with the labels by which retrieval is judged.", show_default="the same")
    ] = None,
    text_column: Annotated[str, typer.Option(help="With a film's report; films without one take part, too.")] = "clinical_notes",
    reports: Annotated[
        Path | None, typer.Option(help="CSV of reports without films (findings, impression, Problems), to learn words from.")
    ] = None,
) -> None:
    """Bring films and their reports into one subspace, so that words find films; and say what missing reports cost.

    Then `cxr build multimodal` makes models of it that Triton serves.
    """
    from cxr_retrieval.cases.manifest import read_manifest
    from cxr_retrieval_training.config import MultimodalConfig, config_path, load_config

    settings, rows = load_config(config_path(config), MultimodalConfig), read_manifest(manifest)

    from cxr_retrieval_training.checkpoints import pick_device
    from cxr_retrieval_training.multimodal.train_multimodal import train_multimodal

    where = pick_device(device)
    typer.echo(train_multimodal(settings, rows, multilabel, out, where, column, judged_by, text_column, reports))


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of `cxr train embedder`; the first is looked at more closely.")],
    manifest: Manifest,
    segmenter: Segmenter,
    out: Annotated[Path, typer.Option(help="Folder for report.md, report.json and pictures.")],
    device: Device = "auto",
) -> None:
    """Measure finished runs side by side: retrieval, sources, attention, calibration. montage.png shows patients' images."""
    from cxr_retrieval.cases.manifest import read_manifest

    rows = read_manifest(manifest)

    from cxr_retrieval_training.checkpoints import pick_device
    from cxr_retrieval_training.report.page import write_report

    typer.echo(write_report(rows, segmenter, runs, out, pick_device(device)))


@app.command(name="all")
def everything(
    manifest: Manifest,
    out: Annotated[Path, typer.Option(help="Folder for segmentation/, embedder/ and report/; an interrupted run goes on from there.")],
    device: Device = "auto",
) -> None:
    """Reproduce the shipped weights from a manifest: segmentation, embedder, report. Then `cxr build onnx` exports them."""
    from cxr_retrieval.cases.manifest import read_manifest
    from cxr_retrieval_training.config import EmbedderConfig, SegmentationConfig, config_path, load_config

    rows = read_manifest(manifest)
    lungs, embedding = load_config(config_path("segmentation"), SegmentationConfig), load_config(config_path("embedder"), EmbedderConfig)

    from cxr_retrieval_training.checkpoints import pick_device
    from cxr_retrieval_training.embedding.train_embedder import train_embedder
    from cxr_retrieval_training.report.page import write_report
    from cxr_retrieval_training.segmentation.train_segmenter import train_segmentation

    where = pick_device(device)
    networks = train_segmentation(lungs, rows, out / "segmentation", where)
    train_embedder(embedding, rows, networks, out / "embedder", where)
    typer.echo(write_report(rows, networks, [out / "embedder"], out / "report", where))
