"""In the supervisor: measures workers that publish nothing, because they are stopped or inside one long piece of work."""

from __future__ import annotations

import time
from collections.abc import Callable

from oomsafe.kernel.process import is_alive
from oomsafe.policy.readers import COUNT_CLEAN
from oomsafe.policy.settings import Policy
from oomsafe.scoreboard.board import Scoreboard

#: Seconds for which a worker may publish nothing; normally it publishes its figures once a second.
SILENT_FOR = 1.0

#: Seconds between two checks.
LOOK_EVERY = 1.0


class Onlooker:
    """Measures each worker whose figures are older than a second, which takes 10 us, and writes the result on the scoreboard."""

    def __init__(self, board: Scoreboard, sizes_of: Callable[[int], tuple[int, int] | None]) -> None:
        """`sizes_of` is the kernel's sizes_of(), or one that caches its results for this tick."""
        self._board = board
        self._sizes_of = sizes_of
        self._look_at = 0.0

    def tick(self, policy: Policy, now: float) -> None:
        """Check the workers if LOOK_EVERY has passed. `now` is on the monotonic clock; call it as often as you like."""
        if now < self._look_at:
            return
        self._look_at = now + LOOK_EVERY
        for number, pid, started in self._board.silent(time.time() - SILENT_FOR):
            # the sizes are read first, so that a new process that got this pid meanwhile is not taken for the worker
            sizes = self._sizes_of(pid)
            if sizes is not None and is_alive(pid, started):
                self._board.saw(number, sizes, counts_clean=policy.metric in COUNT_CLEAN)
