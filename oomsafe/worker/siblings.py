"""Workers under another server's supervisor: they have no scoreboard, but must not all leave at once either.

They coordinate through a file in their user's folder, named after their parent. A worker that has booted holds a lock on one byte
of the file, at the offset of its own pid, for as long as it lives. The lock on the first byte is the turn: its holder may leave. The
kernel releases both when a process ends, however it ends.
"""

from __future__ import annotations

import fcntl
import os
import time

from oomsafe.errors import ScoreboardError
from oomsafe.kernel.process import children_of, start_time
from oomsafe.log import attempt
from oomsafe.scoreboard import places

#: The offset of the turn's lock. No worker has this pid.
TURN = 0

#: The offset of the lock for reading and writing what has been logged. Above any pid.
SAYING = 1 << 40


class Siblings:
    """The other workers of this process's parent, which wants `workers` in all. Created when this worker has booted.

    `workers` None: the wanted number is not known, but the parent at once starts another for each that ends: they only take turns.
    """

    def __init__(self, workers: int | None) -> None:
        self._workers = workers
        self._parent = os.getppid()
        self._fd = attempt("meeting its siblings", "the server", self._open)
        if self._fd is not None:
            for _ in range(50):  # a sibling that checks whether this worker has booted holds its lock for a moment
                if self._lock(os.getpid()):
                    break
                time.sleep(0.001)

    def away(self) -> int | None:
        """How many of the others have not booted, or are missing; None: not known (no folder for the file, or `workers` is None)."""
        if self._fd is None or self._workers is None:
            return None
        return max(0, self._workers - 1 - self._booted())

    @property
    def counted(self) -> int | None:
        """How many have booted, including this one, if the wanted number is not known; None if it is, or if there is no file."""
        return None if self._fd is None or self._workers is not None else 1 + self._booted()

    def first_to_say(self, what: bytes) -> bool:
        """Whether none of this parent's workers, including those that are gone, has logged this before; now it counts as logged."""
        fd = self._fd
        if fd is None:
            return True  # better logged by each worker than by none
        if not self._lock(SAYING):
            return False  # another worker is logging right now, most likely the same
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
        """How many of the others have booted."""
        return sum(self._has_booted(pid) for pid in children_of(self._parent) if pid != os.getpid())

    def take_turn(self) -> bool:
        """Whether this worker may leave now. It keeps the turn until give_back(), or until it ends."""
        return self._fd is None or self._lock(TURN)

    def give_back(self) -> None:
        """Give the turn back: this worker stays."""
        if self._fd is not None:
            self._unlock(TURN)

    def _has_booted(self, pid: int) -> bool:
        if not self._lock(pid):
            return True
        self._unlock(pid)
        return False

    def _lock(self, byte: int) -> bool:
        """Take a record lock, which belongs to the process. False: another process has it, or the application closed our descriptor."""
        try:
            fcntl.lockf(self._fd or 0, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
        except OSError:
            return False
        return True

    def _unlock(self, byte: int) -> None:
        try:
            fcntl.lockf(self._fd or 0, fcntl.LOCK_UN, 1, byte)
        except OSError:
            pass  # the descriptor was closed, which released the lock

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
