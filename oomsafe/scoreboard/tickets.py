"""The current work of each worker, identified by a ticket, for a supervisor that enforces limits while it runs."""

from __future__ import annotations

from typing import NamedTuple

from oomsafe.scoreboard import layout
from oomsafe.scoreboard.layout import optional
from oomsafe.scoreboard.tenants import Tenants


class InHand(NamedTuple):
    """A worker and the piece of work that it is running."""

    number: int
    generation: int
    pid: int
    started: int
    ticket: int
    held: int
    """What the worker held when the work began, in bytes."""


class Tickets:
    """The tickets on one scoreboard; `tenants` knows which worker has which slot. Used in the supervisor."""

    def __init__(self, memory: memoryview, tenants: Tenants) -> None:
        self._memory = memory
        self._tenants = tenants

    def in_hand(self) -> list[InHand]:
        """The workers that are running a piece of work with a ticket."""
        found = []
        for number in range(self._tenants.slots):
            ticket, held = layout.HAND.unpack_from(self._memory, layout.slot_at(number) + layout.HAND_AT)
            who = self._tenants.identity(number) if ticket else None
            if who is not None and who[0]:
                pid, started, generation = who
                found.append(InHand(number, generation, pid, started, ticket, optional(held) or 0))
        return found

    def hand(self, number: int, generation: int) -> tuple[int, int]:
        """(ticket, held): the work that this worker is running, or was running when it died, and what it held in bytes when that began.

        Zeros: it runs none.
        """
        if not self._tenants.is_of(number, generation):
            return 0, 0
        ticket, held = layout.HAND.unpack_from(self._memory, layout.slot_at(number) + layout.HAND_AT)
        return ticket, optional(held) or 0

    def tell_of_limit(self, number: int, generation: int, ticket: int, used: int, limit: int) -> None:
        """Record that this work is over its soft limit; `used` and `limit` are in bytes."""
        if self._tenants.is_of(number, generation):
            layout.write(self._memory, layout.slot_at(number) + layout.WARNED_AT, layout.WARNED, ticket, used, limit)

    def has_heeded(self, number: int, generation: int, ticket: int) -> bool:
        """Whether this work, which is over its soft limit, has been warned, or the slot no longer belongs to its worker."""
        at = layout.slot_at(number) + layout.WARNED_AT
        return not self._tenants.is_of(number, generation) or layout.WARNED.unpack_from(self._memory, at)[0] != ticket
