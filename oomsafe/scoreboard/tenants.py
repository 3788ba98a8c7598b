"""Which worker has which slot: the supervisor keeps its own record, and trusts a worker's word only where that can't hurt."""

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

#: If a slot was reserved this many seconds ago and never claimed, its fork has failed.
RESERVED_FOR = 60.0


@dataclass
class Tenant:
    """The worker that has a slot, as the supervisor itself knows it."""

    generation: int
    reserved: float
    """When the slot was reserved, seconds since 1970."""
    pid: int = 0
    """The pid of the process that the supervisor has started for it; 0: not known yet."""
    started: int = 0
    """The start_time() of that process."""


class Tenants:
    """The slots of one scoreboard. `enlarge(size)` makes its memory `size` bytes long, and returns whether it could."""

    def __init__(self, memory: memoryview, header: Header, enlarge: Callable[[int], bool], supervisor: int) -> None:
        """`supervisor` is this process's pid if it is the supervisor."""
        self.slots = int(layout.IDENTITY.unpack_from(memory)[2])
        """The number of slots; the supervisor adds more when it needs them."""
        self.by_number: dict[int, Tenant] = {}
        self._memory = memory
        self._header = header
        self._enlarge = enlarge
        self._owner = supervisor
        self.generations = 0
        """In the supervisor: how many it has handed out."""
        self._totals = Totals(memory)

    def reserve(self) -> Slot | None:
        """In the supervisor, before a fork: a slot for the new worker; None if all are taken and there is no memory for more.

        A dead worker's slot is reused only if no other is free: the supervisor, which may reap other workers first,
        still has to read what the dead one left there.
        """
        number = next((number for number in range(self.slots) if number not in self.by_number), None)
        if number is None:
            number = next((number for number, tenant in self.by_number.items() if self._has_gone(number, tenant)), None)
        if number is None:
            number = self._first_of_more()
        if number is None:
            return None
        self.release(number)
        self.generations += 1
        self.by_number[number] = tenant = Tenant(self.generations, time.time())
        at = layout.slot_at(number)
        self._header.generations = self.generations
        self._memory[at : at + layout.SLOT_SIZE] = bytes(layout.SLOT_SIZE)
        layout.write(self._memory, at + layout.OWNER_AT, layout.OWNER, 0, 0, tenant.generation, tenant.reserved)
        layout.write_state(self._memory, at, State.STARTING)
        return Slot(self._memory, at, number, tenant.generation)

    def born(self, number: int, generation: int, pid: int) -> None:
        """In the supervisor: record the process that was started for this slot. May be called repeatedly."""
        tenant = self.by_number.get(number)
        if tenant is not None and tenant.generation == generation and tenant.pid != pid:
            started = start_of_child(pid)
            if started is not None:
                tenant.pid, tenant.started = pid, started

    def release(self, number: int, generation: int | None = None) -> None:
        """In the supervisor, when a worker is gone: add its counts to the totals, and free the slot.

        With a `generation`, nothing happens if the slot belongs to another worker by now: a supervisor may
        learn of a death long after reserve() has noticed it.
        """
        tenant = self.by_number.get(number)
        if tenant is None or (generation is not None and tenant.generation != generation):
            return
        self._totals.fold(number)
        self.by_number.pop(number, None)

    def slot(self, number: int, generation: int) -> Slot:
        """In a spawned worker: the slot that was reserved for it. Raises ScoreboardError if it belongs to another worker by now."""
        at = layout.slot_at(number)
        if number >= self.slots or layout.OWNER.unpack_from(self._memory, at + layout.OWNER_AT)[2] != generation:
            raise ScoreboardError(f"slot {number} is another worker's")
        return Slot(self._memory, at, number, generation)

    @property
    def has_room(self) -> bool:
        """Whether there is a slot for one more worker."""
        return len(self.by_number) < self._most

    @property
    def pids(self) -> list[int]:
        """In the supervisor: the pids of the workers that it has started, or that have claimed a slot; some may be dead."""
        return [pid for number, tenant in self.by_number.items() if (pid := tenant.pid or self._claimed(number))]

    @property
    def born_processes(self) -> list[tuple[int, int]]:
        """In the supervisor: (pid, start time) of the workers that were passed to born(); some may be dead."""
        return [(tenant.pid, tenant.started) for tenant in self.by_number.values() if tenant.pid]

    @property
    def processes(self) -> list[tuple[int, int]]:
        """(pid, start time) of the workers that were passed to born(), for the supervisor to act on.

        Only workers that have claimed their slot: before that, they have not raised their own score yet.
        """
        return [(tenant.pid, tenant.started) for number, tenant in self.by_number.items() if tenant.pid and self._claimed(number)]

    def process(self, number: int, generation: int) -> tuple[int, int] | None:
        """In the supervisor: (pid, start time) of this worker, if it was passed to born(); None: it was not, or its slot is another's."""
        tenant = self.by_number.get(number)
        return (tenant.pid, tenant.started) if tenant is not None and tenant.generation == generation and tenant.pid else None

    def count_recycle(self, reason: str) -> None:
        """In the supervisor: count a recycle that no worker counts."""
        self._totals.count_recycle(reason)

    def identity(self, number: int) -> tuple[int, int, int] | None:
        """In the supervisor: (pid, start time, generation) of the worker in this slot; pid 0: not known yet. None: the slot is free.

        Before born(), the worker's own claim is used if it names a child of this process, or this process itself.
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
        """In the supervisor: whether the slot still belongs to this worker, which may be gone."""
        tenant = self.by_number.get(number)
        return tenant is not None and tenant.generation == generation

    def was_never_born(self, number: int) -> bool:
        """In the supervisor: whether this slot was reserved long ago and never claimed."""
        tenant = self.by_number[number]
        return not tenant.pid and not self._claimed(number) and time.time() - tenant.reserved > RESERVED_FOR

    def learn(self) -> None:
        """In a worker: update the number of slots, which may have grown since it was forked."""
        if os.getpid() != self._owner:
            self.slots = max(self.slots, min(layout.IDENTITY.unpack_from(self._memory)[2], self._most))

    def is_abandoned(self, number: int) -> bool:
        """In a worker: whether the slot's worker, according to the slot, is dead or never claimed it."""
        pid, started, _, reserved = layout.OWNER.unpack_from(self._memory, layout.slot_at(number) + layout.OWNER_AT)
        if not pid:
            return bool(time.time() - reserved > RESERVED_FOR)
        return not is_alive(pid, started)

    def _first_of_more(self) -> int | None:
        """Double the number of slots, within the memory that all processes have mapped. Returns the first new one; None: no room."""
        before, slots = self.slots, min(2 * self.slots, self._most)
        if slots == before or not self._enlarge(layout.slot_at(slots)):
            return None
        layout.write(self._memory, 0, layout.IDENTITY, layout.MAGIC, layout.VERSION, slots, layout.SLOT_SIZE)
        self.slots = slots
        return before

    @property
    def _most(self) -> int:
        """How many slots fit into the mapped memory."""
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
