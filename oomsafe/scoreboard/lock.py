"""The pool's lock: one owner at a time, among all threads of all processes of the pool.

It is a POSIX record lock, which belongs to a process: the kernel would let any thread of it take the lock again, and any
thread release it. So each process has its own lock around it.
"""

from __future__ import annotations

import fcntl
import os
from _thread import allocate_lock, get_ident

from oomsafe.log import log
from oomsafe.scoreboard.forks import own


class Kept:
    """A descriptor that stays open, of a file that this process may lock.

    The application may close it (os.closerange, a library that daemonises), and its number may
    then belong to another file. So the descriptor is checked before each use, and opened again by its path if needed.
    """

    def __init__(self, fd: int, path: str | None) -> None:
        """`path` None: the file has none, and can't be opened again."""
        found = os.fstat(fd)
        self._file = found.st_dev, found.st_ino
        self._fd = fd
        self._path = path

    @property
    def is_open(self) -> bool:
        """Whether the descriptor is still open, and still belongs to this file."""
        return self._fd >= 0 and self._is_ours(self._fd)

    def get(self) -> int | None:
        """The descriptor, opened again if necessary; None if the file can no longer be opened."""
        if not self.is_open:
            self._fd = self._reopened()
        return self._fd if self._fd >= 0 else None

    def close(self) -> None:
        """Close it, if it still belongs to this file."""
        if self.is_open:
            os.close(self._fd)
        self._fd = -1

    def _is_ours(self, fd: int) -> bool:
        try:
            found = os.fstat(fd)
        except OSError:
            return False
        return (found.st_dev, found.st_ino) == self._file

    def _reopened(self) -> int:
        if self._path is None:
            return -1
        try:
            fd = os.open(self._path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:  # it was removed, or this process has changed its user
            return -1
        if self._is_ours(fd):
            return fd
        os.close(fd)
        return -1


class PoolLock:
    """Re-entrant for the thread that holds it; refused to all others, which never wait. A fork does not inherit it.

    Closing any descriptor of the file releases the lock (fcntl(2)), so no process that may hold it opens the file a second time.
    """

    def __init__(self, file: Kept) -> None:
        self.lost = False
        """Whether this process can never take it again: the descriptor was closed, and the file can't be opened."""
        self._file = file
        self.leave()

    def leave(self) -> None:
        """In a fork: nothing here holds it, because the holder, if any, was a thread of the parent."""
        own(self)
        self._gate = allocate_lock()
        self._owner: int | None = None
        self._depth = 0

    def try_acquire(self) -> bool:
        """Take it, or take it again; False: another process or thread holds it, or it is lost, which is logged once."""
        if self._owner == get_ident():
            self._depth += 1
            return True
        if not self._gate.acquire(blocking=False):
            return False
        if not self._lock_file():
            self._gate.release()
            return False
        self._owner, self._depth = get_ident(), 1
        return True

    def release(self) -> None:
        """Release it, as often as it was taken. Raises RuntimeError in a thread that does not hold it."""
        if self._owner != get_ident():
            raise RuntimeError("the pool's lock was released by a thread that does not hold it")
        self._depth -= 1
        if not self._depth:
            self._owner = None
            # if the descriptor was closed meanwhile, the lock is released already; its number may belong to another file
            if self._file.is_open and (fd := self._file.get()) is not None:
                try:
                    fcntl.lockf(fd, fcntl.LOCK_UN, 1)
                except OSError:
                    pass  # it was closed at this very moment
            self._gate.release()

    def _lock_file(self) -> bool:
        fd = None if self.lost else self._file.get()
        if fd is None:
            self._say_lost()
            return False
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1)
        except OSError:
            return False
        return True

    def _say_lost(self) -> None:
        if not self.lost:
            self.lost = True
            log.error(
                "process %d has lost the pool's lock: the application has closed its descriptor, and the file can't be opened again; "
                "its worker is recycled only when the supervisor orders it, and its new routes are counted as other", os.getpid(),
            )  # fmt: skip
