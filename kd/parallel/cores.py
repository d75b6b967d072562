"""How many threads a process may keep busy."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path, PurePosixPath

CGROUPS = Path("/sys/fs/cgroup")


def num_cores() -> int:
    """Cores that this process may use: of its affinity mask, and of its container's CPU quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota = cpu_quota()
    return max(1, min(cores or 1, math.ceil(quota) if quota < math.inf else sys.maxsize))


def cores_per_rank() -> int:
    """Those of this process's share, where the ranks of a machine divide its cores; at least 1."""
    return max(1, num_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def env_threads() -> int:
    """OMP_NUM_THREADS, of which only the first level counts here; 0: not set, or no number."""
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return int(first) if first.isdecimal() else 0


def cpu_quota(cgroups: Path = CGROUPS, membership: Path = Path("/proc/self/cgroup")) -> float:
    """Cores' worth of time that Linux's control groups grant, in version 1 or 2; inf: no limit."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return math.inf
    quotas = [math.inf]
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, read = cgroups, _quota_v2
        elif "cpu" in controllers.split(","):
            root, read = cgroups / "cpu", _quota_v1
        else:
            continue
        # A container sees its own group as the root, whatever its path says: missing ones are
        # passed over.
        parts = PurePosixPath(path).relative_to("/").parts
        folders = [root.joinpath(*parts[:depth]) for depth in range(len(parts) + 1)]
        quotas += [quota for folder in folders if (quota := read(folder)) is not None]
    return min(quotas)


def _quota_v2(folder: Path) -> float | None:
    try:
        quota, period = (folder / "cpu.max").read_text().split()
    except OSError:
        return None
    return None if quota == "max" else int(quota) / int(period)


def _quota_v1(folder: Path) -> float | None:
    try:
        quota = int((folder / "cpu.cfs_quota_us").read_text())
        period = int((folder / "cpu.cfs_period_us").read_text())
    except OSError:
        return None
    return quota / period if quota > 0 else None
