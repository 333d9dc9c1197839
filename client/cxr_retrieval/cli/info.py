"""`cxr info`: reads its options, calls the library, prints."""

from __future__ import annotations

import platform
import re
import shutil
import socket
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer

from cxr_retrieval.cli import options
from cxr_retrieval.cli.console import print_json
from cxr_retrieval.contract import ENSEMBLE, LEAF_MODELS
from cxr_retrieval.serving.choices import Precision, cpu_flags, supported
from cxr_retrieval.settings import DNS, MilvusSettings, TritonSettings

_PACKAGES = ("cxr-retrieval", "nvidia-pytriton", "tritonclient", "openvino", "pymilvus", "milvus-lite", "pydicom", "torch")


@options.with_servers
def info(
    triton: TritonSettings,
    milvus: MilvusSettings,
    repository: options.Repository = None,
    collections: Annotated[bool, typer.Option("--collections", help="Also ask Milvus for its collections (takes a second).")] = False,
    json: options.Json = False,
) -> None:
    """Versions, models, servers and devices, at once."""
    facts: dict[str, Any] = {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "models": _models(repository),
        "servers": {"triton": {"url": triton.url, "answers": any(map(_answers, triton.addresses))}, "milvus": _milvus(milvus)},
        "devices": _devices(),
    }
    if collections:
        from cxr_retrieval.gallery.store import list_collections

        facts["collections"] = list_collections(milvus)
    if json:
        print_json(facts)
        return
    for section, values in facts.items():
        typer.echo(section)
        for name, value in values.items():
            shown = ", ".join(f"{key} {_plain(item)}" for key, item in value.items()) if isinstance(value, dict) else _plain(value)
            typer.echo(f"  {name:<18} {shown}")


def _plain(value: object) -> str:
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _models(repository: Path | None) -> dict[str, Any]:
    from cxr_retrieval.locations import default_repository

    folder = repository or default_repository()
    text = (folder / ENSEMBLE / "config.pbtxt").read_text("utf-8")
    found = re.search(r'"model_version"\s+value\s*\{\s*string_value:\s*"([^"]*)"', text)
    weights = {name: folder / name / "1" / "model.onnx" for name in LEAF_MODELS}
    return {
        "repository": str(folder),
        "model version": found[1] if found else "unknown",
        **{name: f"{path.stat().st_size / 1e6:.1f} MB" if path.is_file() else "no weights" for name, path in weights.items()},
    }


def _milvus(settings: MilvusSettings) -> dict[str, Any]:
    if settings.is_lite:
        return {"file": settings.uri, "exists": Path(settings.uri).exists()}
    return {"url": settings.uri, "answers": _answers(settings.uri.split("://", 1)[-1])}


def _answers(address: str) -> bool:
    host, _, port = address.removeprefix(DNS).rstrip("/").rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=0.3):
            return True
    except (OSError, ValueError):
        return False


def _devices() -> dict[str, Any]:
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"model name\s*:\s*(.+)", cpu)
    return {
        "cpu": model[1] if model else platform.machine(),
        "bf16": supported(Precision.bf16, cpu_flags()),
        "nvidia driver": "nvidia-smi found" if shutil.which("nvidia-smi") else "none",
    }
