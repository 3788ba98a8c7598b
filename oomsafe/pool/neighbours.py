"""The rest of the pool, as one worker sees it: who is away, whose turn it is, what the others have learnt."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from oomsafe.policy.decide import Pool
from oomsafe.pool.scoreboard import Scoreboard
from oomsafe.pool.slot import Slot

#: After so many workers in a row that settled above their soft limit, the limit is too low.
SETTLED_WORKERS = 3


class Neighbours:
    """Looks at the scoreboard for the worker that owns `slot`. `board` None: there are none, or none that can be seen."""

    def __init__(self, board: Scoreboard | None, slot: Slot) -> None:
        self._board = board
        self._slot = slot
        self._locked = False

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
        """Inside look(), before a worker leaves that has or has not `settled` above its limit: whether it should stay."""
        if not self._locked or self._board is None:
            return False
        if settled and self._board.settled >= SETTLED_WORKERS:
            return True
        self._board.settled = self._board.settled + 1 if settled else 0
        return False

    def first_to_refuse(self) -> bool:
        """Whether this worker should say for the whole pool that the soft limit is too low."""
        return self._board is None or self._board.first_to_refuse()

    def _pool(self, over_budget: bool) -> Pool:
        if self._board is None:
            return Pool(over_budget=over_budget)
        if not self._locked:
            return Pool(draining=sys.maxsize, over_budget=over_budget)  # another is taking its turn just now
        draining, replacing, turns = self._board.others(self._slot)
        return Pool(draining, replacing, turns, over_budget)
