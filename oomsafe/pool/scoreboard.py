"""The scoreboard: what the processes of one pool know of each other, in one shared mapping (see layout.py).

The supervisor makes it, in a 0700 folder, 0600; workers inherit the mapping over their fork. It
survives its writers' SIGKILL, and anyone who may read the file reads the whole pool from it.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from oomsafe.errors import ScoreboardError
from oomsafe.kernel.process import is_alive
from oomsafe.policy.decide import Order
from oomsafe.policy.trend import Growth
from oomsafe.pool import backing, layout, places
from oomsafe.pool.layout import Counters, optional, stored
from oomsafe.pool.lock import Kept, PoolLock
from oomsafe.pool.slot import Slot, order_of

if TYPE_CHECKING:
    from oomsafe.pool.view import PoolView

#: A slot that was reserved this long ago, in seconds, and never claimed belongs to a fork that failed.
RESERVED_FOR = 60.0


class Entry(NamedTuple):
    """One worker, as short as can be. Sizes in bytes; None is a figure that is not known."""

    number: int
    generation: int
    state: int
    rss: int | None
    baseline: int | None
    soft: int | None
    hard: int | None
    used: int | None
    """What the soft limit is compared with."""
    growth: Growth
    order: Order


class InHand(NamedTuple):
    """A worker that is inside a piece of work."""

    number: int
    generation: int
    pid: int
    started: int
    ticket: int
    rss: int
    """What it held when that began, in bytes."""


class Scoreboard:
    """One pool's shared memory. Made by create() or opened by open(); close() when done."""

    def __init__(self, fd: int, memory: mmap.mmap, path: str | None) -> None:
        self.path = path
        """None where no folder could hold it: then only the pool itself can read it."""
        self._file = Kept(fd, path)
        self._lock = PoolLock(self._file)
        self._mmap = memory
        self._memory = memoryview(memory)
        self.slots = int(layout.IDENTITY.unpack_from(self._memory)[2])
        self._owner = os.getpid()

    @classmethod
    def create(cls, workers: int, server: str) -> tuple[Scoreboard, list[str]]:
        """A new scoreboard of this process's pool, and warnings to log when it could not lie where it should.

        It has room for twice the workers and some more, for replacements and for SIGTTIN.
        """
        size, header = backing.blank(max(32, 2 * workers + 8), workers, server)
        fd, path, warnings = backing.allocate(size, header)
        return cls(fd, mmap.mmap(fd, size), path), warnings

    @classmethod
    def private(cls, slots: int = 1) -> Scoreboard:
        """One that only this process sees, and what it forks."""
        size, header = backing.blank(slots, slots, "")
        fd = backing.in_memory(size, header)
        return cls(fd, mmap.mmap(fd, size), None)

    @classmethod
    def open(cls, path: str, *, writing: bool = False) -> Scoreboard:
        """Another process's scoreboard, to read; `writing` is for one of its workers. Raises ScoreboardError when it is none."""
        return cls(*backing.open_file(path, writing=writing), path)

    @classmethod
    def look(cls, path: str) -> PoolView:
        """One look at another process's scoreboard. Raises ScoreboardError when it is none."""
        board = cls.open(path)
        try:
            return board.read()
        finally:
            board.close()

    def describe(self, *, workers: int, turns: int, limit: int | None, budget: int | None) -> None:
        """The supervisor says what the pool is; all but `workers` and `turns` in bytes."""
        generations, *_, server = layout.POOL.unpack_from(self._memory, layout.POOL_AT)
        figures = (generations, workers, turns, stored(limit), stored(budget), server)
        layout.write(self._memory, layout.POOL_AT, layout.POOL, *figures)
        # new limits deserve a new verdict
        layout.write(self._memory, layout.REFUSED_AT, layout.REFUSED, 0)
        layout.write(self._memory, layout.SETTLED_AT, layout.SETTLED, 0)

    @property
    def workers(self) -> int:
        """How many workers the supervisor wants now."""
        return int(layout.POOL.unpack_from(self._memory, layout.POOL_AT)[1])

    @property
    def settled(self) -> int:
        """How many recycled workers in a row had settled above their soft limit. Read and set with the lock held."""
        return int(layout.SETTLED.unpack_from(self._memory, layout.SETTLED_AT)[0])

    @settled.setter
    def settled(self, count: int) -> None:
        layout.write(self._memory, layout.SETTLED_AT, layout.SETTLED, count)

    def first_to_refuse(self, which: int) -> bool:
        """Whether this worker is the pool's first to refuse this limit (layout.REFUSES_SOFT and so on), and should say so."""
        locked = self.try_lock()  # without it, two may say it: better than to wait for a process that may be stopped
        (said,) = layout.REFUSED.unpack_from(self._memory, layout.REFUSED_AT)
        layout.write(self._memory, layout.REFUSED_AT, layout.REFUSED, said | which)
        if locked:
            self.unlock()
        return not said & which

    def admit(self, route: str) -> str | None:
        """What `route` is counted under by every worker of the pool; None: ask again later.

        The pool has one list of names, first come, first served, and OTHER for the rest: what was
        counted under a name by one worker is so by all, and when it is gone.
        """
        name = layout.route_name(route)
        known = self._names()
        if name in known or len(known) >= layout.ROUTES - 1:
            return name if name in known else layout.OTHER
        if not self.try_lock():
            return layout.OTHER if self._lock.lost else None
        try:
            known = self._names()
            if name not in known and len(known) < layout.ROUTES - 1:
                at = layout.NAMES_AT + len(known) * layout.ROUTE_NAME
                self._memory[at : at + layout.ROUTE_NAME] = name.encode().ljust(layout.ROUTE_NAME, b"\0")
                known.append(name)
        finally:
            self.unlock()
        return name if name in known else layout.OTHER

    def _names(self) -> list[str]:
        rows = range(layout.NAMES_AT, layout.NAMES_AT + layout.ROUTES * layout.ROUTE_NAME, layout.ROUTE_NAME)
        names = [layout.as_text(self._memory[at : at + layout.ROUTE_NAME].tobytes()) for at in rows]
        return [name for name in names if name]

    def reserve(self) -> Slot | None:
        """In the supervisor, before a fork: a slot for the new worker; None when all are taken.

        That of a dead worker only when no other is free: its supervisor, which may reap others first,
        still has to read there what it died with.
        """
        number = self._first(self._is_free)
        if number is None:
            number = self._first(self._abandoned)
        if number is None:
            return None
        self.release(number)
        at = self._offset(number)
        generation, *rest = layout.POOL.unpack_from(self._memory, layout.POOL_AT)
        layout.write(self._memory, layout.POOL_AT, layout.POOL, generation + 1, *rest)
        layout.write(self._memory, at + layout.OWNER_AT, layout.OWNER, 0, 0, generation + 1, time.time())
        layout.write(self._memory, at, layout.STATE, layout.STARTING)
        return Slot(self._memory, at, number, generation + 1)

    def _first(self, fits: Callable[[int], bool]) -> int | None:
        return next((number for number in range(self.slots) if fits(self._offset(number))), None)

    def _is_free(self, at: int) -> bool:
        return bool(layout.STATE.unpack_from(self._memory, at)[0] == layout.FREE)

    def slot(self, number: int, generation: int) -> Slot:
        """In a spawned worker: the slot that was reserved for it. Raises ScoreboardError when it is another's by now."""
        at = self._offset(number)
        if number >= self.slots or not self._is_of(at, generation):
            raise ScoreboardError(f"slot {number} of {self.path} is another worker's")
        return Slot(self._memory, at, number, generation)

    def release(self, number: int, generation: int | None = None) -> None:
        """In the supervisor, when a worker is gone: its counts go into the totals, in one step for all who read.

        With its `generation`, nothing happens when the slot is another's by now: a supervisor may
        hear of a death long after reserve() has seen it.
        """
        at = self._offset(number)
        if layout.STATE.unpack_from(self._memory, at)[0] == layout.FREE:
            return
        if generation is not None and not self._is_of(at, generation):
            return
        totals = Counters.unpack(self._memory[layout.TOTALS_AT : layout.TOTALS_AT + layout.COUNTERS_SIZE].tobytes())
        counters_at = at + layout.COUNTERS_AT
        totals.add(Counters.unpack(self._memory[counters_at : counters_at + layout.COUNTERS_SIZE].tobytes()))
        packed = totals.pack()
        (sequence,) = layout.SEQUENCE.unpack_from(self._memory, layout.SEQUENCE_AT)
        layout.write(self._memory, layout.SEQUENCE_AT, layout.SEQUENCE, sequence + 1)
        self._memory[layout.TOTALS_AT : layout.TOTALS_AT + len(packed)] = packed
        self._memory[at : at + layout.SLOT_SIZE] = bytes(layout.SLOT_SIZE)
        layout.write(self._memory, layout.SEQUENCE_AT, layout.SEQUENCE, sequence + 2)

    def read(self) -> PoolView:
        """The whole pool, as one consistent copy."""
        from oomsafe.pool.view import read_pool  # here: most workers are never asked

        return read_pool(self._memory, self.slots)

    def roll(self) -> list[Entry]:
        """Every worker that has a slot, with what a schedule needs. One that has died is there until it is released."""
        entries = []
        for number in range(self.slots):
            at = self._offset(number)
            state = layout.STATE.unpack_from(self._memory, at)[0]
            pid, _, generation, reserved = layout.OWNER.unpack_from(self._memory, at + layout.OWNER_AT)
            if state != layout.FREE and (pid or time.time() - reserved <= RESERVED_FOR):
                rss, _, baseline, soft, hard = map(optional, layout.FIGURES.unpack_from(self._memory, at + layout.FIGURES_AT)[:5])
                used, *paces = layout.NEED.unpack_from(self._memory, at + layout.NEED_AT)
                order = order_of(layout.ORDER.unpack_from(self._memory, at + layout.ORDER_AT)[0])
                # before the first time it has published, the zeros are no figures
                used = used if layout.FIGURES.unpack_from(self._memory, at + layout.FIGURES_AT)[-1] else -1
                growth = Growth(*(float(max(0, pace)) for pace in paces))
                entries.append(Entry(number, generation, state, rss, baseline, soft, hard, optional(used), growth, order))
        return entries

    def give_order(self, number: int, generation: int, order: Order) -> None:
        """In the supervisor: this worker is to drain, now or when it is over its limit."""
        at = self._offset(number)
        if self._is_of(at, generation):
            layout.write(self._memory, at + layout.ORDER_AT, layout.ORDER, order)

    @property
    def has_room(self) -> bool:
        """Whether a slot is left for one more worker."""
        return self._first(self._is_free) is not None

    def in_hand(self) -> list[InHand]:
        """The workers that are inside a piece of work which has a ticket."""
        found = []
        for number in range(self.slots):
            at = self._offset(number)
            ticket, rss = layout.HAND.unpack_from(self._memory, at + layout.HAND_AT)
            if ticket:
                pid, started, generation, _ = layout.OWNER.unpack_from(self._memory, at + layout.OWNER_AT)
                found.append(InHand(number, generation, pid, started, ticket, rss))
        return found

    def hand(self, number: int, generation: int) -> tuple[int, int]:
        """(ticket, rss): of the work that this worker is inside of, or was when it died, and what it held in bytes when that began.

        Zeros: of none.
        """
        at = self._offset(number)
        ticket, rss = layout.HAND.unpack_from(self._memory, at + layout.HAND_AT) if self._is_of(at, generation) else (0, 0)
        return ticket, rss

    def tell_of_limit(self, number: int, generation: int, ticket: int, used: int, limit: int) -> None:
        """In the supervisor: this work is over its soft limit; both figures in bytes."""
        at = self._offset(number)
        if self._is_of(at, generation):
            layout.write(self._memory, at + layout.TOLD_AT, layout.TOLD, ticket, used, limit)

    def has_heeded(self, number: int, generation: int, ticket: int) -> bool:
        """Whether this work, which was told of its limit, has heard of it, or is this worker's no more."""
        at = self._offset(number)
        return not self._is_of(at, generation) or layout.TOLD.unpack_from(self._memory, at + layout.TOLD_AT)[0] != ticket

    @property
    def schedule(self) -> tuple[float, int]:
        """(looked, failures): when the supervisor looked last for who may go, and how many workers in a row have failed to boot."""
        looked, failures = layout.SCHEDULE.unpack_from(self._memory, layout.SCHEDULE_AT)
        return looked, failures

    @schedule.setter
    def schedule(self, schedule: tuple[float, int]) -> None:
        layout.write(self._memory, layout.SCHEDULE_AT, layout.SCHEDULE, *schedule)

    @property
    def unserved(self) -> tuple[float, float]:
        """(since, before): since when no worker has served, on the monotonic clock, 0 while one does; seconds without one before that."""
        since, before = layout.UNSERVED.unpack_from(self._memory, layout.UNSERVED_AT)
        return since, before

    @unserved.setter
    def unserved(self, unserved: tuple[float, float]) -> None:
        layout.write(self._memory, layout.UNSERVED_AT, layout.UNSERVED, *unserved)

    def others(self, slot: Slot) -> tuple[int, int, int]:
        """(starting, leaving, turns): how many living workers beside `slot` start, drain or leave, and how many may be away at once."""
        starting = leaving = 0
        for number in range(self.slots):
            at = self._offset(number)
            state = layout.STATE.unpack_from(self._memory, at)[0]
            if state in (layout.STARTING, layout.DRAINING, layout.LEAVING) and number != slot.number and not self._abandoned(at):
                starting += state == layout.STARTING
                leaving += state != layout.STARTING
        return starting, leaving, int(layout.POOL.unpack_from(self._memory, layout.POOL_AT)[2])

    def try_lock(self) -> bool:
        """Keep all other workers and threads from taking a turn until unlock(); the thread that has it may have it again.

        False: somebody else has it, try again soon.
        """
        return self._lock.try_acquire()

    def unlock(self) -> None:
        """Let others take a turn. Raises RuntimeError in a thread that does not have it."""
        self._lock.release()

    def mend(self) -> None:
        """In the supervisor, now and then: the application around it may have closed what must be open."""
        if self.path is None or os.getpid() != self._owner:
            return
        was_open = self._file.is_open
        file = self._file.get()
        if file is not None and not was_open:
            places.hold(file)

    def remove(self) -> None:
        """Remove the file; the mapping stays for those who have it. Only its supervisor does."""
        if self.path and os.getpid() == self._owner:
            try:
                os.unlink(self.path)
            except OSError:
                pass  # the folder was cleaned by somebody else
            self.path = None

    def close(self) -> None:
        """Let go of the mapping. Slots that were handed out must not be used any more."""
        self._memory.release()
        self._mmap.close()
        self._file.close()

    def _is_of(self, at: int, generation: int) -> bool:
        """Whether the slot there is this worker's: a supervisor may speak of one that is gone."""
        return bool(layout.OWNER.unpack_from(self._memory, at + layout.OWNER_AT)[2] == generation)

    def _offset(self, number: int) -> int:
        return layout.HEADER_SIZE + number * layout.SLOT_SIZE

    def _abandoned(self, at: int) -> bool:
        pid, started, _, reserved = layout.OWNER.unpack_from(self._memory, at + layout.OWNER_AT)
        if not pid:
            return bool(time.time() - reserved > RESERVED_FOR)
        return not is_alive(pid, started)
