"""In the supervisor: what workers hold that don't say so: inside one long piece of work, or stopped."""

from __future__ import annotations

import time

from oomsafe.kernel.process import is_alive, sizes_of
from oomsafe.policy.readers import COUNT_CLEAN
from oomsafe.policy.settings import Policy
from oomsafe.scoreboard.board import Scoreboard

#: Seconds for which a worker may say nothing: it says what it holds once a second.
SILENT_FOR = 2.0

#: Seconds between two looks.
LOOK_EVERY = 1.0


class Onlooker:
    """Writes it on the scoreboard. A look costs 15 us for each worker that is silent, and nothing for the others."""

    def __init__(self, board: Scoreboard) -> None:
        self._board = board
        self._look_at = 0.0

    def tick(self, policy: Policy, now: float) -> None:
        """`now` on the monotonic clock; as often as one likes."""
        if now < self._look_at:
            return
        self._look_at = now + LOOK_EVERY
        for number, pid, started in self._board.silent(time.time() - SILENT_FOR):
            # the sizes first: what has come to life with this pid since is not taken for the worker
            sizes = sizes_of(pid)
            if sizes is not None and is_alive(pid, started):
                self._board.saw(number, *sizes, counts_clean=policy.metric in COUNT_CLEAN)
