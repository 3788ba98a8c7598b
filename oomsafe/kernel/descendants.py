"""The programs that a process has started, and the memory that they hold. Linux only: elsewhere none are found."""

from __future__ import annotations

import os
import time
from typing import NamedTuple

from oomsafe.kernel.files import read_bytes, read_record
from oomsafe.kernel.process import held_of

#: Clock ticks a second, the unit of start times in /proc.
TICKS = os.sysconf("SC_CLK_TCK")

#: At most this many programs are measured, so that a process that forks without end does not hold up the caller.
MOST = 256


class Program(NamedTuple):
    """One program."""

    pid: int
    started: int
    """Its start_time()."""
    name: str
    """As ps shows it: at most 15 bytes, which the program itself may choose."""
    held: int
    """Bytes, without file pages, because the kernel drops clean ones by itself."""


class _Stat(NamedTuple):
    started: int
    stack: int
    name: str


def since_boot() -> float:
    """Seconds now, on the clock of processes' start times."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class Descendants:
    """The descendants of the process `pid` that were started after `since` (a since_boot())."""

    def __init__(self, pid: int, since: float, proc: str = "/proc") -> None:
        self._pid = pid
        self._since = since * TICKS - 2  # the kernel rounds down
        self._proc = proc
        self._least: dict[tuple[int, int], int] = {}

    def measure(self) -> list[Program]:
        """Measure them now.

        A program counts in full. A fork that has not called exec shares its parent's pages, so only its growth since it was first
        measured counts: a process between fork and exec, which seems to hold all that its parent does, counts 0. The start of the
        stack, which each exec chooses anew, tells them apart (proc(5), stat field 28; without permission to read it, it is 0, and the
        process counts as a fork).
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
            # compared with all stacks above it, because a process that just ends has none any more
            left += [(child, stacks | {stat.stack}) for child in self._children(pid)]
        return found

    def _children(self, pid: int) -> list[int]:
        """Empty if the kernel does not list children (CONFIG_PROC_CHILDREN): searching all of /proc for them costs too much here."""
        try:
            threads = os.listdir(f"{self._proc}/{pid}/task")
        except OSError:
            return []
        listed = [read_bytes(f"{self._proc}/{pid}/task/{thread}/children") or b"" for thread in threads]
        return [int(child) for found in listed for child in found.split()]

    def _stat(self, pid: int) -> _Stat | None:
        head, _, tail = (read_record(f"{self._proc}/{pid}/stat") or b"").rpartition(b") ")
        words = tail.split()
        try:
            return _Stat(int(words[19]), int(words[25]), head.partition(b"(")[2].decode("utf-8", "replace"))
        except (ValueError, IndexError):
            return None
