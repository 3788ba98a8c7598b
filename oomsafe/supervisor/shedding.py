"""In the supervisor: logs the end of a time in which workers have shed new work, once for the pool. The first worker logs its begin."""

from __future__ import annotations

from oomsafe.log import attempt, log
from oomsafe.policy.settings import Policy
from oomsafe.scoreboard import layout
from oomsafe.scoreboard.board import Scoreboard

#: Seconds without another piece of work that is shed, after which it is over.
CALM = 3.0

#: Seconds between two checks.
CHECK_EVERY = 0.5


class SheddingLine:
    """The line of one pool."""

    def __init__(self, board: Scoreboard) -> None:
        self._board = board
        self._check_at = 0.0
        self._began: float | None = None
        self._last = (0, 0.0)
        """How many pieces of work had been shed when that was last seen to rise, and when it was."""
        self._before = 0
        """How many had been shed when it was last over."""

    def tick(self, policy: Policy, now: float) -> None:
        """Do what is due. `now` is on the monotonic clock; call it as often as you like."""
        if now >= self._check_at and self._board.header.has_said(layout.SAID_SHEDS):
            self._check_at = now + CHECK_EVERY
            attempt("the line about shedding", "the server", lambda: self._check(policy, now))

    def _check(self, policy: Policy, now: float) -> None:
        shed = self._board.read().totals.aborts_by_reason["shed"]
        if self._began is None:
            self._began, self._last = now, (shed, now)
        elif shed != self._last[0]:
            self._last = shed, now
        elif now - self._last[1] >= CALM:
            self._board.header.take_back(layout.SAID_SHEDS)
            if not policy.dry_run:
                log.warning(
                    "new work is let in again: %d were answered with 503, within %.0f s", shed - self._before, self._last[1] - self._began
                )
            self._before, self._began = shed, None
