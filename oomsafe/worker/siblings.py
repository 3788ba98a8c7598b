"""Workers whose supervisor knows nothing of us: they have no scoreboard, and must not all leave at once either.

They meet in a file in the folder of their user, named after their parent. Each keeps the lock of one byte of it for as long as it lives,
the one at its own pid: that it has booted. The lock of the first byte is the turn: whoever has it may leave. The kernel
lets go of both when a process ends, however it does.
"""

from __future__ import annotations

import fcntl
import os
import time

from oomsafe.errors import ScoreboardError
from oomsafe.kernel.process import children_of, start_time
from oomsafe.log import attempt
from oomsafe.scoreboard import places

#: Where in the file the turn is. No worker has this pid.
TURN = 0

#: Whose lock is taken to read and write what has been said. Above any pid.
SAYING = 1 << 40


class Siblings:
    """The other workers of this process's parent, which wants `workers` in all. Made when this worker has booted.

    `workers` None: how many it wants nobody knows, but it brings up another at once for each that ends: they only take turns.
    """

    def __init__(self, workers: int | None) -> None:
        self._workers = workers
        self._parent = os.getppid()
        self._fd = attempt("meeting its siblings", "the server", self._open)
        if self._fd is not None:
            for _ in range(50):  # one that asks whether this worker has booted has its lock for a moment
                if self._lock(os.getpid()):
                    break
                time.sleep(0.001)

    def away(self) -> int | None:
        """How many of the others have not booted, or are missing; None where that can't be told: no folder could hold the file."""
        if self._fd is None or self._workers is None:
            return None
        return max(0, self._workers - 1 - self._booted())

    @property
    def counted(self) -> int | None:
        """How many have booted, this one included, where nobody knows how many there should be; else, and where none can be seen, None."""
        return None if self._fd is None or self._workers is not None else 1 + self._booted()

    def first_to_say(self, what: bytes) -> bool:
        """Whether none of this parent's workers, those that are gone included, has said this before."""
        fd = self._fd
        if fd is None:
            return True  # better said by each than by none
        if not self._lock(SAYING):
            return False  # another is saying something right now: the same, most likely
        try:
            said = os.pread(fd, 4096, 0)
            if what in said.split(b"\n"):
                return False
            os.pwrite(fd, what + b"\n", len(said))
        except OSError:
            return True
        finally:
            self._unlock(SAYING)
        return True

    def _booted(self) -> int:
        """How many of the others have."""
        return sum(self._has_booted(pid) for pid in children_of(self._parent) if pid != os.getpid())

    def take_turn(self) -> bool:
        """Whether this worker may be the one that leaves. It keeps the turn until give_back(), or its end."""
        return self._fd is None or self._lock(TURN)

    def give_back(self) -> None:
        """It stays."""
        if self._fd is not None:
            self._unlock(TURN)

    def _has_booted(self, pid: int) -> bool:
        if not self._lock(pid):
            return True
        self._unlock(pid)
        return False

    def _lock(self, byte: int) -> bool:
        """A record lock, which is the process's. False: another process has it, or the application has closed our descriptor."""
        try:
            fcntl.lockf(self._fd or 0, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
        except OSError:
            return False
        return True

    def _unlock(self, byte: int) -> None:
        try:
            fcntl.lockf(self._fd or 0, fcntl.LOCK_UN, 1, byte)
        except OSError:
            pass  # it is closed, and the lock with it

    def _open(self) -> int:
        last: Exception = ScoreboardError("no folder can hold the file")
        for path in places.folders():
            try:
                folder = places.open_folder(path, create=True)
                try:
                    places.sweep(folder)
                    name = places.turn_name(self._parent, start_time(self._parent) or 0)
                    fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=folder)
                    places.hold(fd, shared=True)
                    return fd
                finally:
                    os.close(folder)
            except (ScoreboardError, OSError) as error:
                last = error
        raise last
