"""The pool's lock: one owner at a time, among all threads of all processes of the pool.

It is a POSIX record lock, which belongs to a process: the kernel would let any thread have it again, and any
thread let go of it. So each process has a lock of its own around it.
"""

from __future__ import annotations

import fcntl
import os
from _thread import allocate_lock, get_ident

from oomsafe.log import log
from oomsafe.scoreboard.forks import own


class Kept:
    """A descriptor that is kept, of a file that this process may lock.

    The application around us may close it (os.closerange, a library that daemonises), and its number may
    then be another file's. So it is compared with its file before each use, and opened anew by its path.
    """

    def __init__(self, fd: int, path: str | None) -> None:
        """`path` None: the file has none, and can't be opened anew."""
        found = os.fstat(fd)
        self._file = found.st_dev, found.st_ino
        self._fd = fd
        self._path = path

    @property
    def is_open(self) -> bool:
        """Whether the descriptor is still open, and still this file's."""
        return self._fd >= 0 and self._is_ours(self._fd)

    def get(self) -> int | None:
        """The descriptor, opened anew if need be; None when the file can't be had any more."""
        if not self.is_open:
            self._fd = self._reopened()
        return self._fd if self._fd >= 0 else None

    def close(self) -> None:
        """Close it, if it is still this file's."""
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
        except OSError:  # removed; or this process is another user's by now
            return -1
        if self._is_ours(fd):
            return fd
        os.close(fd)
        return -1


class PoolLock:
    """Re-entrant for the thread that has it; refused to all others, who never wait. A fork has nothing of its parent's.

    Closing any descriptor of the file lets go of it (fcntl(2)): no process that may have it opens the file a second time.
    """

    def __init__(self, file: Kept) -> None:
        self.lost = False
        """Whether nobody can have it from this process any more: the descriptor was closed, and the file can't be opened."""
        self._file = file
        self.leave()

    def leave(self) -> None:
        """In a fork, and in a fork of that: whoever had it, it was a thread of the parent."""
        own(self)
        self._gate = allocate_lock()
        self._owner: int | None = None
        self._depth = 0

    def try_acquire(self) -> bool:
        """Take it, or once more; False: another process or thread has it, or it is lost, which is said once."""
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
        """Give it back: as often as it was taken. Raises RuntimeError for a thread that does not have it."""
        if self._owner != get_ident():
            raise RuntimeError("the pool's lock is released by a thread that does not have it")
        self._depth -= 1
        if not self._depth:
            self._owner = None
            # a descriptor that was closed meanwhile has taken the lock with it; its number may be another file's
            if self._file.is_open and (fd := self._file.get()) is not None:
                try:
                    fcntl.lockf(fd, fcntl.LOCK_UN, 1)
                except OSError:
                    pass  # closed at this very moment
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
                "process %d has lost the pool's lock: the application has closed its descriptor, and the file can't be opened anew; "
                "its worker is recycled only when the supervisor tells it to, and its new routes are counted as other", os.getpid(),
            )  # fmt: skip
