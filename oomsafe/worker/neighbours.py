"""What one worker sees of the rest of its pool: who is away, whose turn it is, what the others have learnt."""

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

#: Seconds after which a supervisor that has not looked gives no orders any more: it is stopped, or gone.
LOOKS_EVERY = 3.0


class Neighbours:
    """Looks at the scoreboard for the worker that owns `slot`. `board` None: there are none, or none that can be seen.

    `parent` is the process that brings up another worker in this one's place; None: that is not known, or no process.
    Without a board, `siblings` are its other workers; None: there are none. One that can't be recycled asks nobody (`asks`).
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
        """Seconds that this worker took to serve, as its replacement will."""

    @property
    def workers(self) -> int | None:
        """How many workers the supervisor wants now, or, where it does not tell, has; None where there is no telling."""
        if self._board is not None:
            return self._board.header.workers
        return None if self._siblings is None else self._siblings.counted

    @property
    def allowed(self) -> Allowed | None:
        """What the supervisor has found that the kernel allows; None where nobody says."""
        found = None if self._board is None else self._board.header.allowed
        return found if found is not None and found.changes else None

    @property
    def alone(self) -> bool:
        """Whether nobody would say it."""
        return self._board is None

    @property
    def supervised(self) -> bool:
        """Whether a supervisor decides who goes, and when."""
        return self._asks and self._board is not None and self._board.header.looked > 0

    @property
    def others(self) -> Others:
        """What the other workers do; where that can't be seen, there are none."""
        return Others() if self._board is None else self._board.others(self._slot)

    def view(self) -> PoolView:
        """All of the pool, as it stands on the scoreboard; without one, this worker alone."""
        from oomsafe.scoreboard.view import view_alone  # here: most workers are never asked

        return self._board.read() if self._board is not None else view_alone(self._slot.copy())

    @property
    def room(self) -> int | None:
        """Bytes that were left up to the kernel's limit when the supervisor looked; None where it has not said so."""
        allowed, held = self.allowed, None if self._board is None else self._board.header.held
        if allowed is None or allowed.limit is None or held is None:
            return None
        return allowed.limit - held - (allowed.others or 0)

    @contextmanager
    def look(self, short: bool = False, full: bool = False, out: bool = False) -> Iterator[Pool]:
        """The others, while none of them can take a turn: what is decided inside holds. The flags are those of the pool's memory."""
        self._locked = self._board is not None and self._board.try_lock()
        try:
            yield self._pool(short, full, out)
        finally:
            if self._locked and self._board is not None:
                self._board.unlock()
            if self._siblings is not None and not self._leaves:
                self._siblings.give_back()
            self._locked = False

    def leaves(self, settled: bool) -> None:
        """Inside look(): a worker leaves that has or has not settled above its limit."""
        self._leaves = True
        if self._locked and self._board is not None:
            self._board.header.settled = min(self._board.header.settled + 1, 0xFFFF) if settled else 0

    def first_to_refuse(self, which: int) -> bool:
        """Whether this worker should say for the whole pool that it refuses this limit (layout.REFUSES_SOFT and so on)."""
        return self._board is None or self._board.header.first_to_refuse(which)

    def _pool(self, short: bool, full: bool, out: bool) -> Pool:
        abandoned = self._parent is not None and os.getppid() != self._parent
        if self._board is None and self._siblings is not None:
            return Pool(0 if abandoned else self._siblings_away(out), short=short, full=full, out=out, abandoned=abandoned)
        if self._board is None:
            return Pool(short=short, full=full, out=out, abandoned=abandoned)
        order, settled, looked = self._slot.order, self._board.header.settled, self._board.header.looked if self._asks else 0.0
        # without the lock another is taking its turn just now; with a supervisor there are none, unless the kernel is faster
        counts = self._locked and (out or not looked)
        starting, _, leaving, turns = self._board.others(self._slot) if counts else Others(leaving=sys.maxsize)
        if looked:
            abandoned = abandoned or time.monotonic() - looked > LOOKS_EVERY
        return Pool(starting + leaving, turns, short, full, out, leaving, bool(looked), abandoned, order, self.boot, settled)

    def _siblings_away(self, out: bool) -> int:
        """How many of them are; too many to go where another has the turn."""
        assert self._siblings is not None
        # None: nothing is known of them
        away = 0 if out else self._siblings.away() or 0
        return away if away or self._siblings.take_turn() else sys.maxsize
