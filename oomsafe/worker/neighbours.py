"""What one worker knows of the rest of its pool: which workers are away, whose turn it is, what the others have learnt."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from oomsafe.policy.recycle import Pool
from oomsafe.scoreboard.board import Others, Scoreboard
from oomsafe.scoreboard.header import Allowed
from oomsafe.scoreboard.slot import Slot

if TYPE_CHECKING:
    from oomsafe.scoreboard.view import PoolView
    from oomsafe.worker.siblings import Siblings

#: After this many seconds without a tick, a supervisor is taken to be stopped or gone: it gives no more orders.
STANDS_STILL = 3.0


class Neighbours:
    """Reads the scoreboard for the worker that owns `slot`. `board` None: there are no other workers, or they can't be seen.

    `parent` is the process that starts another worker in this one's place; None: it is not known, or there is none.
    Without a board, `siblings` are the parent's other workers; None: there are none. `asks` is False for a worker that can't be
    recycled, and so never asks for a replacement.
    """

    def __init__(
        self, board: Scoreboard | None, slot: Slot, parent: int | None = None, siblings: Siblings | None = None, asks: bool = True
    ) -> None:
        self._asks = asks
        self._board = board
        self._slot = slot
        self._parent = parent
        self._siblings = siblings
        self._leaves = False
        self._locked = False
        self.boot = 1.0
        """Seconds from this worker's start until it served; its replacement is expected to take as long."""

    @property
    def workers(self) -> int | None:
        """How many workers the supervisor wants now or, without that, how many there are; None: not known."""
        if self._board is not None:
            return self._board.header.workers
        return None if self._siblings is None else self._siblings.counted

    @property
    def allowed(self) -> Allowed | None:
        """What the kernel allows, as the supervisor has published it; None: it has not."""
        found = None if self._board is None else self._board.header.allowed
        return found if found is not None and found.changes else None

    @property
    def measures_itself(self) -> bool:
        """Whether the worker must find out itself what the kernel allows: it is on no scoreboard on which a supervisor would publish it."""
        return self._board is None

    @property
    def supervised(self) -> bool:
        """Whether a supervisor decides which worker leaves, and when."""
        return self._asks and self._board is not None and self._board.header.decided_at > 0

    @property
    def others(self) -> Others:
        """What the other workers do; without a scoreboard, as if there were none."""
        return Others() if self._board is None else self._board.others(self._slot)

    def view(self) -> PoolView:
        """The whole pool from the scoreboard; without one, this worker alone."""
        from oomsafe.scoreboard.view import view_of_one  # imported here, because most workers never need it

        return self._board.read() if self._board is not None else view_of_one(self._slot.copy())

    @property
    def room(self) -> int | None:
        """Bytes left up to the kernel's limit when the supervisor last measured; None: it has not published that."""
        allowed, held = self.allowed, None if self._board is None else self._board.header.held
        if allowed is None or allowed.limit is None or held is None:
            return None
        return allowed.limit - held - (allowed.others or 0)

    @contextmanager
    def pool(self, short: bool = False, full: bool = False, out: bool = False) -> Iterator[Pool]:
        """The rest of the pool, under its lock: inside, no other worker can take a turn, so a decision stays valid.

        `short`, `full` and `out` are passed on to the Pool.
        """
        self._locked = self._board is not None and self._board.try_lock()
        try:
            yield self._pool(short, full, out)
        finally:
            if self._locked and self._board is not None:
                self._board.unlock()
            if self._siblings is not None and not self._leaves:
                self._siblings.give_back()
            self._locked = False

    def leaves(self, settled: bool | None) -> None:
        """Inside pool(): this worker leaves. Whether it had settled above its limit; None: it leaves for another reason."""
        self._leaves = True
        if settled is not None and self._locked and self._board is not None:
            self._board.header.settled = min(self._board.header.settled + 1, 0xFFFF) if settled else 0

    def first_to_refuse(self, which: int) -> bool:
        """Whether this worker should log for the whole pool that it refuses this limit (layout.REFUSES_SOFT and so on)."""
        return self._board is None or self._board.header.first_to_refuse(which)

    def _pool(self, short: bool, full: bool, out: bool) -> Pool:
        abandoned = self._parent is not None and os.getppid() != self._parent
        if self._board is None and self._siblings is not None:
            return Pool(0 if abandoned else self._siblings_away(out), short=short, full=full, out=out, abandoned=abandoned)
        if self._board is None:
            return Pool(short=short, full=full, out=out, abandoned=abandoned)
        order, settled, decided_at = self._slot.order, self._board.header.settled, self._board.header.decided_at if self._asks else 0.0
        # without the lock, another worker is taking its turn right now; with a supervisor, turns only count if the kernel is about to kill
        counts = self._locked and (out or not decided_at)
        starting, serving, leaving, turns = self._board.others(self._slot) if counts else Others(leaving=sys.maxsize)
        missing = max(0, self._board.header.workers - 1 - starting - serving - leaving)
        if decided_at:
            abandoned = abandoned or time.monotonic() - decided_at > STANDS_STILL
        return Pool(starting + leaving, turns, short, full, out, leaving, bool(decided_at), abandoned, order, self.boot, settled, missing)

    def _siblings_away(self, out: bool) -> int:
        """How many siblings are away; sys.maxsize if another has the turn, so that this worker stays."""
        assert self._siblings is not None
        # None: nothing is known about them
        away = 0 if out else self._siblings.away() or 0
        return away if away or self._siblings.take_turn() else sys.maxsize
