"""Memory and time that say what a test tells them to."""

from __future__ import annotations

import mmap

from oomsafe.kernel.process import PAGE, OwnMemory
from oomsafe.policy.limits import Kind, Source

MIB = 1 << 20

#: Where a limit stands, no matter where.
CGROUP = Source(Kind.CGROUP, "/here", 2)


class Memory(OwnMemory):
    """An OwnMemory whose figures are given. A new one comes with a real page fault, as growth does: without, nobody looks."""

    def __init__(self, rss: int | None) -> None:
        super().__init__()
        self.now = rss
        self.clean = 0
        """What of it are clean file pages, in bytes."""
        self.shared_memory: int | None = 0

    def sizes(self) -> tuple[int, int] | None:
        """The figures of this moment."""
        return None if self.now is None else (self.now, self.clean + (self.shared_memory or 0))

    def shmem(self) -> int | None:
        """None: the kernel does not tell it apart."""
        return self.shared_memory

    def mapped(self) -> tuple[int, int, int] | None:
        """None: the kernel would hold this process to limits that follow from figures which are given."""
        return None

    def be(self, rss: int | None) -> None:
        """From now on, this."""
        self.now = rss
        fault()


def fault() -> None:
    """Touch a page that was not there: the kernel counts a fault."""
    with mmap.mmap(-1, PAGE) as page:
        page[0] = 1


class Clock:
    """A monotonic clock that goes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def go(self, seconds: float) -> None:
        """Let so much time pass."""
        self.now += seconds
