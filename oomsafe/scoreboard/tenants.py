"""Who has which slot: the supervisor knows it for itself, and believes a worker only what could not hurt."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

from oomsafe.errors import ScoreboardError
from oomsafe.kernel.process import is_alive, start_of_child, start_time
from oomsafe.policy.state import State
from oomsafe.scoreboard import layout
from oomsafe.scoreboard.header import Header
from oomsafe.scoreboard.slot import Slot
from oomsafe.scoreboard.totals import Totals

#: A slot that was reserved this long ago, in seconds, and never claimed belongs to a fork that failed.
RESERVED_FOR = 60.0


@dataclass
class Tenant:
    """Who has a slot, as the supervisor knows it for itself."""

    generation: int
    reserved: float
    """Seconds since 1970."""
    pid: int = 0
    """Of the process that the supervisor has started for it; 0: it has not heard of that yet."""
    started: int = 0


class Tenants:
    """The slots of one scoreboard. `enlarge(size)` makes its memory so many bytes long, and says whether it could."""

    def __init__(self, memory: memoryview, header: Header, enlarge: Callable[[int], bool], supervisor: int) -> None:
        """`supervisor` is this process's pid, if it is the one."""
        self.slots = int(layout.IDENTITY.unpack_from(memory)[2])
        """How many there are: the supervisor makes more when it needs them."""
        self.by_number: dict[int, Tenant] = {}
        self._memory = memory
        self._header = header
        self._enlarge = enlarge
        self._owner = supervisor
        self._generations = 0
        self._totals = Totals(memory)

    def reserve(self) -> Slot | None:
        """In the supervisor, before a fork: a slot for the new worker; None when all are taken, and there is no memory for more.

        That of a dead worker only when no other is free: its supervisor, which may reap others first,
        still has to read there what it died with.
        """
        number = next((number for number in range(self.slots) if number not in self.by_number), None)
        if number is None:
            number = next((number for number, tenant in self.by_number.items() if self._has_gone(number, tenant)), None)
        if number is None:
            number = self._first_of_more()
        if number is None:
            return None
        self.release(number)
        self._generations += 1
        self.by_number[number] = tenant = Tenant(self._generations, time.time())
        at = layout.slot_at(number)
        self._header.generations = self._generations
        self._memory[at : at + layout.SLOT_SIZE] = bytes(layout.SLOT_SIZE)
        layout.write(self._memory, at + layout.OWNER_AT, layout.OWNER, 0, 0, tenant.generation, tenant.reserved)
        layout.write_state(self._memory, at, State.STARTING)
        return Slot(self._memory, at, number, tenant.generation)

    def born(self, number: int, generation: int, pid: int) -> None:
        """In the supervisor, once it has started a process for this slot, and as often as it likes."""
        tenant = self.by_number.get(number)
        if tenant is not None and tenant.generation == generation and tenant.pid != pid:
            started = start_of_child(pid)
            if started is not None:
                tenant.pid, tenant.started = pid, started

    def release(self, number: int, generation: int | None = None) -> None:
        """In the supervisor, when a worker is gone: its counts go into the totals.

        With its `generation`, nothing happens when the slot is another's by now: a supervisor may
        hear of a death long after reserve() has seen it.
        """
        tenant = self.by_number.get(number)
        if tenant is None or (generation is not None and tenant.generation != generation):
            return
        self._totals.fold(number)
        self.by_number.pop(number, None)

    def slot(self, number: int, generation: int) -> Slot:
        """In a spawned worker: the slot that was reserved for it. Raises ScoreboardError when it is another's by now."""
        at = layout.slot_at(number)
        if number >= self.slots or layout.OWNER.unpack_from(self._memory, at + layout.OWNER_AT)[2] != generation:
            raise ScoreboardError(f"slot {number} is another worker's")
        return Slot(self._memory, at, number, generation)

    @property
    def has_room(self) -> bool:
        """Whether a slot is left for one more worker."""
        return len(self.by_number) < self._most

    @property
    def pids(self) -> list[int]:
        """In the supervisor: of the workers that it has started, or that have said which they are; not all need live."""
        return [pid for number, tenant in self.by_number.items() if (pid := tenant.pid or self._claimed(number))]

    @property
    def processes(self) -> list[tuple[int, int]]:
        """(pid, start time) of the workers that born() was told of, for the supervisor to act on.

        They have claimed their slot, too: before, they have not raised their own score yet.
        """
        return [(tenant.pid, tenant.started) for number, tenant in self.by_number.items() if tenant.pid and self._claimed(number)]

    def identity(self, number: int) -> tuple[int, int, int] | None:
        """In the supervisor: (pid, start time, generation) of who is in this slot, pid 0: it is not known yet; None: nobody.

        Before born() the worker's word is taken, if that names a child of this process, or itself.
        """
        tenant = self.by_number.get(number)
        if tenant is None:
            return None
        if tenant.pid:
            return tenant.pid, tenant.started, tenant.generation
        pid = self._claimed(number)
        started = (start_time() or 0) if pid == os.getpid() else start_of_child(pid) if pid else None
        return (0, 0, tenant.generation) if started is None else (pid, started, tenant.generation)

    def is_of(self, number: int, generation: int) -> bool:
        """In the supervisor: whether the slot is this worker's: it may speak of one that is gone."""
        tenant = self.by_number.get(number)
        return tenant is not None and tenant.generation == generation

    def was_never_born(self, number: int) -> bool:
        """In the supervisor: whether nobody has come for this slot, which was reserved long ago."""
        tenant = self.by_number[number]
        return not tenant.pid and not self._claimed(number) and time.time() - tenant.reserved > RESERVED_FOR

    def learn(self) -> None:
        """In a worker: there may be more slots than when it was forked."""
        if os.getpid() != self._owner:
            self.slots = max(self.slots, min(layout.IDENTITY.unpack_from(self._memory)[2], self._most))

    def is_abandoned(self, number: int) -> bool:
        """In a worker: whether who has this slot, by what stands there, is dead, or never came for it."""
        pid, started, _, reserved = layout.OWNER.unpack_from(self._memory, layout.slot_at(number) + layout.OWNER_AT)
        if not pid:
            return bool(time.time() - reserved > RESERVED_FOR)
        return not is_alive(pid, started)

    def _first_of_more(self) -> int | None:
        """Twice as many slots, in the room that everybody has mapped already: the first new one; None where there can't be more."""
        before, slots = self.slots, min(2 * self.slots, self._most)
        if slots == before or not self._enlarge(layout.slot_at(slots)):
            return None
        layout.write(self._memory, 0, layout.IDENTITY, layout.MAGIC, layout.VERSION, slots, layout.SLOT_SIZE)
        self.slots = slots
        return before

    @property
    def _most(self) -> int:
        """So many slots have room in what is mapped."""
        return (len(self._memory) - layout.HEADER_SIZE) // layout.SLOT_SIZE

    def _claimed(self, number: int) -> int:
        """The pid that a worker has written into this slot; 0: none has yet."""
        return int(layout.WORD.unpack_from(self._memory, layout.slot_at(number) + layout.PID_AT)[0])

    def _has_gone(self, number: int, tenant: Tenant) -> bool:
        """Whether the worker of this slot is dead, or its fork has failed."""
        if tenant.pid:
            return not is_alive(tenant.pid, tenant.started)
        pid, started = layout.OWNER.unpack_from(self._memory, layout.slot_at(number) + layout.OWNER_AT)[:2]
        return not is_alive(pid, started) if pid else self.was_never_born(number)
