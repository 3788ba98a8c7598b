"""How many processes the kernel has killed for their memory."""

from __future__ import annotations

import os
from typing import NamedTuple

from oomsafe.kernel.cgroup import find_cgroup
from oomsafe.kernel.files import read_keyed, read_text


class Kills(NamedTuple):
    """A count that only rises."""

    total: int
    own: bool
    """Of this process's cgroup alone; else of the whole machine."""


def read_kills(proc: str = "/proc") -> Kills | None:
    """Of this process's memory cgroup, where victims are counted whichever limit they were killed for (Linux 4.13).

    The count rises before the signal is sent, so who has reaped a victim finds it there. Else the machine's; None where there is none.
    """
    cgroup = find_cgroup(proc=proc)
    count = cgroup.oom_kills() if cgroup is not None else None
    if count is not None:
        return Kills(count, own=True)
    count = machine_kills(proc)
    return None if count is None else Kills(count, own=False)


def machine_kills(proc: str = "/proc") -> int | None:
    """Of the whole machine since it was booted, in whatever container (vmstat, oom_kill; Linux 4.13); None when it can't be read."""
    return read_keyed(f"{proc}/vmstat").get("oom_kill")


def boot_id(proc: str = "/proc") -> str:
    """Which boot of which machine this is, the same in all its containers; empty when it can't be read."""
    return (read_text(f"{proc}/sys/kernel/random/boot_id") or "").strip()


def pid_namespace(proc: str = "/proc") -> str:
    """Where this process's pids mean something; empty when it can't be read."""
    try:
        return os.readlink(f"{proc}/self/ns/pid")
    except OSError:
        return ""
