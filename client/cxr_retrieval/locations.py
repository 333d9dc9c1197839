"""Where the files that ship lie, and what is kept to be faster the next time."""

from __future__ import annotations

import os
from pathlib import Path

from cxr_retrieval.contract import ENSEMBLE
from cxr_retrieval.errors import SetupError


def default_repository() -> Path:
    """The production model repository: inside the installed wheel, or beside the source tree.

    Raises:
        SetupError: Neither is there.
    """
    package = Path(__file__).resolve().parent
    for candidate in (package / "model_repository", package.parents[1] / "model_repository"):
        if (candidate / ENSEMBLE / "config.pbtxt").is_file():
            return candidate
    raise SetupError("no model repository found", expected=f"model_repository/{ENSEMBLE}/config.pbtxt", next_step="give --repository")


def cache_folder() -> Path:
    """What may be deleted at any time lies here, in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cxr-retrieval"
