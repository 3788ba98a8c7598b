"""The programs that a process has started, and what they hold of their own. Linux only: elsewhere there are none to be seen."""

from __future__ import annotations

import os
import time
from typing import NamedTuple

from oomsafe.kernel.files import read_bytes
from oomsafe.kernel.process import held_of

#: Clock ticks a second, in which /proc tells when a process was started.
TICKS = os.sysconf("SC_CLK_TCK")

#: So many are looked at: a process that forks without end is not to hold up who looks.
MOST = 256


class Program(NamedTuple):
    """One of them."""

    pid: int
    started: int
    """As start_time() tells it."""
    name: str
    """As ps shows it: at most 15 bytes, which the program itself may choose."""
    held: int
    """Bytes, without file pages: the kernel drops clean ones by itself."""


class _Stat(NamedTuple):
    started: int
    stack: int
    name: str


def since_boot() -> float:
    """Seconds, on the clock that processes' start times are told by."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class Descendants:
    """Of the process `pid`, those that were started after `since`, as since_boot() tells it."""

    def __init__(self, pid: int, since: float, proc: str = "/proc") -> None:
        self._pid = pid
        self._since = since * TICKS - 2  # the kernel rounds down
        self._proc = proc
        self._least: dict[tuple[int, int], int] = {}

    def look(self) -> list[Program]:
        """As they are now.

        A program counts whole. A fork that has executed nothing shares its parent's pages, so it counts by what it has grown since it
        was first seen: a process between fork and exec, which seems to hold all that its parent does, counts nothing. The two are told
        apart by where their stacks begin, which each exec chooses anew (proc(5), stat field 28; 0, and so a fork, for who may not know).
        """
        root = self._stat(self._pid)
        found: list[Program] = []
        if root is None:
            return found
        left = [(child, {0, root.stack}) for child in self._children(self._pid)]
        while left and len(found) < MOST:
            pid, stacks = left.pop()
            stat, held = self._stat(pid), held_of(pid, self._proc)
            if stat is None or held is None or stat.started < self._since:
                continue
            if stat.stack in stacks:
                least = self._least[pid, stat.started] = min(held, self._least.get((pid, stat.started), held))
                held -= least
            found.append(Program(pid, stat.started, stat.name, held))
            # of all above it: one that just ends has none any more
            left += [(child, stacks | {stat.stack}) for child in self._children(pid)]
        return found

    def _children(self, pid: int) -> list[int]:
        """None where the kernel does not list them (CONFIG_PROC_CHILDREN): to look for them in all of /proc costs too much here."""
        try:
            threads = os.listdir(f"{self._proc}/{pid}/task")
        except OSError:
            return []
        listed = [read_bytes(f"{self._proc}/{pid}/task/{thread}/children") or b"" for thread in threads]
        return [int(child) for found in listed for child in found.split()]

    def _stat(self, pid: int) -> _Stat | None:
        head, _, tail = (read_bytes(f"{self._proc}/{pid}/stat") or b"").rpartition(b") ")
        words = tail.split()
        try:
            return _Stat(int(words[19]), int(words[25]), head.partition(b"(")[2].decode("utf-8", "replace"))
        except (ValueError, IndexError):
            return None
