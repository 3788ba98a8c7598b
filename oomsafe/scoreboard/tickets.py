"""The work that workers are inside of, each piece by its ticket, for a supervisor that keeps limits while it runs."""

from __future__ import annotations

from typing import NamedTuple

from oomsafe.scoreboard import layout
from oomsafe.scoreboard.layout import optional
from oomsafe.scoreboard.tenants import Tenants


class InHand(NamedTuple):
    """A worker that is inside a piece of work."""

    number: int
    generation: int
    pid: int
    started: int
    ticket: int
    held: int
    """What it held when that began, in bytes."""


class Tickets:
    """Of one scoreboard, whose slots are its `tenants`'. Used in the supervisor."""

    def __init__(self, memory: memoryview, tenants: Tenants) -> None:
        self._memory = memory
        self._tenants = tenants

    def in_hand(self) -> list[InHand]:
        """The workers that are inside a piece of work which has a ticket."""
        found = []
        for number in range(self._tenants.slots):
            ticket, held = layout.HAND.unpack_from(self._memory, layout.slot_at(number) + layout.HAND_AT)
            who = self._tenants.identity(number) if ticket else None
            if who is not None and who[0]:
                pid, started, generation = who
                found.append(InHand(number, generation, pid, started, ticket, optional(held) or 0))
        return found

    def hand(self, number: int, generation: int) -> tuple[int, int]:
        """(ticket, held): of the work that this worker is inside of, or was when it died, and what it held in bytes when that began.

        Zeros: of none.
        """
        if not self._tenants.is_of(number, generation):
            return 0, 0
        ticket, held = layout.HAND.unpack_from(self._memory, layout.slot_at(number) + layout.HAND_AT)
        return ticket, optional(held) or 0

    def tell_of_limit(self, number: int, generation: int, ticket: int, used: int, limit: int) -> None:
        """This work is over its soft limit; both figures in bytes."""
        if self._tenants.is_of(number, generation):
            layout.write(self._memory, layout.slot_at(number) + layout.TOLD_AT, layout.TOLD, ticket, used, limit)

    def has_heeded(self, number: int, generation: int, ticket: int) -> bool:
        """Whether this work, which was told of its limit, has heard of it, or is this worker's no more."""
        at = layout.slot_at(number) + layout.TOLD_AT
        return not self._tenants.is_of(number, generation) or layout.TOLD.unpack_from(self._memory, at)[0] != ticket
