"""How many processes the kernel's OOM killer has killed."""

from __future__ import annotations

import os
from typing import NamedTuple

from oomsafe.kernel.cgroup import find_cgroup
from oomsafe.kernel.files import read_keyed, read_text


class Kills(NamedTuple):
    """The kernel's count of OOM kills, which only rises."""

    total: int
    own: bool
    """It counts only this process's cgroup; False: the whole machine."""


def read_kills(proc: str = "/proc") -> Kills | None:
    """The count of this process's memory cgroup, else the machine's; None if there is neither.

    A cgroup counts its own victims, whichever limit they were killed for (Linux 4.13). The count rises before the signal is sent, so
    a parent that has reaped a victim already finds it counted.
    """
    cgroup = find_cgroup(proc=proc)
    count = cgroup.oom_kills() if cgroup is not None else None
    if count is not None:
        return Kills(count, own=True)
    count = machine_kills(proc)
    return None if count is None else Kills(count, own=False)


#: The extended attribute in which systemd-oomd counts the processes that it has killed in a cgroup (oomd-util.c).
OOMD = "user.oomd_kill"


def oomd_kills() -> int | None:
    """How many processes systemd-oomd has killed in this process's cgroup and those above it; None: it has left no count there."""
    cgroup = find_cgroup()
    counts = []
    for folder in cgroup.ancestry() if cgroup is not None and cgroup.version == 2 else ():
        try:
            counts.append(int(os.getxattr(folder, OOMD)))
        except (OSError, ValueError, AttributeError):  # there is none; macOS has no such function
            continue
    return sum(counts) if counts else None


def machine_kills(proc: str = "/proc") -> int | None:
    """The count of the whole machine since boot, all containers included (vmstat, oom_kill; Linux 4.13); None if it can't be read."""
    return read_keyed(f"{proc}/vmstat").get("oom_kill")


def boot_id(proc: str = "/proc") -> str:
    """An id of this boot of this machine, the same in all its containers; empty if it can't be read."""
    return (read_text(f"{proc}/sys/kernel/random/boot_id") or "").strip()


def pid_namespace(proc: str = "/proc") -> str:
    """An id of the PID namespace, in which this process's pids are valid; empty if it can't be read."""
    try:
        return os.readlink(f"{proc}/self/ns/pid")
    except OSError:
        return ""
