"""What the kernel allows a pool: the cgroup's effective limit, else the machine's memory."""

from __future__ import annotations

from oomsafe.kernel.cgroup import find_cgroup
from oomsafe.kernel.files import read_keyed
from oomsafe.policy.limits import Capacity

#: A capacity's source where no cgroup limits it.
MACHINE = "this machine's memory"


def read_capacity(proc: str = "/proc", supervisor_rss: int | None = None, workers: int = 1) -> Capacity:
    """The capacity as it is now. Where there is neither a cgroup nor /proc/meminfo, psutil is asked."""
    total, in_use = _machine(proc)
    cgroup = find_cgroup(proc=proc)
    limit = cgroup.limit() if cgroup else None
    if cgroup is not None and limit is not None and (total is None or limit <= total):
        return Capacity(limit, f"cgroup v{cgroup.version} {cgroup.path}", cgroup.working_set(), supervisor_rss, workers)
    return Capacity(total, MACHINE, in_use, supervisor_rss, workers)


def _machine(proc: str) -> tuple[int | None, int | None]:
    """(MemTotal, MemTotal - MemAvailable) in bytes."""
    table = read_keyed(f"{proc}/meminfo", factor=1024)
    total = table.get("MemTotal")
    if total is not None:
        available = table.get("MemAvailable")
        return total, None if available is None else total - available
    if proc != "/proc":
        return None, None
    import psutil  # here: only a host without /proc pays for it

    memory = psutil.virtual_memory()
    return memory.total, memory.total - memory.available
