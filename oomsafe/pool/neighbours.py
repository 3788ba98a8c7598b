"""The rest of the pool, as one worker sees it: who is away, whose turn it is, what the others have learnt."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from oomsafe.policy.decide import Pool
from oomsafe.pool.scoreboard import Scoreboard
from oomsafe.pool.slot import Slot

#: Seconds after which a supervisor that has not looked is one that gives no turns.
LOOKS_EVERY = 3.0

#: After so many workers in a row that settled above their soft limit, the limit is too low.
SETTLED_WORKERS = 3


class Neighbours:
    """Looks at the scoreboard for the worker that owns `slot`. `board` None: there are none, or none that can be seen."""

    def __init__(self, board: Scoreboard | None, slot: Slot) -> None:
        self._board = board
        self._slot = slot
        self._locked = False
        self.boot = 1.0
        """Seconds that this worker took to serve, as its replacement will."""

    @property
    def workers(self) -> int | None:
        """How many workers the supervisor wants now; None where there is no telling."""
        return None if self._board is None else self._board.workers

    @contextmanager
    def look(self, over_budget: bool) -> Iterator[Pool]:
        """The others, while none of them can take a turn: what is decided inside holds."""
        self._locked = self._board is not None and self._board.try_lock()
        try:
            yield self._pool(over_budget)
        finally:
            if self._locked and self._board is not None:
                self._board.unlock()
            self._locked = False

    def leaving_is_no_use(self, settled: bool) -> bool:
        """Whether a worker that has or has not `settled` above its limit should stay: too many before it had."""
        return settled and self._board is not None and self._board.settled >= SETTLED_WORKERS

    def leaves(self, settled: bool) -> None:
        """Inside look(): a worker leaves that has or has not settled above its limit."""
        if self._locked and self._board is not None:
            self._board.settled = self._board.settled + 1 if settled else 0

    def first_to_refuse(self) -> bool:
        """Whether this worker should say for the whole pool that the soft limit is too low."""
        return self._board is None or self._board.first_to_refuse()

    @property
    def boots_fail(self) -> bool:
        """Whether the last worker that was started died before it served."""
        return self._board is not None and self._board.schedule[1] > 0

    def _pool(self, over_budget: bool) -> Pool:
        if self._board is None:
            return Pool(over_budget=over_budget)
        looked, failures = self._board.schedule
        surges = time.monotonic() - looked < LOOKS_EVERY
        told = self._slot.told_to_drain
        if not self._locked and not told:
            # another is taking its turn just now
            return Pool(sys.maxsize, over_budget=over_budget, surges=surges, boot=self.boot, boots_fail=failures > 0)
        draining, replacing, turns = self._board.others(self._slot)
        return Pool(draining, replacing, turns, over_budget, surges, told, self.boot, failures > 0)
