"""Whom the kernel's OOM killer has killed lately, according to the kernel's log, where this process may read that."""

from __future__ import annotations

import os
import re
import time
from typing import NamedTuple

from oomsafe.kernel.kmsg import KMSG, open_log, records_of

#: The most records that are read, and seconds that may be spent: the log may be large, and grow meanwhile.
MOST, LONGEST = 50_000, 0.25

#: The first number of a record that a program wrote is this or above: facility 1.
KERNEL = 8

#: The inode number of the initial PID namespace (include/linux/proc_ns.h, PROC_PID_INIT_INO).
INITIAL_PIDS = 0xEFFFFFFC

#: "Killed process 4711 (a name) total-vm:..." is in the same words since 2.6.32, shmem-rss since 4.5.
_KILLED = re.compile(
    rb"[^\n]{0,200}?Killed process (\d+) \(([^\n]{0,64})\) total-vm:\d+kB, anon-rss:(\d+)kB, file-rss:\d+kB(?:, shmem-rss:(\d+)kB)?"
)

#: Facility times 8 plus priority, sequence number, microseconds since boot.
_HEAD = re.compile(rb"(\d+),\d+,(\d+),[^;]*;")


class Victim(NamedTuple):
    """A process that the kernel has killed for memory."""

    pid: int
    """In the initial PID namespace."""
    name: bytes
    """Its name (comm)."""
    held: int
    """Its anonymous and shared memory then, in bytes."""


class Victims(NamedTuple):
    """The processes that the kernel has killed for memory, the latest last."""

    killed: tuple[Victim, ...]
    complete: bool
    """Whether the log reaches back to the time that was asked for: then whoever is not named was not killed."""


def oom_victims(since: float, path: str = KMSG) -> Victims | None:
    """Whom the kernel has killed since `since`, on the clock of time.monotonic(). None: the log can't be read here (kmsg.open_log()).

    The line about a kill is not rate limited, unlike the report before it (mm/oom_kill.c, __oom_kill_process()).
    """
    try:
        fd = open_log(path)
    except OSError:
        return None
    killed: list[Victim] = []
    first = None
    until = time.monotonic() + LONGEST
    read_all = True
    try:
        for number, record in enumerate(records_of(fd)):
            if number >= MOST or (not number % 256 and time.monotonic() > until):
                read_all = False
                break
            head = None if record is None or (first is not None and b"Killed process" not in record) else _HEAD.match(record)
            if record is None or head is None:
                continue
            at = int(head[2]) / 1e6
            first = at if first is None else first
            found = _KILLED.match(record, head.end()) if at >= since and int(head[1]) < KERNEL else None
            if found is not None:
                killed.append(Victim(int(found[1]), found[2], (int(found[3]) + int(found[4] or 0)) * 1024))
    except OSError:
        return None
    finally:
        os.close(fd)
    return Victims(tuple(killed), read_all and first is not None and first <= since)


def sees_initial_pids(proc: str = "/proc") -> bool:
    """Whether pids here are those of the kernel's log: False in a container, which has a PID namespace of its own."""
    try:
        return os.stat(f"{proc}/self/ns/pid").st_ino == INITIAL_PIDS
    except OSError:
        return False
