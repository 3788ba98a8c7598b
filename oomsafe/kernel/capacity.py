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
    """The capacity as it is now. Where there is neither a cgroup nor /proc/meminfo, psutil is asked.

    `held` tells what the pool's processes hold in bytes, where no cgroup does; without, that is what this process has.
    """
    cgroup = find_cgroup(proc=proc)
    use = cgroup.use() if cgroup is not None else None
    levels = cgroup.levels(use) if cgroup is not None else []
    own = None if use is None else use.working_set
    total, in_use = _machine(proc)
    if total is not None:
        levels.append(Level(total, MACHINE, in_use))
    # where a level's use can't be read, the pool's own is the least that it is
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
    """What of all that counts can't be known from here; empty for nothing."""
    if level.used is None and level.source != MACHINE:
        return "what others use below that limit can't be seen"
    if in_use is None:
        return "what is in use on this machine can't be read"
    return f"limits above {cgroup.mount} can't be seen" if cgroup is not None and cgroup.is_cut_off else ""


def _own_rss() -> int | None:
    return rss_of(os.getpid())


def _machine(proc: str) -> tuple[int | None, int | None]:
    """(MemTotal, MemTotal - MemAvailable) in bytes; None where they are not shown, as under systemd's ProcSubset=pid."""
    table = read_keyed(f"{proc}/meminfo", factor=1024)
    total = table.get("MemTotal")
    if total is not None:
        available = table.get("MemAvailable")
        return total, None if available is None else total - available
    if proc != "/proc":
        return None, None
    if not os.path.isdir(f"{proc}/self"):
        import psutil  # here: only a host without /proc pays for it

        try:
            memory = psutil.virtual_memory()
            return memory.total, memory.total - memory.available
        except OSError:
            pass  # Linux without /proc: it would read the same file
    hidden = "%s/meminfo can't be read (systemd's ProcSubset=pid hides it): what this machine has in use is not known"
    once("meminfo", logging.WARNING, hidden, proc)
    return _total(), None


def _total() -> int | None:
    """The machine's memory without /proc (sysinfo(2)); None where the C library has another way."""
    try:
        pages = os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE") if pages > 0 else None
