"""The audit log of what leaves a gallery: JSON lines, appended and on disk before anything is removed and again once it is.

It names no patient and no path: cases stand in it by their keys, which whoever holds an image_id can make again (`Entry.key`).
"""

from __future__ import annotations

import fcntl
import getpass
import json
import os
import uuid
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

from cxr_retrieval.errors import SetupError


@contextmanager
def audited(log: Path, action: str, reason: str = "") -> Generator[dict[str, Sequence[str]]]:
    """Writes one line before the body runs and one after it; the body fills in collection → keys removed.

    The second line is missing if the process was killed in between, and says "failed" if the body raised.

    Args:
        log: Made with rights 0600 if it is not there.
        action: The command, such as "gallery remove".
        reason: Why, in the user's words.

    Raises:
        SetupError: The log cannot be written; the body has then not run.
    """
    about: dict[str, Any] = {"id": uuid.uuid4().hex, "user": getpass.getuser(), "action": action, "reason": reason}
    removed: dict[str, Sequence[str]] = {}
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        file = os.fdopen(os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "a", encoding="utf-8")
    except OSError as error:
        raise SetupError(f"{log}: the audit log cannot be written", got=error.strerror or str(error), next_step="give --audit") from error
    with file:
        _append(file, {**about, "state": "begun"})
        try:
            yield removed
        except BaseException:
            _append(file, {**about, "state": "failed", "removed": removed})
            raise
        _append(file, {**about, "state": "done", "removed": removed})


def _append(file: IO[str], line: dict[str, Any]) -> None:
    fcntl.flock(file, fcntl.LOCK_EX)
    try:
        file.write(json.dumps({"time": datetime.now(timezone.utc).isoformat(timespec="seconds"), **line}, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)
