"""The memory cgroup that a process is in: its effective limit and its working set. v1, v2 and hybrid."""

from __future__ import annotations

import os
import re
from typing import NamedTuple

from oomsafe.kernel.files import read_int, read_keyed, read_text, say_once

#: v1 writes "no limit" as the highest multiple of the page size below 2**63 (mm/page_counter.c).
NO_LIMIT = 1 << 62


class Cgroup(NamedTuple):
    """One memory cgroup. Every figure is read anew, in bytes; None is one that can't be read."""

    version: int
    path: str
    """Its folder, as this process sees it."""
    mount: str
    """Where the hierarchy is mounted: the highest ancestor that can be seen."""

    def limit(self) -> int | None:
        """The smallest limit of this cgroup and its visible ancestors; None for no limit."""
        if self.version == 1:
            limit = read_keyed(f"{self.path}/memory.stat").get("hierarchical_memory_limit")
            return limit if limit is not None and limit < NO_LIMIT else None
        limits = [limit for folder in self.ancestry() if (limit := _v2_limit(f"{folder}/memory.max")) is not None]
        return min(limits, default=None)

    def usage(self) -> int | None:
        """Everything charged to it, page cache included."""
        path = f"{self.path}/{'memory.usage_in_bytes' if self.version == 1 else 'memory.current'}"
        usage = read_int(path)
        if usage is None:
            say_once(path, f"{path} can't be read: what the pool has in use is unknown")
        return usage

    def working_set(self) -> int | None:
        """usage - inactive_file, at least 0: what can't be dropped under pressure, as kubelet and cAdvisor count it."""
        usage = self.usage()
        if usage is None:
            return None
        key = "total_inactive_file" if self.version == 1 else "inactive_file"
        inactive = read_keyed(f"{self.path}/memory.stat").get(key)
        return None if inactive is None else max(0, usage - inactive)

    def oom_kills(self) -> int | None:
        """How many processes of this cgroup the kernel has killed (since 4.13); None when it can't be read."""
        name = "memory.oom_control" if self.version == 1 else "memory.events"
        return read_keyed(f"{self.path}/{name}").get("oom_kill")

    def ancestry(self) -> list[str]:
        """Its folder, and those above it up to the mount, nearest first."""
        folders = [self.path]
        while folders[-1] != self.mount and len(folders[-1]) > len(self.mount):
            folders.append(os.path.dirname(folders[-1]))
        return folders


def find_cgroup(pid: int | str = "self", proc: str = "/proc") -> Cgroup | None:
    """The memory cgroup of a process; None where no memory controller is mounted (or there are no cgroups at all).

    A hybrid machine has cgroup2 mounted beside v1 controllers: the v1 line with `memory` wins, and a
    cgroup2 hierarchy counts only where its folder has the memory files (cgroups(7)).
    """
    lines = [line.split(":", 2) for line in (read_text(f"{proc}/{pid}/cgroup") or "").splitlines()]
    mounts = _mounts(proc)
    for parts in lines:
        if len(parts) == 3 and "memory" in parts[1].split(",") and (mount := mounts.get(1)):
            return _at(1, mount, parts[2])
    for parts in lines:
        if len(parts) == 3 and parts[:2] == ["0", ""] and (mount := mounts.get(2)):
            found = _at(2, mount, parts[2])
            if os.path.exists(f"{found.path}/memory.current"):
                return found
    return None


class _Mount(NamedTuple):
    root: str
    """Which part of the hierarchy is mounted here: "/" or, in a container, its own cgroup."""
    point: str


def _mounts(proc: str) -> dict[int, _Mount]:
    """The mounts of memory cgroup hierarchies, by version; the first of each (proc(5), mountinfo)."""
    found: dict[int, _Mount] = {}
    for line in (read_text(f"{proc}/self/mountinfo") or "").splitlines():
        left, _, right = line.partition(" - ")
        fields, kind = left.split(), right.split()
        if len(fields) < 5 or len(kind) < 3:
            continue
        mount = _Mount(_unescape(fields[3]), _unescape(fields[4]))
        if kind[0] == "cgroup2":
            found.setdefault(2, mount)
        elif kind[0] == "cgroup" and "memory" in kind[2].split(","):
            found.setdefault(1, mount)
    return found


def _at(version: int, mount: _Mount, path: str) -> Cgroup:
    """The folder of `path` below `mount`; the mount point where the two don't meet.

    With a cgroup namespace the path may begin with /../..: then the cgroup is above what is mounted here.
    """
    inside = path
    if mount.root != "/" and (path == mount.root or path.startswith(f"{mount.root}/")):
        inside = path[len(mount.root) :]
    folder = os.path.normpath(f"{mount.point}/{inside.lstrip('/')}")
    above = ".." in path.split("/")
    if above or not os.path.isdir(folder):
        if above or inside not in ("", "/"):
            say_once(f"cgroup {path}", f"the cgroup {path} can't be seen below {mount.point}: its figures are read at {mount.point}")
        folder = mount.point
    return Cgroup(version, folder, mount.point)


def _v2_limit(path: str) -> int | None:
    # the root cgroup has no memory.max at all
    text = (read_text(path) or "max").strip()
    return None if text == "max" else read_int(path)


def _unescape(text: str) -> str:
    """mountinfo writes space, tab, newline and backslash as octal."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)
