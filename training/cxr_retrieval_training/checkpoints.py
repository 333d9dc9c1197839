"""Checkpoints written so that a kill at any moment loses at most the work since the last one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cxr_retrieval.errors import UsageError

Checkpoint = dict[str, Any]


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Writes beside, then renames: a reader sees the old file or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(checkpoint, partial)
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
