"""What tests call rather than receive as a fixture."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ENVIRONMENT = {key: value for key, value in os.environ.items() if not key.startswith("CXR_")} | {
    "COLUMNS": "100",
    "NO_COLOR": "1",
    "TERM": "dumb",
}


def cxr_command(*arguments: str | Path) -> list[str]:
    """The command line of `cxr` in this environment."""
    return [str(Path(sys.executable).with_name("cxr")), *map(str, arguments)]


def run_cxr(*arguments: str | Path, timeout: float = 240, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs the command as a user would, in a process of its own."""
    return subprocess.run(cxr_command(*arguments), capture_output=True, text=True, timeout=timeout, env=ENVIRONMENT, cwd=cwd, check=False)


def leftovers(pid: int) -> set[str]:
    """Temporary folders and shared memory of embedded servers that this process started."""
    return {path.name for folder in (tempfile.gettempdir(), "/dev/shm") for path in Path(folder).glob(f"cxr-serve-{pid}-*")}


def dashboard_metrics(prefix: str) -> set[str]:
    """Names of the metrics with this prefix that the Grafana dashboard asks for."""
    board = json.loads((Path(__file__).parents[1] / "deploy" / "grafana" / "dashboards" / "cxr-retrieval.json").read_text())
    expressions = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    return {name for expression in expressions for name in re.findall(rf"{prefix}\w+", expression)}
