"""A worker's door: while the pool is about to hit the kernel's limit and another worker leaves, new work waits outside the app."""

from __future__ import annotations

import logging
import sys
import time
from typing import TYPE_CHECKING

from oomsafe.log import once
from oomsafe.policy.door import WAITS_FOR, Crowd, Shedding, checks_from, next_door, next_shedding
from oomsafe.policy.door import Door as State
from oomsafe.policy.trend import LATELY, Growth
from oomsafe.policy.units import format_size
from oomsafe.worker.meter import PUBLISH_EVERY
from oomsafe.worker.neighbours import Neighbours
from oomsafe.worker.pressure import SHORT_EVERY, Pressure

if TYPE_CHECKING:
    from oomsafe.worker.guard import Guard

#: Seconds between two checks by waiting work: the first pause, and the longest.
FIRST_WAIT, LONGEST_WAIT = 0.005, 0.05


class Door:
    """The door of one worker. It is used under the guard's lock."""

    def __init__(self, pressure: Pressure, neighbours: Neighbours, may_shed: bool = False) -> None:
        self._pressure = pressure
        self._neighbours = neighbours
        self._state = State()
        self._may_shed = may_shed
        self._shedding = Shedding()
        self.checks_from: float = sys.maxsize
        """When the worker holds this many bytes, the door must be checked."""
        self._grew_fast_at = float("-inf")

    @property
    def shut(self) -> bool:
        """Whether new work waits."""
        return self._state.shut_at is not None

    @property
    def sheds(self) -> bool:
        """Whether new work is refused."""
        return self._shedding.since is not None

    def growth(self, growth: Growth) -> Growth:
        """The growth to reckon with, given the worker's present growth: while work waits, at least the growth before that."""
        return growth.at_least(self._shedding.growth if self.sheds else self._state.growth) if self.shut or self.sheds else growth

    def update(self, now: float, used: int, limit: int | None, held: int, growth: Growth) -> None:
        """Open or shut the door. Call it right after Pressure.update() or forget().

        Bytes: `used` is what the soft limit is compared with, `limit` is the soft limit (None: there is none), `held` is what is held.
        """
        pressure = self._pressure
        room = pressure.room if now - pressure.read_at <= SHORT_EVERY else None
        crowd = Crowd()
        if room is not None or pressure.full:
            starting, serving, leaving, _ = self._neighbours.others
            crowd = Crowd(room, pressure.full, 1 + serving, leaving, starting, pressure.fresh, pressure.limit)
        self._state = next_door(self._state, crowd, limit, used, growth, now)
        if self._may_shed:
            # work that has waited did not make the worker grow meanwhile, and would do so again
            self._shedding = next_shedding(self._shedding, self.shut, crowd, growth.at_least(self._state.growth), now)
        self.checks_from = sys.maxsize
        self.follow(now, held)

    def follow(self, now: float, held: int) -> None:
        """Update `checks_from`, given the room that this worker, or its supervisor, measured last; not while a check is due."""
        if held >= self.checks_from:
            return
        pressure = self._pressure
        room = pressure.room if now - pressure.read_at < PUBLISH_EVERY else self._neighbours.room
        found = checks_from(held, room, self._neighbours.workers or 1)
        self.checks_from = sys.maxsize if found is None else found

    def grew_fast(self, now: float) -> None:
        """Record that this worker has just grown too fast to wait for another to end."""
        self._grew_fast_at = now

    def waits_for_reclaim(self, now: float, limit: int | None) -> bool:
        """Whether new work waits while this worker reclaims memory, which takes a tenth of a second. `limit` is its soft limit.

        New work would meanwhile take a worker that has just grown fast far above its limit. That matters if the pool has less room left
        than its workers' soft limits add up to.
        """
        room = self._pressure.room
        fast = now - self._grew_fast_at < LATELY
        return fast and room is not None and room < (limit or 0) * (self._neighbours.workers or 1)

    def say_that_it_waits(self, name: str) -> None:
        """Log once that new work waits in the worker `name`, if it does."""
        if self.shut:
            once(
                "door", logging.INFO, "%s keeps what comes waiting, %.1f s at most, for the memory of a worker that leaves: "
                "%s are left up to the limit; lower soft_limit, or have fewer workers", name, WAITS_FOR, format_size(self._pressure.room),
            )  # fmt: skip

    def open(self) -> None:
        """Open the door for good: the worker leaves, and new work that still reaches it was promised an answer."""
        self._state, self._shedding, self.checks_from = State(), Shedding(), sys.maxsize


class Waiting:
    """The wait of one piece of work: sleep for seconds(), in whatever way the server sleeps, until it returns 0."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._until = time.monotonic() + WAITS_FOR
        self._next = FIRST_WAIT

    def seconds(self) -> float:
        """Seconds to sleep now; 0: the wait is over."""
        now = time.monotonic()
        self._guard.knock()
        if not self._guard.meter.crowded or self._guard.sheds or now >= self._until:
            return 0.0
        seconds, self._next = self._next, min(LONGEST_WAIT, self._next * 2)
        return min(seconds, self._until - now)
