"""`cxr train …`: light to import; PyTorch is loaded inside the commands."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from cxr_retrieval.errors import SetupError

app = typer.Typer(help="Train the lung-segmentation ensemble and the embedder.", no_args_is_help=True)

Manifest = Annotated[Path, typer.Option("--manifest", help="CSV with the splits train and val.")]
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
    from cxr_retrieval.manifest import read_manifest
    from cxr_retrieval_training.checkpoints import pick_device
    from cxr_retrieval_training.config import SegmentationConfig, config_path, load_config
    from cxr_retrieval_training.train_segmenter import train_segmentation

    settings = load_config(config_path(config), SegmentationConfig)
    typer.echo(train_segmentation(settings, read_manifest(manifest), out, pick_device(device)))


@app.command()
def embedder(
    manifest: Manifest,
    segmenter: Annotated[Path, typer.Option(help="segmenter.pt of `cxr train segmentation`.")],
    out: Annotated[Path, typer.Option(help="Folder for checkpoints and log; an interrupted run goes on from there.")],
    config: Annotated[str, typer.Option(help="Name of a shipped config, or a TOML file.")] = "embedder",
    device: Device = "auto",
    init: Annotated[Path | None, typer.Option(help="A torchvision ResNet-50 state dict to start from (ImageNet, say).")] = None,
) -> None:
    """Train the attention embedder on the lungs that the segmentation networks find."""
    from cxr_retrieval.manifest import read_manifest
    from cxr_retrieval_training.checkpoints import pick_device
    from cxr_retrieval_training.config import EmbedderConfig, config_path, load_config
    from cxr_retrieval_training.train_embedder import train_embedder

    settings = load_config(config_path(config), EmbedderConfig)
    typer.echo(train_embedder(settings, read_manifest(manifest), segmenter, out, pick_device(device), init))
