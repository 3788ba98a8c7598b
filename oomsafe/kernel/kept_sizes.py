"""Processes that are measured again and again: what each holds, through a descriptor that stays open."""

from __future__ import annotations

import os
from _thread import allocate_lock
from collections.abc import Iterable

from oomsafe.kernel.files import read_record
from oomsafe.kernel.process import PAGE, RSS, is_alive, is_still, open_identified, sizes_of, start_time

#: The most descriptors that KeptSizes keeps, and no more than an eighth of those that the process may have.
MOST_KEPT = 128

#: No round of KeptSizes.
OUTSIDE = -1


class _Kept:
    """A process that is measured again and again."""

    __slots__ = ("fd", "file", "files", "measured", "shared", "sizes", "started", "statm")

    def __init__(self, started: int) -> None:
        self.started = started
        self.fd = -1
        """The descriptor of its statm; -1: there is none, and its files are read by path."""
        self.file: tuple[int, int] | None = None
        """Device and inode of that statm; None if these don't identify it."""
        self.statm: bytes | None = None
        """The statm from which `sizes` follows; None: it must be read."""
        self.shared = b""
        """statm's third field when status was last read; empty: status must be read."""
        self.files = 0
        """The file pages that status then told, in bytes."""
        self.sizes: tuple[int, int] | None = None
        self.measured = OUTSIDE
        """The round in which `sizes` was read."""


class KeptSizes:
    """sizes_of() of processes that are measured again and again, through a descriptor of each one's statm that stays open.

    The descriptor belongs to the process, not to its pid: once the process is gone, a read fails, whoever has the pid by then
    (fs/proc/base.c, proc_single_show). So the start time is checked once, after opening it. statm does not tell shared memory from file
    pages: status is read if their sum has changed, and now and then. That takes 1 us for each process instead of 5.

    Other code may close a descriptor, and its number may be given to another file: content that is not a statm is noticed at
    once, another process's statm by follow(). Used by one process, whose forks call leave(). If two threads use it at once, one
    of them reads by path.
    """

    def __init__(self, proc: str = "/proc") -> None:
        self._proc = proc
        self._own = os.getpid()
        self._kept: dict[int, _Kept] = {}
        self._lock = allocate_lock()
        self._rounds = self._round = 0
        self._followed: dict[int, int] | None = None
        """What follow() was last called with; None: it must open a descriptor again."""

    def begin(self) -> None:
        """From here to end(), each kept process is read at most once."""
        self._rounds += 1
        self._round = self._rounds

    def end(self) -> None:
        """From here on, each call reads."""
        self._round = 0

    def follow(self, processes: Iterable[tuple[int, int]]) -> None:
        """Keep these processes, (pid, start time), and no others. Called about once a second."""
        if self._lock.acquire(blocking=False):
            try:
                self._follow({pid: started for pid, started in processes if started})
            finally:
                self._lock.release()

    def sizes(self, pid: int) -> tuple[int, int] | None:
        """The result of sizes_of(). A kept process that is a zombie, or gone, is None."""
        kept = self._kept.get(pid)
        if kept is not None and kept.measured == self._round:
            return kept.sizes
        if kept is None or not self._lock.acquire(blocking=False):
            return sizes_of(self._name(pid), self._proc)
        try:
            return self._read(pid, kept)
        finally:
            self._lock.release()

    def sizes_if(self, pid: int, started: int) -> tuple[int, int] | None:
        """The same, if the process with this pid has this start_time() and runs; else None."""
        kept = self._kept.get(pid)
        if kept is None or kept.started != started or not self._lock.acquire(blocking=False):
            sizes, known = sizes_of(self._name(pid), self._proc), False
        else:
            try:
                sizes = kept.sizes if kept.measured == self._round else self._read(pid, kept)
                known = kept.fd >= 0
            finally:
                self._lock.release()
        # the sizes are read first, so that a new process that got this pid meanwhile is not taken for the other
        return sizes if known or sizes is None or self._runs(pid, started) else None

    def mapped_if(self, pid: int, started: int) -> tuple[int, int, int] | None:
        """(data, rss, anon) of a kept process with this start_time() that runs; None for any other, and if it can't be read. Bytes.

        `data` is what RLIMIT_DATA counts: the sixth field of its statm. Each call reads.
        """
        kept = self._kept.get(pid)
        if kept is None or kept.started != started or kept.fd < 0 or not self._lock.acquire(blocking=False):
            return None
        try:
            sizes = self._read(pid, kept)
            return None if sizes is None or kept.statm is None else (int(kept.statm.split()[5]) * PAGE, *sizes)
        finally:
            self._lock.release()

    def held(self, pid: int) -> int | None:
        """The second of sizes()."""
        sizes = self.sizes(pid)
        return None if sizes is None else sizes[1]

    def close(self) -> None:
        """Close all descriptors."""
        self.follow(())

    def leave(self) -> None:
        """In a fork: close its copies of them."""
        self._lock, self._own = allocate_lock(), 0  # another thread of the parent may have the lock
        self.close()

    def _name(self, pid: int) -> int | str:
        """Its folder in /proc, which may be another PID namespace's: there this process has another number."""
        return "self" if pid == self._own else pid

    def _runs(self, pid: int, started: int) -> bool:
        return start_time("self", self._proc) == started if pid == self._own else is_alive(pid, started, self._proc)

    def _read(self, pid: int, kept: _Kept) -> tuple[int, int] | None:
        try:
            if kept.fd < 0:
                kept.sizes = sizes_of(self._name(pid), self._proc)
            elif (statm := os.pread(kept.fd, 128, 0)) != kept.statm:
                kept.sizes = self._sizes(pid, kept, statm)
                kept.statm = None if kept.sizes is None else statm
        except ProcessLookupError:
            kept.sizes = kept.statm = None
        except (OSError, ValueError):  # by now the number is another file's
            self._lose(kept)
            kept.sizes = sizes_of(self._name(pid), self._proc)
        kept.measured = self._round or OUTSIDE
        return kept.sizes

    def _sizes(self, pid: int, kept: _Kept, statm: bytes) -> tuple[int, int] | None:
        """Raises OSError or ValueError if the descriptor can't be read any more, or `statm` is none."""
        _, resident, shared, _, _, _, _ = statm.split()
        rss = int(resident) * PAGE
        if not rss:  # it has ended, and is not reaped yet
            return None
        if shared != kept.shared:
            status = read_record(f"{self._proc}/{self._name(pid)}/status")
            # it is this process's status only if that still runs
            if status is None or os.pread(kept.fd, 128, 0).split()[1] == b"0":
                return None
            found = RSS.search(status)
            kept.shared, kept.files = shared, 0 if found is None else int(found[2]) * 1024
        return rss, max(0, rss - kept.files)

    def _follow(self, wanted: dict[int, int]) -> None:
        self._check_one()
        if wanted == self._followed:
            return
        for pid in [pid for pid, kept in self._kept.items() if wanted.get(pid) != kept.started]:
            self._close(self._kept.pop(pid))
        most = min(MOST_KEPT, os.sysconf("SC_OPEN_MAX") // 8)
        room = most - sum(kept.fd >= 0 for kept in self._kept.values())
        for pid, started in wanted.items():
            kept = self._kept.setdefault(pid, _Kept(started))
            if kept.fd < 0 < room:
                room -= self._open(pid, kept)
        self._followed = wanted if room <= 0 or all(kept.fd >= 0 for kept in self._kept.values()) else None

    def _open(self, pid: int, kept: _Kept) -> bool:
        """Whether it could be opened, and belongs to the process with that start time."""
        try:
            fd, file = open_identified(f"{self._proc}/{self._name(pid)}/statm")
        except OSError:
            return False
        for other in self._kept.values():
            if other.fd == fd:  # other code has closed it
                self._lose(other)
        if not self._runs(pid, kept.started):
            os.close(fd)
            return False
        kept.fd, kept.file, kept.statm, kept.shared, kept.measured = fd, file, None, b"", OUTSIDE
        return True

    def _check_one(self) -> None:
        """Of the process that was not checked for the longest time: whether the descriptor is still its own; and status is read again."""
        if self._kept:
            pid, kept = next(iter(self._kept.items()))
            del self._kept[pid]
            self._kept[pid] = kept
            kept.statm, kept.shared = None, b""
            if not is_still(kept.fd, kept.file):
                self._lose(kept)

    def _lose(self, kept: _Kept) -> None:
        """Other code has closed the descriptor: the number is not closed again, because it may be another file's."""
        kept.fd, self._followed = -1, None

    def _close(self, kept: _Kept) -> None:
        if is_still(kept.fd, kept.file):
            os.close(kept.fd)
