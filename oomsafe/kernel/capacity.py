"""What the kernel allows a pool: the tightest of its cgroup's limits, its ancestors' and the machine's memory."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence

from oomsafe.kernel.cgroup import Cgroup, find_cgroup
from oomsafe.kernel.files import read_keyed
from oomsafe.kernel.process import rss_of
from oomsafe.log import once
from oomsafe.policy.limits import MACHINE, Capacity, Level, tightest


def read_capacity(
    proc: str = "/proc", supervisor_rss: int | None = None, workers: int = 1, beside: int = 0, held: Callable[[], int | None] | None = None
) -> Capacity:
    """The capacity now. On a host without /proc, psutil is used.

    `held` returns what the pool's processes hold, in bytes; it is called if no cgroup gives that figure. None: this process's rss is used.
    """
    cgroup = find_cgroup(proc=proc)
    use = cgroup.use() if cgroup is not None else None
    own, machine = None if use is None else use.working_set, _machine(proc)
    levels = (*(cgroup.levels(use) if cgroup is not None else ()), machine)
    # if a level's use can't be read, it is at least the pool's own
    level = tightest(levels, own or 0)
    if level is None:
        return Capacity(None, MACHINE, machine.used, supervisor_rss, workers, beside, levels=levels)
    if level is machine:
        own = (held or _own_rss)()
    others = None if own is None or level.used is None else max(0, level.used - own)
    return Capacity(
        level.effective, level.bound_by, own if level.used is None else level.used, supervisor_rss, workers, beside,
        others=others, droppable=level.droppable, smallest=min(each.effective for each in levels if each.effective is not None),
        unseen=_unseen(cgroup, level, levels), levels=levels,
    )  # fmt: skip


def read_levels(proc: str = "/proc", pid: int | str = "self") -> tuple[Level, ...]:
    """Every level that may limit a process, the nearest first and the machine last, each with its use.

    Unlike in a capacity's `levels`, the use is read at levels without a limit, too.
    """
    cgroup = find_cgroup(pid, proc)
    return (*(cgroup.levels(unlimited=True) if cgroup is not None else ()), _machine(proc))


def _unseen(cgroup: Cgroup | None, level: Level, levels: Sequence[Level]) -> str:
    """Which of the figures can't be known from here, for the log; empty if all are known."""
    if level.used is None and level.source != MACHINE:
        return "what others use below that limit can't be seen"
    if levels[-1].used is None:
        return "what is in use on this machine can't be read"
    unread = next((f"{each.source.path}/{name}" for each in levels for name in each.unread), None)
    if unread is not None:
        return f"{unread} can't be read"
    return f"limits above {cgroup.mount} can't be seen" if cgroup is not None and cgroup.is_cut_off else ""


def _own_rss() -> int | None:
    return rss_of(os.getpid())


def _machine(proc: str) -> Level:
    """MemTotal, and the use MemTotal - MemAvailable; None if they are not shown, as under systemd's ProcSubset=pid."""
    table = read_keyed(f"{proc}/meminfo", factor=1024)
    total, available, free = map(table.get, ("MemTotal", "MemAvailable", "MemFree"))
    if total is not None:
        used, usage = (None if left is None else total - left for left in (available, free))
        return Level(MACHINE, total, used=used, usage=usage)
    if proc != "/proc":
        return Level(MACHINE, None)
    if not os.path.isdir(f"{proc}/self"):
        import psutil  # imported here, so that only a host without /proc pays for it

        try:
            memory = psutil.virtual_memory()
            return Level(MACHINE, memory.total, used=memory.total - memory.available, usage=memory.total - memory.free)
        except OSError:
            pass  # Linux without /proc: psutil reads the same file
    hidden = "%s/meminfo can't be read (systemd's ProcSubset=pid hides it): what this machine has in use is not known"
    once("meminfo", logging.WARNING, hidden, proc)
    return Level(MACHINE, _total())


def _total() -> int | None:
    """The machine's memory in bytes, without /proc (sysinfo(2)); None if the C library does not provide it."""
    try:
        pages = os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE") if pages > 0 else None
