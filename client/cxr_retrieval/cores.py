"""How many cores this process may keep busy."""

from __future__ import annotations

import math
import os
from pathlib import Path


def cores(group: Path = Path("/sys/fs/cgroup")) -> int:
    """Those that it may run on or, where its control group may use less of them in all, as many as that comes to.

    A container's limit (`docker run --cpus`, Kubernetes' `limits.cpu`) leaves every core of the machine in sight; a process for each
    would not fit the container's memory.

    Args:
        group: Where the control group of this process is found (version 2).
    """
    seen = len(os.sched_getaffinity(0))
    try:
        quota, period = map(int, (group / "cpu.max").read_text("ascii").split())
    except (OSError, ValueError):  # version 1, or no limit: `max 100000`
        return seen
    return min(seen, max(1, math.ceil(quota / period)))
