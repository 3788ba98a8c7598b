"""The hot path, which every piece of work pays for: how much it made the process grow. Every microsecond counts.

Reading statm costs 2 to 3 us in a process that serves, so it is only read when it can have
changed: a process does not grow without a page fault, and getrusage() gives the number of faults of
all its threads in 0.4 us. Giving memory back causes no fault, so statm is also read at the end of work that had
grown; the guard's tick notices other memory that is freed.
"""

from __future__ import annotations

import resource
import sys
import time
from _thread import RLock, get_ident  # the real ones, because gevent replaces threading's, and nothing here waits
from bisect import bisect_left
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final, NamedTuple

from oomsafe.kernel.process import OwnMemory
from oomsafe.log import failed
from oomsafe.policy.growth import GrowthClock
from oomsafe.scoreboard.layout import BOUNDS, CELL, CELL_NAME, CELL_RSS, CELL_RSS_AT, IN_USE, OTHER, UNMATCHED, Counters
from oomsafe.scoreboard.slot import Figures, Slot
from oomsafe.worker.apart import Apart

_usage, _self = resource.getrusage, resource.RUSAGE_SELF
_clock = time.monotonic

#: The index of ru_minflt in the result of getrusage(): looking it up by name searches four dicts, by index none.
MINFLT: Final = 6

#: Seconds after the end of work within which nothing is read when the next work begins.
SAME_BREATH = 0.05

#: Seconds after work got its figures within which nothing is read at its end: the growth since is the server's sending.
AT_ONCE = 0.0001

#: File pages and shared memory may together grow by this many bytes before they are told apart, which costs 5 us.
WEIGHED_EVERY = 1 << 20

#: Growth in bytes after which threads are told apart, if several pieces of work are in flight.
SPLIT_EVERY = 4 << 20

#: The most names that are counted of work whose route is not known.
MOST_NAMES = 256

#: Seconds between two publications of a worker's figures.
PUBLISH_EVERY = 1.0


class Present(NamedTuple):
    """The figures for a piece of work while it runs. Bytes."""

    grown: int
    """How much it has made the process grow; negative if the process shrank."""
    rss: int
    limit: int | None
    """The worker's soft limit; None: there is none."""


class Work:
    """One piece of work in flight; also a context manager that ends it. Made by Meter.begin()."""

    # set by begin(): leaving out __init__ saves a call, and leaving out the __dict__ halves the cost of an object
    __slots__ = ("announced", "cell", "mark", "meter", "name", "route", "started", "thread")

    meter: Meter
    name: bytes
    route: str
    """The name under which it is counted: one of few, never text that a client sent."""
    started: bool
    """Whether it has begun and not ended; also False if begin() failed: then there is nothing to undo."""
    mark: float | None
    """The growth clock's value when it began, less what it has grown by beyond its share; None: it has no share in the process's growth."""
    announced: bool
    """Whether its response has the memory headers already, because the middleware may be there twice."""
    cell: int
    """The offset of its in-flight record; -1: none was free."""
    thread: int
    """The ident of the thread that has begun it."""

    def grown(self) -> int:
        """Bytes by which this work has made the process grow so far; negative if the process shrank."""
        return self.meter.grown(self)

    def end(self) -> int:
        """End it, once; later calls change nothing. Returns the growth in bytes."""
        return self.meter.end(self)

    def __enter__(self) -> Work:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.end()


class _Nowhere:
    """Memory that discards what is written to it."""

    def __setitem__(self, at: int | slice, value: int | bytes) -> None:
        pass


def _write_nowhere(*_: object) -> None:
    pass


class Meter:
    """Measures the work of one process. Every failure of ours is logged once, and the work goes on.

    Threads share it. begin() and end() take no lock, because that would cost as much as all their counting. Each
    `x += 1` in them is atomic: CPython with its GIL switches threads only at calls and at backward
    jumps, and there is none between the read and the write. The lock is held while memory is read.
    """

    def __init__(
        self,
        slot: Slot,
        memory: OwnMemory | None = None,
        *,
        check: Callable[[float], None] = lambda _: None,
        admit: Callable[[str], str | None] = lambda route: route,
    ) -> None:
        """`check(now)` is called at the end of work when a check is due: at `publish_at`, or above `alert` and at `check_at`.

        `admit(route)` returns the name under which a route is counted; None: count it under OTHER this time.
        """
        self._check, self._admit = check, admit
        self._slot = slot
        self.memory = memory or OwnMemory()
        self.counters = Counters()
        sizes = self.memory.sizes()
        self.rss_known = sizes is not None
        self.rss, shared = sizes or (0, 0)
        """Resident bytes when memory was last read."""
        self.peak_rss = self.rss
        self.counts_clean = False
        """Whether `held` is all of rss, including the clean file pages that the kernel drops by itself."""
        self.file_dirty = 0
        """Bytes of file pages that the kernel can't drop yet, as far as is known."""
        self._kept = self._weighed_at = self._unmeasured = 0
        self._weigh(shared)
        self.held = self.anon = self.rss - shared + self._kept
        """`held`: what the limits and the growth of work are measured in, in bytes; `anon`: rss without clean file pages."""
        self.leaving = False
        """Whether this worker is about to end, and finishes what it has in flight."""
        self.crowded = False
        """Whether new work waits for memory that another worker is about to give back; a Waiting says for how long."""
        self.soft_limit: int | None = None
        """The soft limit that work is shown, in bytes; None: there is none. Set by limit()."""
        self.largest = (0, b"")
        """The largest growth that one piece of work has caused, in bytes, and its name. The first of its route does not count."""
        self.first = (0, b"")
        """The largest growth that the first piece of work of its route has caused: mostly imports and caches."""
        self.leap = 0
        """The largest growth that one piece of work has caused since the guard has last noted it, in bytes."""
        self.warm_up = 0
        """The growth of all first pieces of work together, in bytes."""
        self.names: dict[bytes, int] = {}
        """How often work of each name ended, where its route is not known; at most MOST_NAMES names."""
        self.clock = GrowthClock(self.held)
        self.apart = Apart()
        self._works = self.apart.works
        self._faults = -1
        # re-entrant, because a finalizer or a signal handler may run while it is held, and end a piece of work in the same thread
        self._lock = RLock()
        # only C code writes the record of a piece of work: each call of ours costs three times as much in a server as it does here
        self._memory: memoryview | _Nowhere
        self._memory, self._write, self._cells = slot.cells()
        self._routes: dict[str, list[int]] = {}
        self.alert: float = sys.maxsize
        """If more bytes than this are held when work ends, there is something to decide, but not before `check_at`."""
        self.check_at = 0.0
        self.publish_at = 0.0
        """When to publish the figures; like `check_at` on the clock of time.monotonic()."""
        self._same_breath = self._at_once = 0.0
        self._still = False  # whether nothing has changed since work was shown a growth of 0
        self._present: Present | None = None

    def begin(self, name: bytes, measured: bool = True) -> Work:
        """Begin a piece of work. `name` may come from outside, because readers make it printable.

        `measured` False is for work that stays open and is mostly idle: it would take a share of the growth that other work causes.
        """
        work = Work()
        work.meter = self
        work.name = name
        work.route = UNMATCHED
        work.started = work.announced = False
        work.mark = None
        work.cell = -1
        work.thread = get_ident()
        try:
            now, clock = _clock(), self.clock
            # right after the previous work, growth since then is the server's parsing of this one
            if clock.in_flight or now > self._same_breath:
                faults = _usage(_self)[MINFLT]
                if faults != self._faults:
                    self._read_at(faults)
            rss = self.rss
            if measured:
                clock.in_flight += 1
                work.mark = clock.value
            else:
                self._unmeasured += 1
                rss = -1  # what the process grows by is not its own, as far as is known
            work.started = True
            work.cell = cell = self._cells.pop()
            size, write = len(name), self._write
            write(cell, size if size < CELL_NAME else CELL_NAME, now, rss, name, 1)
            self._works[cell] = work
        except IndexError:
            pass  # no cell is free: the work still counts
        except Exception as error:
            failed("begin", "the server", error)
        return work

    def end(self, work: Work) -> int:  # noqa: PLR0912  a call costs a server more than a branch
        """End a piece of work; see Work.end."""
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
                value = clock.value  # before this work stops counting as in flight for the others
            finally:  # even if the reading failed, the work is no longer in flight
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
                    try:
                        self.names[work.name] += 1
                    except KeyError:
                        self._note(work.name)
                if value == mark:
                    row[1] += 1
                else:
                    growth = int(value - mark)
                    self._count(row, growth, work.name)
            self._same_breath = now + SAME_BREATH
            if now >= self.publish_at or (self.held > self.alert and now >= self.check_at):
                self._check(now)
        except Exception as error:
            failed("end", "the server", error)
        return growth

    @property
    def in_flight(self) -> int:
        """How many pieces of work are in flight."""
        return self.clock.in_flight + self._unmeasured

    def oldest(self, now: float) -> float | None:
        """Seconds since the oldest piece of work in flight began, at `now` on the monotonic clock; without what stays open (websockets)."""
        memory = self._memory
        if isinstance(memory, _Nowhere):
            return None
        ages = [
            now - began
            for cell, work in list(self._works.items())
            if work.started and work.cell == cell and work.mark is not None
            for began in [CELL.unpack_from(memory, cell)[1]]
        ]
        return max(ages, default=None)

    @property
    def without_files(self) -> int:
        """Bytes of anonymous and shared memory when memory was last read, counted as by kernel.process.held_of()."""
        return max(0, self.anon - self.file_dirty)

    def _note(self, name: bytes) -> None:
        if len(self.names) < MOST_NAMES and len(name) <= CELL_NAME:
            self.names[name] = 1

    def _count(self, row: list[int], growth: int, name: bytes) -> None:
        first = not any(row)
        bucket, grown = 1 + bisect_left(BOUNDS, growth), max(0, growth)  # before the counts: no call between a read and its write
        row[0] += grown
        row[bucket] += 1
        if growth > self.leap:
            self.leap = growth
        if first:
            self.warm_up += grown
            self.first = max(self.first, (growth, name))
        elif growth > self.largest[0]:
            self.largest = (growth, name)

    def present(self, work: Work) -> Present | None:
        """The figures now; None while there are none. If none has changed, it is the same object as before."""
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
        """Set the soft limit that work is shown from now on, in bytes; None: there is none."""
        self.soft_limit, self._still = soft, False

    def _read_at(self, faults: int) -> None:
        """Read the memory, now that the count of faults is `faults`.

        The check whether the count has moved is inlined at each begin, end and header, because a function call would cost more than the
        check. If another thread reads right now, its result is good enough: waiting for it would take two thread switches, which
        cost more than the reading; later faults show up at the next check. A failed reading is
        logged, and repeated at the next check.
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
        """Read the memory. The caller holds the lock."""
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
        apart = self.apart
        if apart.running is None:
            self.clock.advance(held)
        else:
            apart.add(self.clock, held)
        if held - apart.split_at >= SPLIT_EVERY:
            self._tell_apart()

    def _tell_apart(self) -> None:
        """The caller holds the lock."""
        try:
            self.apart.tell(self.clock)
        except Exception as error:
            failed("telling threads apart", "the server", error)

    def run_step(self, work: Work, step: Callable[..., Any], *arguments: Any) -> Any:
        """Run one step of a coroutine that does this work: what the process grows by meanwhile is this work's. Raises what it raises."""
        self._watch_faults()
        before, self.apart.running = self.apart.running, work
        try:
            return step(*arguments)
        finally:
            self._watch_faults()
            self.apart.running = before

    def _watch_faults(self) -> None:
        try:
            faults = _usage(_self)[MINFLT]
            if faults != self._faults:
                self._read_at(faults)
        except Exception as error:
            failed("reading memory", "the server", error)

    def _weigh(self, shared: int) -> None:
        """Find out how much of the file-backed and shared memory the kernel can't drop; if that is not known, all of it."""
        if shared:
            shmem = self.memory.shmem()
            self._kept = shared if shmem is None else min(shared, shmem + self.file_dirty)
        else:
            self._kept = 0
        self._weighed_at = shared

    def measure(self) -> int:
        """Read the memory regardless of the count of faults, and return resident bytes; the last figure if it can't be read."""
        with self._lock:
            self.memory.check()
            self._weighed_at = sys.maxsize  # weigh again
            self._read()
            self._tell_apart()
            return self.rss

    def held_of(self, rss: int, shared: int) -> int:
        """What is held, as `held` counts it, by these fresh sizes: all in bytes. Changes no figure."""
        return rss if self.counts_clean else rss - shared + min(self._kept, shared)

    def publish(self, figures: Figures) -> None:
        """Write the counters and these figures to the scoreboard. Raises ValueError if that was closed."""
        with self._lock:
            self._slot.publish(figures, self.counters)
            if self.clock.in_flight > 1:
                self._show_growth()

    def _show_growth(self) -> None:
        """Publish what each piece of work in flight has grown by: readers subtract the rss in its cell from the present one."""
        for work, growth in self.apart.grown(self.clock).items():
            at = work.cell + CELL_RSS_AT
            self._memory[at : at + CELL_RSS.size] = CELL_RSS.pack(max(0, self.rss - int(growth)))

    def keep_in_flight(self) -> None:
        """This process ends in the middle of its work: what is in flight now stays on the scoreboard, for whoever tells of its death."""
        self._memory = _Nowhere()

    def leave(self) -> None:
        """In a fork of its process (see oomsafe/scoreboard/forks.py): what it counts from now on is not published."""
        # a thread that does not exist in the fork may have held the old one
        self._lock = RLock()
        # work in flight has offsets of cells in the parent's slot
        self._memory, self._write, self._cells = _Nowhere(), _write_nowhere, []
        self.apart.leave()
        self._works = self.apart.works

    def _row(self, route: str) -> list[int]:
        name = self._admit(route)
        with self._lock:  # publish() iterates over the rows
            row = self.counters.route(name or OTHER)
        if name and len(self._routes) < 1024:  # a cache for frequent routes, bounded in case there are ever more names
            self._routes[route] = row
        return row
