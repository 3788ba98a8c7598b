"""Writes what is known of this pool to where it survives: a container's termination log, and a state folder on disk."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Mapping

from oomsafe.kernel.oom_kills import boot_id, pid_namespace
from oomsafe.kernel.process import is_alive, start_time
from oomsafe.log import attempt, log
from oomsafe.policy.last_words import LONGEST, SHORT, Note, Present, epitaph, key_of, last_words, pack, unpack
from oomsafe.scoreboard.keep import Keep

#: Seconds between two writings at least, and while memory is short.
PAUSE, SHORT_PAUSE = 5.0, 0.5


class LastWords:
    """Of one pool; used in its supervisor. `present` reads the pool; it is only called when something may be written."""

    def __init__(self, name: str, termination_log: str | None, environ: Mapping[str, str] | None = None) -> None:
        """`name` tells this pool from others that share the state folder."""
        environ = os.environ if environ is None else environ
        self._file = None if termination_log is None else TerminationLog(termination_log)
        folder = environ.get("OOMSAFE_STATE")
        if not folder and (systemds := environ.get("STATE_DIRECTORY", "").partition(":")[0]):  # systemd.exec(5): others may read in it
            folder = os.path.join(systemds, "oomsafe")
        self._keep = Keep(folder) if folder else None
        self._key = f"pool {name}"
        self._next = 0.0
        self._short = False
        self._written: tuple[object, ...] | None = None
        self._noted = False
        if self._file is not None and not self._file.usable:
            self._file = None

    @property
    def wanted(self) -> bool:
        """Whether there is anywhere to write to."""
        return self._file is not None or self._keep is not None

    def of_the_last(self) -> str | None:
        """A line about the pool that had this name before, if it ended without a goodbye; told once. None: there was none."""
        if self._keep is None:
            return None
        raw = self._keep.get(self._key)
        note = None if raw is None else unpack(raw)
        if note is None:
            return None
        same_boot = note.boot == boot_id()
        if same_boot and note.namespace == pid_namespace() and is_alive(note.pid, note.started):
            self._keep = None  # it lives: two pools of one name, and this one leaves the other's note alone
            return None
        self._keep.delete(self._key)
        return epitaph(note, same_boot)

    def tick(self, present: Callable[[], Present], share: float | None, now: float) -> None:
        """Write again if that is due and the pool has changed enough; `now` on the monotonic clock.

        `share` of the limit is in use now: when memory becomes short, that is written at once, because a balloon takes what is left in no
        time, and the kernel may then kill all at once.
        """
        short = share is not None and share >= SHORT
        if not self.wanted or now < (self._next if short is self._short else 0.0):
            return
        self._short, self._next = short, now + (SHORT_PAUSE if short else PAUSE)
        pool = present()
        key = key_of(pool)
        if key == self._written:
            return
        self._written = key
        at = time.strftime("%F %T %z")
        words = last_words(pool, at)
        if self._file is not None:
            self._file.write(words if pool.matters else "")
        if self._keep is not None:
            note = Note(os.getpid(), start_time() or 0, boot_id(), pid_namespace(), at, words)
            self._keep.set(self._key, pack(note))
            self._noted = True

    def goodbye(self) -> None:
        """The pool ends in order."""
        keep, file = self._keep, self._file
        if file is not None:
            attempt("the termination log", "the server", lambda: file.write(""))
        if keep is not None and self._noted:
            attempt("the state folder", "the server", lambda: keep.delete(self._key))


class TerminationLog:
    """A file that is there already, and that nobody else has written to. It is never created, and no link is followed."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._written = b""
        self.usable = self._is_ours()

    def write(self, words: str) -> None:
        """Replace what was written before. Gives up for good if somebody else has written to it."""
        text = words.encode()[:LONGEST]
        if not self.usable or text == self._written:
            return
        if not self._is_ours():
            self.usable = False
            log.info("%s is left alone: somebody else has written to it", self._path)
            return
        fd = self._open(os.O_WRONLY)
        try:
            os.pwrite(fd, text, 0)
            os.ftruncate(fd, len(text))
            self._written = text
        finally:
            os.close(fd)

    def _is_ours(self) -> bool:
        """Whether it is a file that can be written, with what was last written here, or empty."""
        try:
            fd = self._open(os.O_RDWR)
        except OSError:
            return False
        try:
            return stat.S_ISREG(os.fstat(fd).st_mode) and os.pread(fd, LONGEST + 1, 0) == self._written
        finally:
            os.close(fd)

    def _open(self, how: int) -> int:
        return os.open(self._path, how | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
