"""Checkpoints written so that a kill at any moment loses at most the work since the last one; logs; devices and precision."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from cxr_retrieval.errors import UsageError
from cxr_retrieval.serving.choices import cpu_flags
from cxr_retrieval_training.depthwise import with_fast_depthwise

Checkpoint = dict[str, Any]

_CPU_BF16: Final = frozenset({"amx_bf16", "avx512_bf16"})


def provenance() -> dict[str, str]:
    """What made a checkpoint: commit of the source (with `+` when it was changed), version of the distribution, PyTorch."""
    here = Path(__file__).parent
    git = ("git", "-C", str(here))
    try:
        commit = subprocess.run((*git, "rev-parse", "HEAD"), capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run((*git, "status", "--porcelain", "--", str(here)), capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):  # installed from a wheel
        commit, changed = "unknown", ""
    return {"commit": commit + ("+" if changed else ""), "cxr_retrieval": version("cxr-retrieval"), "torch": str(torch.__version__)}


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Writes beside, then renames: a reader sees the old file or the new one, never half of it. Adds `provenance`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save({**checkpoint, "provenance": provenance()}, partial)
    partial.replace(path)


def load_checkpoint(path: Path, *, expected: Mapping[str, object] | None = None) -> Checkpoint:
    """Loads tensors and plain values only (no pickled code) onto the CPU.

    Args:
        expected: Entries that must be the same in the checkpoint (config, data hash), else resuming would mix two runs.

    Raises:
        UsageError: Absent, damaged, or of another run.
    """
    try:
        checkpoint: Checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UsageError(f"{path}: no checkpoint", next_step="run the training command that writes it") from error
    except Exception as error:
        raise UsageError(f"{path}: damaged checkpoint", got=str(error)[:200], next_step="delete it and train again") from error
    for key, value in (expected or {}).items():
        if checkpoint.get(key) != value:
            raise UsageError(
                f"{path}: belongs to another run ({key} differs)",
                expected=str(value)[:120],
                got=str(checkpoint.get(key))[:120],
                next_step="use another --out folder, or remove the old run",
            )
    return checkpoint


@contextmanager
def understood_as(path: Path, what: str, written_by: str) -> Generator[None]:
    """For what is made of a checkpoint in the block.

    Args:
        what: It must be one of, in words. written_by: Its usual name, and the command that writes it.

    Raises:
        UsageError: It lacks something, or holds what does not fit.
    """
    try:
        yield
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UsageError(
            f"{path}: no checkpoint of {what}", expected=written_by, got=str(error)[:200], next_step="correct the path"
        ) from error


def append_log(out: Path, record: Mapping[str, object]) -> None:
    """One JSON line to `<out>/log.jsonl`."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "log.jsonl").open("a") as log:
        log.write(json.dumps(record) + "\n")


def mixed_precision(device: torch.device) -> torch.autocast:
    """bf16 where the hardware multiplies it (a GPU, a CPU with AMX or AVX512-BF16); elsewhere it would be slower than fp32."""
    native = device.type != "cpu" or bool(_CPU_BF16 & cpu_flags())
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=native)


def on_device(network: nn.Module, device: torch.device) -> nn.Module:
    """Moves a network, in the memory layout that convolutions on CPU and tensor cores like best; on CPU depthwise ones train fast."""
    network.to(device)
    if device.type == "cpu":
        with_fast_depthwise(network)
    return network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] (missing from torch's stub)


def pick_device(name: str) -> torch.device:
    """`auto` takes a GPU when PyTorch sees one.

    Raises:
        UsageError: A device this machine does not have.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name) if name in ("cpu", "cuda") or name.startswith("cuda:") else None
    if device is None or (device.type == "cuda" and not torch.cuda.is_available()):
        raise UsageError(f"device {name} is not available", expected="auto, cpu or a CUDA device", next_step="use --device auto")
    return device
