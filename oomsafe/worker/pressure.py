"""Whether the pool's memory is about to run out, measured by one of its workers: only by one that is over its limit, or leaves."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from oomsafe.kernel.capacity import read_capacity
from oomsafe.log import failed
from oomsafe.policy.recycle import holds_up, is_out, is_short
from oomsafe.policy.settings import Policy
from oomsafe.policy.trend import Growth
from oomsafe.worker.neighbours import Neighbours
from oomsafe.worker.thresholds import Thresholds

if TYPE_CHECKING:
    from oomsafe.scoreboard.usage import Usage
    from oomsafe.scoreboard.view import PoolView

#: Seconds between two measurements, at most and at least: each one reads kernel files.
SHORT_EVERY, SHORTEST = 0.05, 0.005

#: A worker that holds up the others closes kept-alive connections that have been idle for this many seconds.
IDLE_MOMENT = 0.03


class Pressure:
    """The pool's memory as one worker measures it; used under its guard's lock, and by its drain alone once it leaves."""

    def __init__(self, policy: Policy, thresholds: Thresholds, neighbours: Neighbours, pool: Callable[[], PoolView]) -> None:
        self._policy = policy
        self._thresholds = thresholds
        self._neighbours = neighbours
        self._pool = pool
        self._usage: Usage | None = None
        self._again = self._holds_up_again = 0.0
        self._growth = Growth()
        self._holds_up = False
        self.short = False
        """The pool is over its budget, or about to be."""
        self.out = False
        """The kernel is about to kill."""
        self.full = False
        """The budget has no room for one more worker."""
        self.room: int | None = None
        """Bytes left up to the kernel's limit when it was last measured; None: not known."""
        self.limit: int | None = None
        """That limit in bytes; None: not known."""
        self.read_at = float("-inf")
        """When that was."""

    @property
    def fresh(self) -> int:
        """Bytes that a freshly booted worker holds, as far as is known; else 0."""
        return self._thresholds.baseline or 0

    def update(self, now: float, growth: Growth, bounded: bool = False) -> None:
        """Measure, unless it is too soon: this worker is over its limit, or takes much of the remaining room. `growth` is its growth.

        `bounded`: the kernel holds it to a hard limit.
        """
        if now < self._again:
            return
        # the other workers are assumed to grow as this one does; but where a burst is bounded, one request's is no sign of others
        together, boot = growth.times(self._neighbours.workers or 1), self._neighbours.boot
        self._growth = together._replace(burst=growth.burst) if bounded else together
        used, budget, held, limit = self._read(now)
        self.short = is_short(used, budget, self._growth, boot)
        self.out = is_out(held, limit, self._growth)
        self.full = holds_up(used, budget, self._growth, boot, self.fresh)
        self.room, self.limit = None if held is None or limit is None else limit - held, limit
        self.read_at, self._again = now, now + SHORT_EVERY
        if self.room is not None and self._growth.burst > 0:
            self._again = now + min(SHORT_EVERY, max(SHORTEST, self.room / self._growth.burst / 16))

    def forget(self) -> None:
        """Reset the flags: this worker is below its limit, and there is room."""
        self.short = self.out = self.full = False
        self._growth = Growth()
        self._again = 0.0

    def holds_up(self, now: float) -> bool:
        """Whether the memory of this leaving worker keeps the pool from serving: then it must not wait for idle clients.

        False if that is not known.
        """
        if now >= self._holds_up_again and not self._policy.dry_run:
            self._holds_up_again = now + SHORT_EVERY
            self._holds_up = False
            try:
                used, budget, _, _ = self._read(now)
                self._holds_up = holds_up(used, budget, self._growth, self._neighbours.boot, self.fresh)
            except Exception as error:
                failed("reading the pool", "the server", error)
        return self._holds_up

    def _read(self, now: float) -> tuple[int | None, int | None, int | None, int | None]:
        """(used, budget, held, limit): the first two as the budget counts, the others as the kernel does. Bytes; None: not known."""
        from oomsafe.scoreboard.usage import Usage, pids_of, together  # imported here: most workers are never over their limit

        self._usage = self._usage or Usage()
        budget, capacity = self._thresholds.budget, read_capacity(held=lambda: together(pids_of(self._pool())))
        used = self._usage.of(self._policy, capacity, budget, lambda: pids_of(self._pool()), now)
        return used, budget, capacity.undroppable, capacity.limit
