"""A worker that serves tells what its memory is, because an operator asks for it. Only such a worker imports this.

It never counts itself: a fork of it does, and tells the result on the scoreboard. The worker stands still for the fork alone.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from oomsafe.kernel.allocators import take_stock
from oomsafe.kernel.capacity import read_capacity
from oomsafe.kernel.forking import DONE, UNKNOWN, Fork, fork
from oomsafe.kernel.handles import own_device
from oomsafe.kernel.process import Resident, page_tables_of, resident_of, set_comm
from oomsafe.log import log
from oomsafe.policy.inspection import TEXT, Inspection, Phase
from oomsafe.policy.limits import MACHINE
from oomsafe.policy.stock import Parts
from oomsafe.policy.units import MIB, format_size
from oomsafe.worker.baseline import can_count_objects
from oomsafe.worker.stocktaking import LEFT, LIST_BYTES, counted, handles_of, is_room

if TYPE_CHECKING:
    from oomsafe.policy.objects import Objects
    from oomsafe.scoreboard.header import Header
    from oomsafe.scoreboard.slot import Slot
    from oomsafe.worker.baseline import Baseline, Beginning
    from oomsafe.worker.meter import Meter

#: What the fork is called in ps, and in the kernel's report should it be killed.
NAME = "oomsafe-inspect"

#: Seconds after which a fork ends by its own alarm, and after which its worker kills it: one that hangs may not have set its alarm yet.
ENDS_AFTER, KILLED_AFTER = 5.0, 8.0

#: Seconds that looking at a worker's objects may take, about. Nobody waits for it, and in a fork it takes copies of pages just to list
#: them: with less, there was no time for the modules when the machine was busy.
FOR_OBJECTS = 0.25

#: A fork copies page tables, and its worker stands still meanwhile: for 22 ms with 1 GiB of memory (2 MiB of tables), and for 65 to 210 ms
#: with 4 GiB (8 MiB), as measured on two busy cores.
MOST_TABLES = 8 * MIB

#: With threads and more memory blocks than this, it would take too long to find what other threads keep to themselves (see kernel.forking).
MOST_BLOCKS = 8_000_000

#: To look at an object is to write to its page, of which the fork then has a copy: of the pages with containers, most of all. So many bytes
#: for each block of memory: 1.6 times as much as was copied, or more, with 300 000 lists, dicts, or large bytes and arrays.
BLOCK = 256


class Inspector:
    """One worker's inspections, never two at a time. Used under its guard's lock."""

    def __init__(self, header: Header, slot: Slot, meter: Meter, who: str, began: Beginning) -> None:
        self._header, self._slot, self._meter, self._who, self._began = header, slot, meter, who, began
        self._fork: Fork | None = None
        self._began_at = 0.0
        self._killed = False

    @property
    def is_busy(self) -> bool:
        """Whether there is a fork that was not reaped yet."""
        return self._fork is not None

    def begin(self, refusal: str) -> None:
        """Fork, or tell why not: `refusal`, if it is not empty. Not while it is busy."""
        resident = resident_of()
        why = refusal or self._refusal(resident)
        if why or resident is None:
            self._fail(why)
            return
        one = self._inspection(Phase.COUNTS)
        self._header.note_inspection(one)
        baseline = self._began.baseline
        count = partial(_count, self._header, one, resident, handles_of(baseline), baseline)
        before = time.monotonic()
        try:
            self._fork = fork(count, ENDS_AFTER)
        except OSError as error:
            self._fail(f"it can't be forked: {error.strerror}")
            return
        self._began_at, self._killed = time.monotonic(), False
        self._header.note_stop(self._began_at - before)

    def follow(self, now: float) -> None:
        """Reap the fork if it has ended, and kill it if it hangs. Called again and again while there is one."""
        status = None if self._fork is None else self._fork.status()
        if self._fork is None:
            return
        if status is None:
            if now - self._began_at > KILLED_AFTER and not self._killed:
                self._killed = True
                self._fork.kill()
            return
        self._fork = None
        last = self._header.inspected
        if status != DONE and last is not None and last.generation == self._slot.generation and last.phase is Phase.COUNTS:
            self._fail(self._words(status))

    def end(self) -> None:
        """The worker ends: no fork of it outlives it."""
        if self._fork is not None:
            self._fork.kill()
            for _ in range(20):
                if self._fork.status() is not None:
                    break
                time.sleep(0.005)
            self._fork = None

    def _words(self, status: int) -> str:
        if self._killed:
            return f"the fork that was to count has hung, and was killed after {KILLED_AFTER:.0f} s"
        if status == -signal.SIGALRM:
            return f"the fork that counted has not come to its end within {ENDS_AFTER:.0f} s"
        if status == -signal.SIGKILL:
            return "the fork that counted was killed: by the kernel, if memory is short, because it is to take that first"
        if status == UNKNOWN:
            return "the fork that counted has ended without a word (the application has reaped it)"
        return f"the fork that counted has ended with {f'signal {-status}' if status < 0 else f'status {status}'}"

    def _refusal(self, resident: Resident | None) -> str:
        """Why this process should not be forked; empty: it may be."""
        if resident is None or not can_count_objects():
            return "that needs Linux, and CPython"
        if "grpc._cython.cygrpc" in sys.modules:
            return "it has loaded gRPC, whose own handlers may hang in a fork, or hold up the process that forks"
        device = own_device()
        if device is not None:
            return f"it has {device} open, which may access its memory by itself: it is not forked"
        tables = page_tables_of() or 0
        if tables > MOST_TABLES:
            return f"its page tables have {format_size(tables)}, and a fork copies them: it would stand still for more than 0.1 s"
        if sys.getallocatedblocks() > MOST_BLOCKS:
            return f"it has {sys.getallocatedblocks()} blocks of memory: the fork would take too long"
        return self._shortage(resident)

    def _shortage(self, resident: Resident) -> str:
        """Why the pool has no room for the fork; empty: it has."""
        blocks = sys.getallocatedblocks()
        copies = min(resident.anon, blocks * BLOCK)
        room = self._header.room
        # where no cgroup counts what the pool holds, its supervisor may count the fork as one more process
        taken = resident.anon if read_capacity().source == MACHINE else copies + blocks * LIST_BYTES
        if room is not None and room < taken:
            left = format_size(max(0, room))
            return f"the pool is short of memory: {left} left up to its budget, and a fork that counts may take {format_size(taken)}"
        if not is_room(copies):
            return (
                f"the pool is short of memory: a fork that counts may take {format_size(copies)}, and {LEFT:.0%} of the limit must be left "
                "in any case"
            )
        return ""

    def _inspection(self, phase: Phase, text: str = "") -> Inspection:
        return Inspection(
            at=time.time(), pid=os.getpid(), slot=self._slot.number, generation=self._slot.generation, phase=phase, text=text[:TEXT],
            work=self._meter.counters.work, served=time.monotonic() - self._began.at, fresh=self._began.held,
        )  # fmt: skip

    def _fail(self, why: str) -> None:
        self._header.note_inspection(self._inspection(Phase.FAILED, why))
        log.info("%s is not inspected: %s", self._who, why)


def _count(header: Header, one: Inspection, resident: Resident, found: Objects, baseline: Baseline | None) -> None:
    """In the fork: count, and tell."""
    began = time.monotonic()
    set_comm(NAME)  # or who reads the kernel's report would take it for the worker
    try:
        parts = take_stock(parent=resident)  # first, before the census takes memory
        told = replace(one, phase=Phase.DONE, parts=parts or Parts(), objects=counted(found, baseline, FOR_OBJECTS))
    except Exception as error:
        told = replace(one, phase=Phase.FAILED, text=f"the fork could not count: {error!r}"[:TEXT])
    last = header.inspected
    stopped = None if last is None else last.stopped
    header.note_inspection(replace(told, at=time.time(), stopped=stopped, took=time.monotonic() - began))
