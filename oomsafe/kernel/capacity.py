"""What the kernel allows a pool: the tightest of its cgroup's limits, its ancestors' and the machine's memory."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

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
    levels = cgroup.levels(use) if cgroup is not None else []
    own = None if use is None else use.working_set
    total, in_use = _machine(proc)
    if total is not None:
        levels.append(Level(total, MACHINE, in_use))
    # if a level's use can't be read, it is at least the pool's own
    level = tightest(levels, own or 0)
    if level is None:
        return Capacity(None, MACHINE, in_use, supervisor_rss, workers, beside)
    if level.source == MACHINE:
        own = (held or _own_rss)()
    others = None if own is None or level.used is None else max(0, level.used - own)
    return Capacity(
        level.limit, level.source, own if level.used is None else level.used, supervisor_rss, workers, beside,
        others=others, droppable=level.droppable, smallest=min(each.limit for each in levels), unseen=_unseen(cgroup, level, in_use),
    )  # fmt: skip


def _unseen(cgroup: Cgroup | None, level: Level, in_use: int | None) -> str:
    """Which of the figures can't be known from here, for the log; empty if all are known."""
    if level.used is None and level.source != MACHINE:
        return "what others use below that limit can't be seen"
    if in_use is None:
        return "what is in use on this machine can't be read"
    return f"limits above {cgroup.mount} can't be seen" if cgroup is not None and cgroup.is_cut_off else ""


def _own_rss() -> int | None:
    return rss_of(os.getpid())


def _machine(proc: str) -> tuple[int | None, int | None]:
    """(MemTotal, MemTotal - MemAvailable) in bytes; None if they are not shown, as under systemd's ProcSubset=pid."""
    table = read_keyed(f"{proc}/meminfo", factor=1024)
    total = table.get("MemTotal")
    if total is not None:
        available = table.get("MemAvailable")
        return total, None if available is None else total - available
    if proc != "/proc":
        return None, None
    if not os.path.isdir(f"{proc}/self"):
        import psutil  # imported here, so that only a host without /proc pays for it

        try:
            memory = psutil.virtual_memory()
            return memory.total, memory.total - memory.available
        except OSError:
            pass  # Linux without /proc: psutil reads the same file
    hidden = "%s/meminfo can't be read (systemd's ProcSubset=pid hides it): what this machine has in use is not known"
    once("meminfo", logging.WARNING, hidden, proc)
    return _total(), None


def _total() -> int | None:
    """The machine's memory in bytes, without /proc (sysinfo(2)); None if the C library does not provide it."""
    try:
        pages = os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE") if pages > 0 else None
