"""In the supervisor: measures workers that publish nothing, because they are stopped or inside one long piece of work."""

from __future__ import annotations

import time
from collections.abc import Callable

from oomsafe.policy.readers import COUNT_CLEAN
from oomsafe.policy.settings import Policy
from oomsafe.scoreboard.board import Scoreboard

#: Seconds for which a worker may publish nothing; normally it publishes its figures once a second.
SILENT_FOR = 1.0

#: Seconds between two checks.
CHECK_EVERY = 1.0


class Onlooker:
    """Measures each worker whose figures are older than a second, and writes the result on the scoreboard."""

    def __init__(self, board: Scoreboard, sizes_if: Callable[[int, int], tuple[int, int] | None]) -> None:
        """`sizes_if` is that of a KeptSizes."""
        self._board = board
        self._sizes_if = sizes_if
        self._check_at = 0.0

    def tick(self, policy: Policy, now: float) -> None:
        """Check the workers if CHECK_EVERY has passed. `now` is on the monotonic clock; call it as often as you like."""
        if now < self._check_at:
            return
        self._check_at = now + CHECK_EVERY
        for number, pid, started in self._board.silent(time.time() - SILENT_FOR):
            sizes = self._sizes_if(pid, started)
            if sizes is not None:
                self._board.saw(number, sizes, counts_clean=policy.metric in COUNT_CLEAN)
