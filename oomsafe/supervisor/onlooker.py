"""In the supervisor: what workers hold that don't say so: inside one long piece of work, or stopped."""

from __future__ import annotations

import time
from collections.abc import Callable

from oomsafe.kernel.process import is_alive
from oomsafe.policy.readers import COUNT_CLEAN
from oomsafe.policy.settings import Policy
from oomsafe.scoreboard.board import Scoreboard

#: Seconds for which a worker may say nothing: it says what it holds once a second.
SILENT_FOR = 1.0

#: Seconds between two looks.
LOOK_EVERY = 1.0


class Onlooker:
    """Writes it on the scoreboard for each worker whose figures are older than a second, which takes 10 us; for the others nothing."""

    def __init__(self, board: Scoreboard, sizes_of: Callable[[int], tuple[int, int] | None]) -> None:
        """`sizes_of` is the kernel's, or remembers for this tick what that has said."""
        self._board = board
        self._sizes_of = sizes_of
        self._look_at = 0.0

    def tick(self, policy: Policy, now: float) -> None:
        """`now` on the monotonic clock; as often as one likes."""
        if now < self._look_at:
            return
        self._look_at = now + LOOK_EVERY
        for number, pid, started in self._board.silent(time.time() - SILENT_FOR):
            # the sizes first: what has come to life with this pid since is not taken for the worker
            sizes = self._sizes_of(pid)
            if sizes is not None and is_alive(pid, started):
                self._board.saw(number, sizes, counts_clean=policy.metric in COUNT_CLEAN)
