"""The memory cgroup of a process: its own and its ancestors' limits, and its working set. v1, v2 and hybrid."""

from __future__ import annotations

import logging
import os
import re
from collections import deque
from typing import NamedTuple

from oomsafe.kernel.files import as_int, read_int, read_keyed, read_text
from oomsafe.log import once
from oomsafe.policy.limits import Kind, Level, Source

#: v1 writes "no limit" as the highest multiple of the page size below 2**63 (mm/page_counter.c).
NO_LIMIT = 1 << 62

#: If the path of its cgroup does not lead to it, at most this many folders are searched for this process.
SEARCHED = 2000


class Use(NamedTuple):
    """The memory in use in a cgroup, in bytes."""

    working_set: int | None
    """usage - inactive_file, at least 0, as kubelet and cAdvisor count it; None if it can't be read."""
    droppable: int = 0
    """The recently used page cache in it (active_file), which the kernel drops before it kills."""
    usage: int | None = None
    """Everything charged to the cgroup, including page cache; None if it can't be read."""


class Cgroup(NamedTuple):
    """One memory cgroup. Every figure is read when asked for, in bytes; None is a figure that can't be read."""

    version: int
    path: str
    """Its folder, as this process sees it."""
    mount: str
    """Where the hierarchy is mounted: its highest visible ancestor."""

    def levels(self, own: Use | None = None, *, unlimited: bool = False) -> list[Level]:
        """This cgroup and each ancestor that has memory files, the nearest first; in v1 also a hidden one whose limit applies.

        `own` is the use of this cgroup, if it was read already. An ancestor's use is read only if a limit applies there, with
        `unlimited` always.
        """
        own = self.use() if own is None else own
        return self._v1_levels(own, unlimited) if self.version == 1 else self._v2_levels(own, unlimited)

    def _v2_levels(self, own: Use, unlimited: bool) -> list[Level]:
        levels = []
        for folder in self.ancestry():
            kills = _bound(folder, "memory.max")
            if kills.is_there:  # the root cgroup has no such files
                high = _bound(folder, "memory.high")
                levels.append(self._level(folder, kills.limit, high.limit, kills.unread + high.unread, own, unlimited))
        return levels

    def _v1_levels(self, own: Use, unlimited: bool) -> list[Level]:
        smallest = read_keyed(f"{self.path}/memory.stat").get("hierarchical_memory_limit")
        if smallest is not None and smallest >= NO_LIMIT:
            return [self._level(folder, None, None, (), own, unlimited) for folder in self.ancestry()]
        levels = []
        for folder in self.ancestry():
            limit, _, unread = _bound(folder, "memory.limit_in_bytes")
            # before Linux 5.11 a cgroup may not count its children's use (memory.use_hierarchy=0): then its limit does not apply to them
            applies = limit is not None and (smallest or 0) <= limit < NO_LIMIT
            levels.append(self._level(folder, limit if applies else None, None, unread, own, unlimited))
        if smallest is not None and all(level.limit != smallest for level in levels):
            levels.append(Level(Source(Kind.HIDDEN, self.mount), smallest))
        return levels

    def _level(self, folder: str, limit: int | None, high: int | None, unread: tuple[str, ...], own: Use, unlimited: bool) -> Level:
        use = Use(None)
        if folder == self.path:
            use = own
        elif unlimited or limit is not None or high is not None:
            use = self._use(folder)
        return Level(Source(Kind.CGROUP, folder, self.version), limit, high, *use, unread)

    @property
    def is_cut_off(self) -> bool:
        """Whether it has ancestors with limits that can't be seen: in a v2 cgroup namespace (only the real root has no memory.max)."""
        return self.version == 2 and os.path.exists(f"{self.mount}/memory.max")

    def use(self) -> Use:
        """The memory in use in it."""
        return self._use(self.path)

    def _use(self, folder: str) -> Use:
        path = f"{folder}/{'memory.usage_in_bytes' if self.version == 1 else 'memory.current'}"
        usage = read_int(path)
        if usage is None:
            once(path, logging.WARNING, "%s can't be read: what is in use there is unknown", path)
            return Use(None)
        of, stat = "total_" if self.version == 1 else "", read_keyed(f"{folder}/memory.stat")
        inactive = stat.get(f"{of}inactive_file")
        if inactive is None:
            return Use(None, usage=usage)
        working_set = max(0, usage - inactive)
        return Use(working_set, min(working_set, stat.get(f"{of}active_file", 0)), usage)

    def oom_kills(self) -> int | None:
        """How many processes of this cgroup the kernel's OOM killer has killed (since Linux 4.13); None if it can't be read."""
        name = "memory.oom_control" if self.version == 1 else "memory.events"
        return read_keyed(f"{self.path}/{name}").get("oom_kill")

    def dies_whole(self) -> str | None:
        """The nearest cgroup, this or an ancestor, that the kernel kills as a whole (memory.oom.group, v2 since Linux 4.19); None: none."""
        return next((folder for folder in self.ancestry() if read_int(f"{folder}/memory.oom.group") == 1), None)

    def kills_nobody(self) -> str | None:
        """The nearest v1 cgroup, this or an ancestor, in which the OOM killer is off (oom_kill_disable): there whoever asks for memory
        waits. None: none."""
        return next((folder for folder in self.ancestry() if read_keyed(f"{folder}/memory.oom_control").get("oom_kill_disable") == 1), None)

    def ancestry(self) -> list[str]:
        """Its folder and the folders above it up to the mount, nearest first."""
        folders = [self.path]
        while folders[-1] != self.mount and len(folders[-1]) > len(self.mount):
            folders.append(os.path.dirname(folders[-1]))
        return folders


def highs_of(folder: str) -> int | None:
    """How often a v2 cgroup has passed its memory.high, it and not one below it; None if that can't be read (v1 has no memory.high).

    memory.events.local is there since Linux 5.2; before, memory.events counts what happens below, too.
    """
    return next(
        (count for name in ("memory.events.local", "memory.events") if (count := read_keyed(f"{folder}/{name}").get("high")) is not None),
        None,
    )


def stalled_of(folder: str) -> int | None:
    """Microseconds in which some process of a v2 cgroup has waited for memory since it was made (PSI, memory.pressure).

    None if that can't be read: a v1 cgroup has no such file, and a kernel may have PSI off.
    """
    found = _STALLED.search(read_text(f"{folder}/memory.pressure") or "")
    return None if found is None else int(found[1])


#: The total of the line that counts the time in which at least one process waited (Documentation/accounting/psi.rst).
_STALLED = re.compile(r"^some .*\btotal=(\d{1,18})$", re.MULTILINE)

#: By path of a /proc/PID/cgroup file: its text, and the cgroup that was found for it. mountinfo may be long, so it is only read
#: again when the text changes.
_found: dict[str, tuple[str, Cgroup | None]] = {}


def find_cgroup(pid: int | str = "self", proc: str = "/proc") -> Cgroup | None:
    """The memory cgroup that a process is charged to; None if no memory controller is mounted (or there are no cgroups at all).

    A hybrid machine has cgroup2 mounted beside v1 controllers: the v1 line with `memory` wins (cgroups(7)). A v2 cgroup whose
    parent does not enable the memory controller for it is charged to the nearest ancestor that has the controller.
    """
    path = f"{proc}/{pid}/cgroup"
    text = read_text(path) or ""
    known = _found.get(path)
    if known is not None and known[0] == text and (known[1] is None or os.path.isdir(known[1].path)):
        return known[1]
    found = _find(text, proc, os.getpid() if pid == "self" else int(pid))
    if pid == "self":
        _found[path] = text, found
    return found


def _find(text: str, proc: str, pid: int) -> Cgroup | None:
    lines = [line.split(":", 2) for line in text.splitlines()]
    mounts = mounts_of("memory", proc)
    for parts in lines:
        if len(parts) == 3 and "memory" in parts[1].split(",") and (mount := mounts.get(1)):
            return Cgroup(1, _folder(mount, parts[2], pid), mount.point)
    for parts in lines:
        if len(parts) == 3 and parts[:2] == ["0", ""] and (mount := mounts.get(2)):
            found = Cgroup(2, _folder(mount, parts[2], pid), mount.point)
            # a cgroup without the controller has no memory files, nor has the root cgroup
            charged = next((folder for folder in found.ancestry() if os.path.exists(f"{folder}/memory.current")), None)
            return None if charged is None else found._replace(path=charged)
    if _is_below_the_root(lines) and not mounts:
        once("no cgroups", logging.WARNING, "no memory cgroups are mounted here, and this process is in one: its limit can't be seen")
    return None


def _is_below_the_root(lines: list[list[str]]) -> bool:
    """Whether a limit may apply to a process: the root has none. In a cgroup namespace "/" may be any cgroup."""
    return any(len(parts) == 3 and parts[2] != "/" and ("memory" in parts[1].split(",") or parts[:2] == ["0", ""]) for parts in lines)


class Mount(NamedTuple):
    """One mounted cgroup hierarchy."""

    root: str
    """The part of the hierarchy that is mounted here: "/" or, in a container, the container's own cgroup."""
    point: str


def mounts_of(controller: str, proc: str) -> dict[int, Mount]:
    """By version, the first mount of a cgroup hierarchy that may have this controller (proc(5), mountinfo)."""
    found: dict[int, Mount] = {}
    for line in (read_text(f"{proc}/self/mountinfo") or "").splitlines():
        left, _, right = line.partition(" - ")
        fields, kind = left.split(), right.split()
        if len(fields) < 5 or len(kind) < 3:
            continue
        mount = Mount(_unescape(fields[3]), _unescape(fields[4]))
        if kind[0] == "cgroup2":
            found.setdefault(2, mount)
        elif kind[0] == "cgroup" and controller in kind[2].split(","):
            found.setdefault(1, mount)
    return found


def _folder(mount: Mount, path: str, pid: int) -> str:
    """The folder below `mount` of the cgroup `path`, which process `pid` is in; the mount point if it can't be found.

    Both paths start at the root of this process's cgroup namespace (cgroup_namespaces(7)); above that they read /../.. instead of names.
    So if the host's hierarchy is mounted in a namespace, the names between the two are unknown, and the folders are searched.
    """
    (rises, root), (climbs, names) = _steps(mount.root), _steps(path)
    folder = None
    if rises == climbs and names[: len(root)] == root:
        folder = _join(mount.point, names[len(root) :])
    elif not climbs and not rises:  # a container's own part is mounted under another name
        folder = _join(mount.point, names)
    if folder is not None and os.path.isdir(folder):
        return folder
    # a cgroup above the mounted part can't be found below the mount point
    found = None if folder is None and rises < climbs else _searched(mount.point, pid)
    if found is None and (rises or climbs or names):
        # a mount that starts above this namespace is the host's, and the figures at its root are those of all processes
        instead = "its limits and what it uses are not known" if rises else f"its figures are read at {mount.point}"
        once(f"cgroup {path}", logging.WARNING, "the cgroup %s can't be seen below %s: %s", path, mount.point, instead)
    return found or mount.point


def _steps(path: str) -> tuple[int, list[str]]:
    """How many levels up a path starts (its leading ".."), and the names that follow."""
    names = [name for name in path.split("/") if name not in ("", ".")]
    climbs = next((number for number, name in enumerate(names) if name != ".."), len(names))
    return climbs, names[climbs:]


def _join(point: str, names: list[str]) -> str:
    return os.path.normpath("/".join([point, *names]))


def _searched(point: str, pid: int) -> str | None:
    """The folder below `point` whose cgroup.procs lists the process; None if none of the first SEARCHED folders does."""
    waiting, asked = deque([point]), 0
    while waiting and asked < SEARCHED:
        folder, asked = waiting.popleft(), asked + 1
        if str(pid) in (read_text(f"{folder}/cgroup.procs") or "").split():
            return folder
        try:
            with os.scandir(folder) as entries:
                waiting.extend(entry.path for entry in entries if entry.is_dir(follow_symlinks=False))
        except OSError:
            continue  # the folder has been removed meanwhile
    return None


class _Bound(NamedTuple):
    """What one file says that limits a cgroup."""

    limit: int | None
    """In bytes; v1's "no limit" is a number, v2's is None."""
    is_there: bool = True
    unread: tuple[str, ...] = ()
    """The file's name, where it is there and can't be read, or holds no number."""


def _bound(folder: str, name: str) -> _Bound:
    path = f"{folder}/{name}"
    text = read_text(path)
    if text is None:
        there = os.path.exists(path)
        return _Bound(None, there, (name,) if there else ())
    if text.strip() == "max":
        return _Bound(None)
    limit = as_int(path, text)
    return _Bound(limit, unread=() if limit is not None else (name,))


def _unescape(text: str) -> str:
    """mountinfo writes space, tab, newline and backslash as octal."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)
