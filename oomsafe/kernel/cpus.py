"""How many processors a process may use: those that it may run on, and its cgroup's quota."""

from __future__ import annotations

import os
import re

from oomsafe.kernel.cgroup import mounts_of
from oomsafe.kernel.files import read_int, read_text

#: The processors of a process's affinity, a mask in hexadecimal (status, proc(5)).
_MASK = re.compile(r"^Cpus_allowed:\s+([0-9a-f,]+)$", re.MULTILINE)


def cpus_of(pid: int | None = None, proc: str = "/proc") -> float | None:
    """The processors that a process (None: this one) may use, such as 1.5; None: not known.

    The smaller of those that it may run on (sched_setaffinity(2)) and the smallest quota of its cgroup and all that can be seen above
    it: cpu.max with v2, cpu.cfs_quota_us with v1 (Documentation/admin-guide/cgroup-v2.rst, scheduler/sched-bwc.rst).
    """
    quotas = [quota for folder in _folders(pid, proc) if (quota := _quota(folder)) is not None]
    return min([*quotas, *_runs_on(pid, proc)], default=None)


def _runs_on(pid: int | None, proc: str) -> list[float]:
    found = _MASK.search(read_text(f"{proc}/{pid or 'self'}/status") or "")
    if found is not None:
        return [float(bin(int(found[1].replace(",", ""), 16)).count("1"))]
    try:
        return [float(len(os.sched_getaffinity(pid or 0)))]
    except OSError:  # it is gone
        return []
    except AttributeError:  # macOS has no such function
        return [float(count)] if (count := os.cpu_count()) else []


def _quota(folder: str) -> float | None:
    """Processors that the cgroup in this folder may use; None: it has no quota, or there are no such files."""
    words = (read_text(f"{folder}/cpu.max") or "").split()
    if len(words) == 2 and all(word.isdigit() for word in words):
        quota, period = int(words[0]), int(words[1])
    else:
        quota, period = (read_int(f"{folder}/cpu.cfs_{name}_us") or 0 for name in ("quota", "period"))  # v1's "no quota" is -1
    return quota / period if quota > 0 and period > 0 else None


def _folders(pid: int | None, proc: str) -> list[str]:
    """The folders of its cgroups with a processor controller, each with those above it up to the mount."""
    lines = [line.split(":", 2) for line in (read_text(f"{proc}/{pid or 'self'}/cgroup") or "").splitlines()]
    paths = {1 if parts[1] else 2: parts[2] for parts in lines if len(parts) == 3 and (not parts[1] or _has_cpu(parts[1]))}
    folders = []
    for version, (root, point) in mounts_of("cpu", proc).items():
        path = paths.get(version)
        if path is None:
            continue
        # of a part of the hierarchy that is mounted, as in a container, the path begins with that part's own
        below = path.removeprefix(root.rstrip("/")).strip("/")
        names = [] if not below or ".." in below.split("/") or not os.path.isdir(f"{point}/{below}") else below.split("/")
        folders += ["/".join([point, *names[:count]]) for count in range(len(names), -1, -1)]
    return folders


def _has_cpu(controllers: str) -> bool:
    return "cpu" in controllers.split(",")
