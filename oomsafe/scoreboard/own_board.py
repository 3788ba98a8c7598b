"""The scoreboard of a process that has no supervisor: a pool of one, for `oomsafe status`. Only this process writes to it."""

from __future__ import annotations

import atexit
import mmap
import os
import time
from contextlib import suppress

from oomsafe.policy.limits import Capacity, Limits
from oomsafe.policy.readers import LONGEST_NAME
from oomsafe.policy.text import shortened, without_controls
from oomsafe.scoreboard import backing, layout, places
from oomsafe.scoreboard.header import Header
from oomsafe.scoreboard.lock import Kept, PoolLock
from oomsafe.scoreboard.slot import Slot


class OwnBoard:
    """Created by create(), with the process's guard. The process removes the file when it ends; if it is killed, a later sweep removes it
    (14 KiB)."""

    def __init__(self, memory: mmap.mmap, file: int, path: str) -> None:
        self._pid = os.getpid()
        self._file = file
        self._path: str | None = path
        view = memoryview(memory)
        self.header = Header(view, PoolLock(Kept(file, path)))
        self.slot = Slot(view, layout.slot_at(0))
        self.slot.claim()

    @classmethod
    def create(cls, name: str = "") -> OwnBoard | None:
        """A new scoreboard of this process; None, without a log line, if no folder can hold it, so that `status` does not show it."""
        size, header = backing.blank(1, 1, layout.SINGLE_PROCESS)
        layout.NAME.pack_into(header, layout.NAME_AT, shortened(without_controls(name), LONGEST_NAME).encode("utf-8", "replace"))
        for folder in places.folders():
            try:
                file, path = backing.in_folder(folder, size, header)
                made = cls(mmap.mmap(file, size), file, path)
            except Exception:  # noqa: S112  a folder of another user, a full one, a detector of blocking calls: try the next, else do without
                continue
            atexit.register(made.remove)
            return made
        return None

    @property
    def name(self) -> str:
        """The process's name; empty: it has none."""
        return self.header.name

    def describe(self, capacity: Capacity, limits: Limits) -> None:
        """Publish what this process may hold, and the figures from which that is computed."""
        self.header.describe(workers=1, turns=1, limit=capacity.limit, budget=limits.budget, anew=False)
        self.header.allow(capacity)
        self.header.metric = limits.metric

    def remove(self) -> None:
        """Remove the file. Called at the end of the process, or earlier if that end is known to come. Does nothing in a fork."""
        if self._path is not None and os.getpid() == self._pid:
            path, self._path = self._path, None
            with suppress(OSError):  # another process has removed it
                os.unlink(path)
            with suppress(ValueError):  # its memory is closed
                self.header.ended = time.time()
