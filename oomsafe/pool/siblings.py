"""Workers whose supervisor knows nothing of us: they have no scoreboard, and must not all leave at once either.

Each finds the others among its parent's children. One that starts is not there to serve yet, for as long as this one's own boot
took; and one at a time has the turn, by a lock on a file that goes with the process.
"""

from __future__ import annotations

import fcntl
import os

from oomsafe.errors import ScoreboardError
from oomsafe.kernel.process import age_of, children_of, command_of, start_time
from oomsafe.pool import places
from oomsafe.pool.log import attempt

#: How much longer than this worker's another's boot may take: they boot when the pool is busy.
PATIENCE = 1.5

#: Seconds on top of that: a moment is taken for the boot of who boots in none.
LATE = 0.5

#: What is in the command of a process that multiprocessing has spawned to work, and not in that of its resource tracker.
SPAWNED = b"spawn_main"


class Siblings:
    """The other workers of this process's parent, which wants `workers` in all. This one took `boot` seconds to boot."""

    def __init__(self, workers: int, boot: float) -> None:
        self._workers = workers
        self._parent = os.getppid()
        self._boot = boot
        self._fd = -1

    def away(self) -> int | None:
        """How many of the others don't serve yet, or are missing; None where that can't be told."""
        if start_time(self._parent) is None:
            return None
        others = [pid for pid in children_of(self._parent) if pid != os.getpid() and SPAWNED in command_of(pid)]
        serving = sum((age_of(pid) or 0.0) > self._boot * PATIENCE + LATE for pid in others)
        return max(0, self._workers - 1 - serving)

    def take_turn(self) -> bool:
        """Whether this worker may be the one that leaves. It keeps the turn until give_back(), or its end.

        True as well where no folder can hold the file: then the only guard is away().
        """
        taken = attempt("the turn among siblings", "the server", self._lock)
        return True if taken is None else taken

    def give_back(self) -> None:
        """It stays."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _lock(self) -> bool:
        if self._fd < 0:
            self._fd = self._open()
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _open(self) -> int:
        last: Exception = ScoreboardError("no folder for the turn of siblings")
        for path in places.folders():
            try:
                folder = places.open_folder(path, create=True)
                try:
                    places.sweep(folder)
                    name = places.turn_name(self._parent, start_time(self._parent) or 0)
                    return os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=folder)
                finally:
                    os.close(folder)
            except (ScoreboardError, OSError) as error:
                last = error
        raise last
