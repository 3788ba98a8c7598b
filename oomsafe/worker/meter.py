"""The hot path: what every piece of work costs and what it made the process grow by. Counted in microseconds.

A read of statm costs 2 to 3 us in a process that serves, so it is made only when it can have
changed: a process does not grow without a page fault, and getrusage() tells the number of faults of
all its threads in 0.4 us. Memory that was given back makes no fault, so the end of work that had
grown is looked at too; what else is freed is seen by the guard's tick.
"""

from __future__ import annotations

import resource
import sys
import time
from _thread import RLock  # the real one: gevent replaces threading's, and nothing here waits
from bisect import bisect_left
from collections.abc import Callable
from types import TracebackType
from typing import Final, NamedTuple

from oomsafe.kernel.process import OwnMemory
from oomsafe.log import failed
from oomsafe.policy.growth import GrowthClock
from oomsafe.scoreboard.layout import BOUNDS, CELL_NAME, IN_USE, OTHER, UNMATCHED, Counters
from oomsafe.scoreboard.slot import Figures, Slot

_usage, _self = resource.getrusage, resource.RUSAGE_SELF
_clock = time.monotonic

#: Where ru_minflt stands in what getrusage() gives: its name is looked up in four dicts, its place in none.
MINFLT: Final = 6

#: Seconds after the end of work in which nothing is read at the next one's begin.
SAME_BREATH = 0.05

#: Seconds after work was told its figures in which nothing is read at its end: what has grown is the server's sending.
AT_ONCE = 0.0001

#: Bytes that file pages and shared memory may grow by together until it is looked at which of them it was, for 5 us.
WEIGHED_EVERY = 1 << 20

#: Names of work that has no route, of which it is counted how often each came.
MOST_NAMES = 256

#: Seconds between two publications of a worker's figures.
PUBLISH_EVERY = 1.0


class Present(NamedTuple):
    """What a piece of work may be told while it runs. Bytes."""

    grown: int
    """What it has grown the process by; negative when it shrank."""
    rss: int
    limit: int | None
    """The worker's soft limit; None while there is none."""


class Work:
    """One piece of work in flight; also a context manager that ends it. Made by Meter.begin()."""

    # set by begin(): without __init__ there is no call, and without a __dict__ half of what an object costs
    __slots__ = ("announced", "cell", "mark", "meter", "name", "route", "started")

    meter: Meter
    name: bytes
    route: str
    """What it is counted under: one of few names, never what a client sent."""
    started: bool
    """Whether it has begun and not ended; also False where its begin failed: then there is nothing to undo."""
    mark: float | None
    """The growth clock's value when it began; None: it has no share in the process's growth."""
    announced: bool
    """Whether whoever asked for it has been told of it: its middleware may be there twice."""
    cell: int
    """Where the in-flight record is that it holds; -1: none was free."""

    def grown(self) -> int:
        """Bytes that this work has grown the process by until now; negative when it shrank."""
        return self.meter.grown(self)

    def end(self) -> int:
        """End it, once; later calls change nothing. Returns the growth in bytes."""
        return self.meter.end(self)

    def __enter__(self) -> Work:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.end()


class _Nowhere:
    """Memory of which nothing is kept."""

    def __setitem__(self, at: int, value: int) -> None:
        pass


def _write_nowhere(*_: object) -> None:
    pass


class Meter:
    """Measures the work of one process. Every failure of ours is logged once, and the work goes on.

    Threads share it. begin() and end() take no lock, for it would cost as much as all that they count: each
    `x += 1` of theirs is whole, since CPython with its GIL lets another thread run only at calls and at jumps
    backward, and none stands between its read and its write. Where memory is read, the lock is held.
    """

    def __init__(
        self,
        slot: Slot,
        memory: OwnMemory | None = None,
        *,
        look: Callable[[float], None] = lambda _: None,
        admit: Callable[[str], str | None] = lambda route: route,
    ) -> None:
        """`look(now)` is called at the end of work when that is due: at `look_at`, above `alert`, or at `publish_at`.

        `admit(route)` says what a route is counted under; None for OTHER, this once.
        """
        self._look, self._admit = look, admit
        self._slot = slot
        self.memory = memory or OwnMemory()
        self.counters = Counters()
        sizes = self.memory.sizes()
        self.rss_known = sizes is not None
        self.rss, shared = sizes or (0, 0)
        """Resident bytes at the last look."""
        self.peak_rss = self.rss
        self.counts_clean = False
        """Whether what is held is all that is resident, with the clean file pages that the kernel drops by itself."""
        self.file_dirty = 0
        """Bytes of file pages that it can't drop yet, as far as is known."""
        self._kept = self._weighed_at = 0
        self._weigh(shared)
        self.held = self.anon = self.rss - shared + self._kept
        """What the limits are compared with, and works' growth is one of, in bytes; the same without clean file pages."""
        self.leaving = False
        """Whether this worker has been told to end, and finishes what it has in flight."""
        self.crowded = False
        """Whether new work waits for memory that another worker is about to give back: a Waiting says for how long."""
        self.soft_limit: int | None = None
        """In bytes, as work is told of it; None while there is none. Set by limit()."""
        self.largest = (0, b"")
        """The most that one piece of work has grown the process by, and its name; not the first of its route."""
        self.first = (0, b"")
        """The same of those that were the first of their route here: imports and caches, mostly."""
        self.warm_up = 0
        """Bytes that all of those have grown the process by."""
        self.names: dict[bytes, int] = {}
        """How many pieces of work there were of each name, of those whose route is not known; never more than MOST_NAMES."""
        self.clock = GrowthClock(self.held)
        self._faults = -1
        # a finalizer or a signal's handler may run while it is held, and end a piece of work in the same thread
        self._lock = RLock()
        # a piece of work's own record is written by C alone: each call of ours costs a server three times what it costs here
        self._memory: memoryview | _Nowhere
        self._memory, self._write, self._cells = slot.cells()
        self._routes: dict[str, list[int]] = {}
        self._unmeasured = 0
        self.alert: float = sys.maxsize
        """Bytes held above which there is something to decide when work ends, but not before `look_at`."""
        self.look_at = 0.0
        self.publish_at = 0.0
        """When the figures are to be published; like `look_at` on the clock of time.monotonic()."""
        self._same_breath = 0.0
        self._at_once = 0.0
        self._still = False
        """Whether nothing has changed since work was told that it had not grown."""
        self._present: Present | None = None

    def begin(self, name: bytes, measured: bool = True) -> Work:
        """Work begins; `name` may come from outside, for it is made printable by those who show it.

        Not `measured` is what stays open and is mostly idle: it would take a share of what others grew by.
        """
        work = Work()
        work.meter = self
        work.name = name
        work.route = UNMATCHED
        work.started = work.announced = False
        work.mark = None
        work.cell = -1
        try:
            now, clock = _clock(), self.clock
            # right after the last one, what has grown since is the server's parsing of this one
            if clock.in_flight or now > self._same_breath:
                faults = _usage(_self)[MINFLT]
                if faults != self._faults:
                    self._read_at(faults)
            if measured:
                clock.in_flight += 1
                work.mark = clock.value
            else:
                self._unmeasured += 1
            work.started = True
            work.cell = cell = self._cells.pop()
            size, write = len(name), self._write
            write(cell, size if size < CELL_NAME else CELL_NAME, now, self.rss, name, 1)
        except IndexError:
            pass  # no cell is free: it is counted all the same
        except Exception as error:
            failed("begin", "the server", error)
        return work

    def end(self, work: Work) -> int:
        """Work ends; see Work.end."""
        if not work.started:
            return 0
        work.started = False
        growth = 0
        try:
            clock, mark, cell = self.clock, work.mark, work.cell
            try:
                now = _clock()
                faults = _usage(_self)[MINFLT] if now > self._at_once else self._faults
                if faults != self._faults or clock.value != mark:
                    self._read_at(faults)
                value = clock.value  # before others can go on, for whom it is in flight no more
            finally:  # whatever has become of the reading, it is in flight no more
                if mark is None:
                    self._unmeasured -= 1
                else:
                    clock.in_flight -= 1
                self.counters.work += 1
                if cell >= 0:
                    self._memory[cell + IN_USE] = 0
                    self._cells.append(cell)
            if mark is not None:
                row = self._routes.get(work.route) or self._row(work.route)
                if work.route is UNMATCHED:
                    self._note(work.name)
                if value == mark:
                    row[1] += 1
                else:
                    growth = int(value - mark)
                    self._count(row, growth, work.name)
            self._same_breath = now + SAME_BREATH
            if now >= self.publish_at or (self.held > self.alert and now >= self.look_at):
                self._look(now)
        except Exception as error:
            failed("end", "the server", error)
        return growth

    @property
    def in_flight(self) -> int:
        """How many pieces of work are."""
        return self.clock.in_flight + self._unmeasured

    @property
    def without_files(self) -> int:
        """Bytes of anonymous and shared memory at the last look: as kernel.process.held_of() counts."""
        return max(0, self.anon - self.file_dirty)

    def _note(self, name: bytes) -> None:
        names = self.names
        if name in names:
            names[name] += 1
        elif len(names) < MOST_NAMES and len(name) <= CELL_NAME:
            names[name] = 1

    def _count(self, row: list[int], growth: int, name: bytes) -> None:
        first = not any(row)
        bucket, grown = 1 + bisect_left(BOUNDS, growth), max(0, growth)  # no call between a read and its write
        row[0] += grown
        row[bucket] += 1
        if first:
            self.warm_up += grown
            self.first = max(self.first, (growth, name))
        elif growth > self.largest[0]:
            self.largest = (growth, name)

    def present(self, work: Work) -> Present | None:
        """The figures of this moment; None while there are none. The same object as before, where none has changed."""
        try:
            faults = _usage(_self)[MINFLT]
            if faults != self._faults:
                self._read_at(faults)
            self._at_once = _clock() + AT_ONCE
            value, mark = self.clock.value, work.mark
            if self._still and value == mark:
                return self._present
            figures = Present(0 if mark is None else int(value - mark), self.rss, self.soft_limit)
            self._still = not figures.grown
            if figures != self._present and self.rss_known:
                self._present = figures
        except Exception as error:
            failed("present figures", "the server", error)
        return self._present

    def grown(self, work: Work) -> int:
        """See Work.grown."""
        try:
            faults = _usage(_self)[MINFLT]
            if faults != self._faults:
                self._read_at(faults)
            return 0 if work.mark is None else int(self.clock.value - work.mark)
        except Exception as error:
            failed("grown", "the server", error)
            return 0

    def limit(self, soft: int | None) -> None:
        """What work is told from now on to be its worker's soft limit, in bytes; None for none."""
        self.soft_limit, self._still = soft, False

    def _read_at(self, faults: int) -> None:
        """Take in the memory as it is at this count of faults.

        The gate before it stands written out at each begin, end and header: calling one would cost more than it asks.
        Where another thread reads just now, its figure will do: to wait for it would take two switches between threads, which
        cost more than the reading. What has come since, these faults still tell at the next look. A reading that fails is
        said, and made again at the next look.
        """
        lock = self._lock
        if not lock.acquire(blocking=False):
            return
        try:
            self._faults = faults
            self._read()
        except Exception as error:
            self._faults = -1
            failed("reading memory", "the server", error)
        finally:
            lock.release()

    def _read(self) -> None:
        """Take in the memory as it is now. Callers hold the lock."""
        sizes = self.memory.sizes()
        if sizes is None:
            return
        self.rss, shared = sizes
        rss = self.rss
        self._still = False
        if rss > self.peak_rss:
            self.peak_rss = rss
        if not 0 <= shared - self._weighed_at < WEIGHED_EVERY:
            self._weigh(shared)
        self.anon = anon = rss - shared + self._kept
        self.held = held = rss if self.counts_clean else anon
        self.clock.advance(held)

    def _weigh(self, shared: int) -> None:
        """How much of what has a file or shared memory behind it the kernel can't drop. Where that can't be told, all of it."""
        if shared:
            shmem = self.memory.shmem()
            self._kept = shared if shmem is None else min(shared, shmem + self.file_dirty)
        else:
            self._kept = 0
        self._weighed_at = shared

    def measure(self) -> int:
        """Read the memory whatever the faults say; the last figure when it can't be read. Resident bytes."""
        with self._lock:
            self.memory.check()
            self._weighed_at = sys.maxsize  # weigh anew
            self._read()
            return self.rss

    def publish(self, figures: Figures) -> None:
        """Put what has been counted, and these figures, on the scoreboard. Raises ValueError where that was closed."""
        with self._lock:
            self._slot.publish(figures, self.counters)

    def leave(self) -> None:
        """In a fork of its process: see oomsafe/scoreboard/forks.py. What it counts from now on nobody sees."""
        # a thread that the fork has not may have held it
        self._lock = RLock()
        # offsets of cells, as the work in flight has them, are those of the parent's slot
        self._memory, self._write, self._cells = _Nowhere(), _write_nowhere, []

    def _row(self, route: str) -> list[int]:
        name = self._admit(route)
        with self._lock:  # whoever publishes goes through the rows
            row = self.counters.route(name or OTHER)
        if name and len(self._routes) < 1024:  # a table for those who ask again, not for whatever names there are
            self._routes[route] = row
        return row
