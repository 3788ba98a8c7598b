"""The scoreboard: what the processes of one pool know of each other, in one shared mapping (see layout.py).

The supervisor makes it (see backing.py); workers inherit the mapping over their fork. It survives its
writers' SIGKILL, and anyone who may read its file reads the whole pool from it.

Workers may be of another user than their supervisor, so that one believes nothing that stands there and could hurt: who has
which slot, the generations and the totals it keeps for itself, and writes them for others to read.
"""

from __future__ import annotations

import mmap
import os
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from oomsafe.errors import ScoreboardError
from oomsafe.kernel.process import is_alive, start_of_child, start_time
from oomsafe.log import log
from oomsafe.policy.recycle import Order
from oomsafe.policy.state import State
from oomsafe.policy.trend import Growth
from oomsafe.scoreboard import backing, layout, places
from oomsafe.scoreboard.backing import Backing
from oomsafe.scoreboard.header import Header
from oomsafe.scoreboard.layout import Counters, optional, stored
from oomsafe.scoreboard.lock import Kept, PoolLock
from oomsafe.scoreboard.slot import Slot, order_of

if TYPE_CHECKING:
    from oomsafe.scoreboard.reader import Reader
    from oomsafe.scoreboard.view import PoolView

#: A slot that was reserved this long ago, in seconds, and never claimed belongs to a fork that failed.
RESERVED_FOR = 60.0


class Entry(NamedTuple):
    """One worker, as short as can be. Sizes in bytes; None is a figure that is not known."""

    number: int
    generation: int
    state: State
    rss: int | None
    anon: int | None
    baseline: int | None
    soft: int | None
    hard: int | None
    used: int | None
    """What the soft limit is compared with."""
    growth: Growth
    order: Order


class Others(NamedTuple):
    """How many other workers do what."""

    starting: int = 0
    serving: int = 0
    leaving: int = 0
    """They drain, or are gone in a moment."""
    turns: int = 1
    """How many may be away at once."""


class InHand(NamedTuple):
    """A worker that is inside a piece of work."""

    number: int
    generation: int
    pid: int
    started: int
    ticket: int
    held: int
    """What it held when that began, in bytes."""


@dataclass
class Tenant:
    """Who has a slot, as the supervisor knows it for itself."""

    generation: int
    reserved: float
    """Seconds since 1970."""
    pid: int = 0
    """Of the process that the supervisor has started for it; 0: it has not heard of that yet."""
    started: int = 0


class Scoreboard:
    """One pool's shared memory. Made by create() or joined by join(); close() when done."""

    def __init__(self, where: Backing, memory: mmap.mmap, supervisor: int = 0) -> None:
        """`supervisor` is this process's pid, if it is the one."""
        self.path = where.path
        """None where no folder could hold it: then only the pool itself can read it."""
        self._mmap = memory
        self._memory = memoryview(memory)
        self.slots = int(layout.IDENTITY.unpack_from(self._memory)[2])
        """How many there are: the supervisor makes more when it needs them."""
        self._owner = supervisor
        self._file = Kept(where.file, where.path)
        self._named = None if where.memory == where.file else Kept(where.memory, None)
        """What the file names: those who read it from outside need it to be open."""
        self._text = where.text
        self._lock = PoolLock(self._file)
        self.header = Header(self._memory, self._lock)
        # the supervisor's own
        self._tenants: dict[int, Tenant] = {}
        self._generations = 0
        self._totals = Counters()

    @classmethod
    def create(cls, workers: int, server: str) -> tuple[Scoreboard, list[str]]:
        """A new scoreboard of this process's pool, and warnings to log when it could not lie where it should.

        It has slots for twice the workers and some more, for replacements and for SIGTTIN, and grows beyond that.
        """
        size, header = backing.blank(min(max(32, 2 * workers + 8), layout.SLOTS_MAX), workers, server)
        where, warnings = backing.allocate(size, header, layout.SIZE_MAX)
        return cls(where, mmap.mmap(where.memory, 0), os.getpid()), warnings  # as long as it is

    @property
    def address(self) -> str:
        """By which a process that is spawned finds it, for join(): its path, or the name of its memory."""
        return self.path or self._text.decode()

    @classmethod
    def private(cls, slots: int = 1) -> Scoreboard:
        """One that only this process sees, and what it forks."""
        size, header = backing.blank(slots, slots, "")
        fd = backing.in_memory(size, header, size)
        return cls(Backing(fd, fd, None), mmap.mmap(fd, size), os.getpid())

    @classmethod
    def join(cls, address: str) -> Scoreboard:
        """In a spawned worker: its pool's scoreboard. Raises ScoreboardError when it is none."""
        return cls(*backing.join(address))

    @staticmethod
    def open(path: str) -> Reader:
        """Another process's scoreboard, to read. Raises ScoreboardError when it is none."""
        from oomsafe.scoreboard.reader import Reader  # here: a worker reads its own

        return Reader(path)

    @staticmethod
    def look(path: str) -> PoolView:
        """One look at another process's scoreboard. Raises ScoreboardError when it is none."""
        with Scoreboard.open(path) as board:
            return board.read()

    @property
    def pids(self) -> list[int]:
        """In the supervisor: of the workers that it has started, or that have said which they are; not all need live."""
        return [pid for number, tenant in self._tenants.items() if (pid := tenant.pid or self._claimed(number))]

    def reserve(self) -> Slot | None:
        """In the supervisor, before a fork: a slot for the new worker; None when all are taken, and there is no memory for more.

        That of a dead worker only when no other is free: its supervisor, which may reap others first,
        still has to read there what it died with.
        """
        number = next((number for number in range(self.slots) if number not in self._tenants), None)
        if number is None:
            number = next((number for number, tenant in self._tenants.items() if self._has_gone(number, tenant)), None)
        if number is None:
            number = self._first_of_more()
        if number is None:
            return None
        self.release(number)
        self._generations += 1
        self._tenants[number] = tenant = Tenant(self._generations, time.time())
        at = self._offset(number)
        self.header.generations = self._generations
        self._memory[at : at + layout.SLOT_SIZE] = bytes(layout.SLOT_SIZE)
        layout.write(self._memory, at + layout.OWNER_AT, layout.OWNER, 0, 0, tenant.generation, tenant.reserved)
        layout.write_state(self._memory, at, State.STARTING)
        return Slot(self._memory, at, number, tenant.generation)

    def _first_of_more(self) -> int | None:
        """Twice as many slots, in the room that everybody has mapped already: the first new one; None where there can't be more."""
        before, slots = self.slots, min(2 * self.slots, self._most)
        memory = (self._named or self._file).get()
        if slots == before or memory is None:
            return None
        try:
            backing.enlarge(memory, self._offset(slots))
        except OSError:
            return None
        layout.write(self._memory, 0, layout.IDENTITY, layout.MAGIC, layout.VERSION, slots, layout.SLOT_SIZE)
        self.slots = slots
        return before

    @property
    def _most(self) -> int:
        """So many slots have room in what is mapped."""
        return (len(self._memory) - layout.HEADER_SIZE) // layout.SLOT_SIZE

    def _learn(self) -> None:
        """In a worker: there may be more slots than when it was forked."""
        if os.getpid() != self._owner:
            self.slots = max(self.slots, min(layout.IDENTITY.unpack_from(self._memory)[2], self._most))

    def born(self, number: int, generation: int, pid: int) -> None:
        """In the supervisor, once it has started a process for this slot, and as often as it likes."""
        tenant = self._tenants.get(number)
        if tenant is not None and tenant.generation == generation and tenant.pid != pid:
            started = start_of_child(pid)
            if started is not None:
                tenant.pid, tenant.started = pid, started

    @property
    def processes(self) -> list[tuple[int, int]]:
        """(pid, start time) of the workers that born() was told of, for the supervisor to act on.

        They have claimed their slot, too: before, they have not raised their own score yet.
        """
        return [(tenant.pid, tenant.started) for number, tenant in self._tenants.items() if tenant.pid and self._claimed(number)]

    def _identity(self, number: int) -> tuple[int, int, int] | None:
        """In the supervisor: (pid, start time, generation) of who is in this slot, pid 0: it is not known yet; None: nobody.

        Before born() the worker's word is taken, if that names a child of this process, or itself.
        """
        tenant = self._tenants.get(number)
        if tenant is None:
            return None
        if tenant.pid:
            return tenant.pid, tenant.started, tenant.generation
        pid = self._claimed(number)
        started = (start_time() or 0) if pid == os.getpid() else start_of_child(pid) if pid else None
        return (0, 0, tenant.generation) if started is None else (pid, started, tenant.generation)

    def slot(self, number: int, generation: int) -> Slot:
        """In a spawned worker: the slot that was reserved for it. Raises ScoreboardError when it is another's by now."""
        at = self._offset(number)
        if number >= self.slots or layout.OWNER.unpack_from(self._memory, at + layout.OWNER_AT)[2] != generation:
            raise ScoreboardError(f"slot {number} of {self.path} is another worker's")
        return Slot(self._memory, at, number, generation)

    def release(self, number: int, generation: int | None = None) -> None:
        """In the supervisor, when a worker is gone: its counts go into the totals, in one step for all who read.

        With its `generation`, nothing happens when the slot is another's by now: a supervisor may
        hear of a death long after reserve() has seen it.
        """
        tenant = self._tenants.get(number)
        if tenant is None or (generation is not None and tenant.generation != generation):
            return
        at = self._offset(number)
        counters_at = at + layout.COUNTERS_AT
        self._totals.add(Counters.unpack(self._memory[counters_at : counters_at + layout.COUNTERS_SIZE].tobytes()))
        packed = self._totals.pack()
        (sequence,) = layout.SEQUENCE.unpack_from(self._memory, layout.SEQUENCE_AT)
        sequence += sequence % 2
        layout.write(self._memory, layout.SEQUENCE_AT, layout.SEQUENCE, layout.count(sequence + 1))
        self._memory[layout.TOTALS_AT : layout.TOTALS_AT + len(packed)] = packed
        self._memory[at : at + layout.SLOT_SIZE] = bytes(layout.SLOT_SIZE)
        layout.write(self._memory, layout.SEQUENCE_AT, layout.SEQUENCE, layout.count(sequence + 2))
        self._tenants.pop(number, None)

    def read(self) -> PoolView:
        """The whole pool, as one consistent copy."""
        from oomsafe.scoreboard.view import read_pool  # here: most workers are never asked

        self._learn()
        if os.getpid() != self._owner:
            return read_pool(self._fetch, self.slots)
        return replace(read_pool(self._fetch, self.slots, self._identity), supervisor=self._owner)

    def _fetch(self, at: int, length: int) -> bytes:
        return self._memory[at : at + length].tobytes()

    def roll(self) -> list[Entry]:
        """In the supervisor: every worker that has a slot, with what a schedule needs. One that has died is there until it is released."""
        entries = []
        for number in range(self.slots):
            tenant = self._tenants.get(number)
            at = self._offset(number)
            state = layout.read_state(self._memory, at, unknown=State.STARTING)
            if tenant is not None and state is not State.FREE and not self._was_never_born(number, tenant):
                entries.append(self._entry(number, tenant.generation, state))
        return entries

    def _entry(self, number: int, generation: int, state: State) -> Entry:
        at = self._offset(number)
        _, _, baseline, soft, hard, *_, published = layout.FIGURES.unpack_from(self._memory, at + layout.FIGURES_AT)
        paces = layout.NEED.unpack_from(self._memory, at + layout.NEED_AT)[1:]
        rss, anon, used = layout.seen_since(self._memory, published, at) or self._said(at)
        order = order_of(layout.ORDER.unpack_from(self._memory, at + layout.ORDER_AT)[0])
        return Entry(
            number, generation, state, rss, anon, optional(baseline), optional(soft), optional(hard), used,
            Growth(*(float(max(0, pace)) for pace in paces)), order,
        )  # fmt: skip

    def _said(self, at: int) -> tuple[int | None, int | None, int | None]:
        """(rss, anon, what the soft limit is compared with) by the worker's own word."""
        rss, *_, published = layout.FIGURES.unpack_from(self._memory, at + layout.FIGURES_AT)
        if not published:  # before, the zeros are no figures
            return None, None, None
        anon, used = (
            layout.MORE.unpack_from(self._memory, at + layout.MORE_AT)[0],
            layout.NEED.unpack_from(self._memory, at + layout.NEED_AT)[0],
        )
        return optional(rss), optional(anon), optional(used)

    def silent(self, before: float) -> list[tuple[int, int, int]]:
        """In the supervisor: (slot, pid, start time) of the workers that have published nothing since `before`, seconds since 1970."""
        found = []
        for number in self._tenants:
            published = layout.FIGURES.unpack_from(self._memory, self._offset(number) + layout.FIGURES_AT)[-1]
            who = None if published >= before else self._identity(number)
            if who is not None and who[0]:
                found.append((number, who[0], who[1]))
        return found

    def saw(self, number: int, rss: int, anon: int, *, counts_clean: bool) -> None:
        """In the supervisor: what the worker of this slot has resident at this moment, and what of it is no file; `counts_clean` is the
        policy's metric's. What it has grown by since it has published is taken to be its own."""
        at = self._offset(number)
        rss_said, anon_said, used = self._said(at)
        said, now = (rss_said, rss) if counts_clean else (anon_said, anon)
        used = None if used is None or said is None else max(0, used + now - said)
        layout.write(self._memory, at + layout.SEEN_AT, layout.SEEN, time.time(), rss, anon, stored(used))

    def _claimed(self, number: int) -> int:
        """The pid that a worker has written into this slot; 0: none has yet."""
        return int(layout.WORD.unpack_from(self._memory, self._offset(number) + layout.PID_AT)[0])

    def _was_never_born(self, number: int, tenant: Tenant) -> bool:
        return not tenant.pid and not self._claimed(number) and time.time() - tenant.reserved > RESERVED_FOR

    def _has_gone(self, number: int, tenant: Tenant) -> bool:
        """Whether the worker of this slot is dead, or its fork has failed."""
        if tenant.pid:
            return not is_alive(tenant.pid, tenant.started)
        pid, started = layout.OWNER.unpack_from(self._memory, self._offset(number) + layout.OWNER_AT)[:2]
        return not is_alive(pid, started) if pid else self._was_never_born(number, tenant)

    def give_order(self, number: int, generation: int, order: Order) -> None:
        """In the supervisor: this worker is to drain, now or when it is over its limit."""
        if self._is_of(number, generation):
            layout.write(self._memory, self._offset(number) + layout.ORDER_AT, layout.ORDER, order)

    @property
    def has_room(self) -> bool:
        """Whether a slot is left for one more worker."""
        return len(self._tenants) < self._most

    def in_hand(self) -> list[InHand]:
        """In the supervisor: the workers that are inside a piece of work which has a ticket."""
        found = []
        for number in range(self.slots):
            at = self._offset(number)
            ticket, held = layout.HAND.unpack_from(self._memory, at + layout.HAND_AT)
            who = self._identity(number) if ticket else None
            if who is not None and who[0]:
                pid, started, generation = who
                found.append(InHand(number, generation, pid, started, ticket, optional(held) or 0))
        return found

    def hand(self, number: int, generation: int) -> tuple[int, int]:
        """(ticket, held): of the work that this worker is inside of, or was when it died, and what it held in bytes when that began.

        Zeros: of none.
        """
        if not self._is_of(number, generation):
            return 0, 0
        ticket, held = layout.HAND.unpack_from(self._memory, self._offset(number) + layout.HAND_AT)
        return ticket, optional(held) or 0

    def tell_of_limit(self, number: int, generation: int, ticket: int, used: int, limit: int) -> None:
        """In the supervisor: this work is over its soft limit; both figures in bytes."""
        if self._is_of(number, generation):
            layout.write(self._memory, self._offset(number) + layout.TOLD_AT, layout.TOLD, ticket, used, limit)

    def has_heeded(self, number: int, generation: int, ticket: int) -> bool:
        """Whether this work, which was told of its limit, has heard of it, or is this worker's no more."""
        at = self._offset(number) + layout.TOLD_AT
        return not self._is_of(number, generation) or layout.TOLD.unpack_from(self._memory, at)[0] != ticket

    def others(self, slot: Slot) -> Others:
        """The living workers beside `slot`."""
        self._learn()
        starting = serving = leaving = 0
        for number in range(self.slots):
            at = self._offset(number)
            state = layout.read_state(self._memory, at)
            if state is not State.FREE and number != slot.number and not self._abandoned(at):
                starting += state is State.STARTING
                serving += state.serves
                leaving += state.leaves
        return Others(starting, serving, leaving, self.header.turns)

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
        if file is not None and self._text and os.pread(file, 64, 0) != self._text:  # a worker has it open, too
            os.pwrite(file, self._text, 0)
            os.ftruncate(file, len(self._text))
        if self._named is not None and not self._named.is_open:
            self._named = None
            log.warning("the application has closed the scoreboard's descriptor: `oomsafe status` can't see this pool any more")

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
        for kept in filter(None, (self._file, self._named)):
            kept.close()

    def _is_of(self, number: int, generation: int) -> bool:
        """Whether the slot is this worker's: a supervisor may speak of one that is gone."""
        tenant = self._tenants.get(number)
        return tenant is not None and tenant.generation == generation

    def _offset(self, number: int) -> int:
        return layout.HEADER_SIZE + number * layout.SLOT_SIZE

    def _abandoned(self, at: int) -> bool:
        pid, started, _, reserved = layout.OWNER.unpack_from(self._memory, at + layout.OWNER_AT)
        if not pid:
            return bool(time.time() - reserved > RESERVED_FOR)
        return not is_alive(pid, started)
