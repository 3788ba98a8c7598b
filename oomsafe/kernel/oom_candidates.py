"""The processes among which the OOM killer chooses, with what it counts of each: in one cgroup, or on the whole machine."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from oomsafe.kernel.cgroup import NO_LIMIT
from oomsafe.kernel.files import read_bytes, read_int, read_keyed, read_record, read_text
from oomsafe.kernel.oom_score import read_score
from oomsafe.policy.limits import Kind, Level
from oomsafe.policy.text import printable
from oomsafe.policy.victims import Candidate

#: What status says of a process with memory of its own; a kernel thread and a zombie have no such lines (fs/proc/task_mmu.c, task_mem).
_NAME = re.compile(rb"\AName:\t(.*)")
_SIZE = re.compile(rb"^(?:Rss(?:Anon|File|Shmem)|VmSwap|VmPTE):\s+(\d+) kB$", re.MULTILINE)
_SWAP = re.compile(rb"^VmSwap:\s+(\d+) kB$", re.MULTILINE)
_RSS = re.compile(rb"^VmRSS:\s+(\d+) kB$", re.MULTILINE)

#: At most this many cgroups are read below one.
FOLDERS = 4096


class Field(NamedTuple):
    """Those among whom the kernel chooses when one level is out of memory."""

    candidates: tuple[Candidate, ...]
    unseen: bool = False
    """Whether there are others that can't be seen from here: of another PID namespace, or hidden (hidepid)."""


def candidate_of(pid: int, proc: str = "/proc") -> Candidate | None:
    """What the kernel counts of this process; None if it is gone, is a kernel thread, or may not be read."""
    status = read_record(f"{proc}/{pid}/status")
    score = read_score(pid, proc)
    name = _NAME.search(status or b"")
    if status is None or score is None or name is None:
        return None
    sizes = _SIZE.findall(status)
    if b"\nRssAnon:" not in status:  # before Linux 4.5
        sizes += _RSS.findall(status)
    if not sizes:
        return None
    swap = _SWAP.search(status)
    return Candidate(
        pid=pid, name=printable(name[1].decode("utf-8", "replace")), held=1024 * sum(map(int, sizes)), oom_score_adj=score,
        swapped=0 if swap is None else 1024 * int(swap[1]), protected=_is_init(pid, proc),
    )  # fmt: skip


def candidates_of(pids: Iterable[int], proc: str = "/proc") -> Iterator[Candidate]:
    """Those of these processes that the kernel may choose from."""
    for pid in pids:
        found = candidate_of(pid, proc)
        if found is not None:
            yield found


def field_of(level: Level, proc: str = "/proc") -> Field | None:
    """Among whom the kernel chooses if this level is out of memory; None if that can't be known from here."""
    if level.source.kind is Kind.HIDDEN:
        return None
    pids, unseen = (_all(proc), _hides(proc)) if level.source.kind is Kind.MACHINE else _below(level.source.path)
    if pids is None:
        return None
    return Field(tuple(candidates_of(pids, proc)), unseen)


def total_of(level: Level, proc: str = "/proc") -> int | None:
    """What the kernel's scores are thousandths of if this level is out of memory, in bytes; None if it has no limit.

    A limit and the swap that may be used beside it (mm/memcontrol.c, mem_cgroup_get_max); the machine's memory and swap.
    """
    swap = read_keyed(f"{proc}/meminfo", factor=1024).get("SwapTotal", 0)
    if level.limit is None or level.source.kind is Kind.HIDDEN:
        return None
    if level.source.kind is Kind.MACHINE:
        return level.limit + swap
    return level.limit + min(swap, _swap_beside(level))


def _swap_beside(level: Level) -> int:
    folder = level.source.path
    if level.source.version == 1:
        if read_int(f"{folder}/memory.swappiness") == 0:
            return 0
        both = read_int(f"{folder}/memory.memsw.limit_in_bytes")
        return 0 if both is None else NO_LIMIT if both >= NO_LIMIT else max(0, both - (level.limit or 0))
    text = (read_text(f"{folder}/memory.swap.max") or "0").strip()
    return NO_LIMIT if text == "max" else int(text) if text.isdecimal() else 0


def _all(proc: str) -> list[int] | None:
    try:
        return [int(name) for name in os.listdir(proc) if name.isdecimal()]
    except OSError:
        return None


def _hides(proc: str) -> bool:
    """Whether this /proc shows fewer processes than there are: without the machine's kthreadd (pid 2) it is another PID namespace's, or
    hidepid's."""
    return not (read_text(f"{proc}/2/comm") or "").startswith("kthreadd")


def _is_init(pid: int, proc: str) -> bool:
    """Whether it is the machine's first process, which the kernel never takes; a container's first process it may take."""
    return pid == 1 and not _hides(proc)


def _below(folder: str) -> tuple[list[int] | None, bool]:
    """The processes of a cgroup and of those below it, and whether there are some that this PID namespace does not know (listed as 0)."""
    waiting, pids, asked = [folder], [], 0
    while waiting and asked < FOLDERS:
        path, asked = waiting.pop(), asked + 1
        listed = read_bytes(f"{path}/cgroup.procs")
        if listed is None and path == folder:
            return None, True
        pids += [int(word) for word in (listed or b"").split() if word.isdigit()]
        try:
            with os.scandir(path) as entries:
                waiting += [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
        except OSError:
            continue  # it was removed meanwhile
    return sorted({pid for pid in pids if pid}), 0 in pids or bool(waiting)
