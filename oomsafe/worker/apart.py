"""Which of several pieces of work in flight makes this worker grow: the one whose thread touches new memory, or whose coroutine runs."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from oomsafe.kernel.process import PAGE, thread_faults
from oomsafe.policy.growth import GrowthClock, shares_by_touch

if TYPE_CHECKING:
    from oomsafe.worker.meter import Work

#: The least growth in bytes that is divided by what threads have touched. What reads the counts of eight threads takes 0.1 ms.
LEAST_GROWTH = 4 << 20

#: Seconds for which coroutines are measured step by step after growth of which nobody knows whose it is. A step costs 1.5 us more.
STEPS_FOR = 60.0


#: After a call that took some time, nothing is done for so many times as long: near its limit a worker is measured 200 times a second.
RESTS = 20


class Apart:
    """Tells apart what is in flight in one process. Its meter calls it under the meter's lock.

    Pieces of work have equal shares of growth (GrowthClock). What each thread has touched since the last call says better which of
    them has grown, so their shares are corrected: by Work.mark, so that nothing else need know of it.
    """

    def __init__(self, faults: Callable[[], dict[int, int]] = thread_faults) -> None:
        self.works: dict[int, Work] = {}
        """The last piece of work in each cell, whether or not it has ended."""
        self.elsewhere: Callable[[], Mapping[Work, int]] = dict
        """Returns the ident of the thread that runs a piece of work now, if it is not the one that has begun it. Set by an adapter."""
        self.steps = False
        """Whether adapters should run coroutines by Meter.run_step(), because it is not known for whom the process has grown."""
        self.running: Work | None = None
        """The work whose coroutine runs one step; None: nobody's step is measured now."""
        self.split_at = 0
        """What the process held at the last call, in bytes."""
        self._steps_until = self._rests_until = 0.0
        self._read = faults
        self._faults: dict[int, int] | None = None
        """The faults of each thread at the last call; None: no two pieces of work have been seen beside each other yet."""
        self._had: dict[Work, float] = {}
        """The growth of each piece of work in flight at the last call, in bytes."""

    def tell(self, clock: GrowthClock) -> None:
        """Correct the shares of what is in flight in the growth since the last call. Once a second, and when the process has grown."""
        self.split_at = clock.last
        began = time.monotonic()
        if (self._faults is None and clock.in_flight < 2) or began < self._rests_until:
            return
        faults, before = self._read(), self._faults
        self._faults = faults
        grown = self.grown(clock)
        works = list(grown)
        shares = [growth - self._had.get(work, 0.0) for work, growth in grown.items()]
        unknown = len(works) > 1 and sum(shares) >= LEAST_GROWTH
        if before and unknown:
            touched = {thread: (count - before.get(thread, 0)) * PAGE for thread, count in faults.items()}
            own = [touched.pop(thread, None) if thread else None for thread in _own_threads(works, self.elsewhere())]
            corrected = shares_by_touch(shares, own, sum(touched.values()))
            for work, share, exact in zip(works, shares, corrected or (), strict=corrected is not None):
                if work.mark is not None:
                    work.mark -= exact - share
            unknown = corrected is None
        self._had = self.grown(clock)
        now = time.monotonic()
        self._rests_until = now + (now - began) * RESTS
        self._steps_until = now + STEPS_FOR if unknown else self._steps_until
        self.steps = now < self._steps_until

    def grown(self, clock: GrowthClock) -> dict[Work, float]:
        """The growth of each piece of work in flight, in bytes."""
        # a copy, because another thread may begin some meanwhile, and takes no lock for it
        return {work: clock.value - work.mark for work in list(self.works.values()) if work.started and work.mark is not None}

    def add(self, clock: GrowthClock, held: int) -> None:
        """Take a new measurement, in bytes, while a step is running: the growth is its own."""
        running, growth = self.running, clock.skip(held)
        if running is not None and running.mark is not None:
            running.mark -= growth
        else:
            clock.background += growth

    def leave(self) -> None:
        """In a fork of the process: nothing is told apart."""
        self.works, self.running, self._had, self._faults = {}, None, {}, None


def _own_threads(works: Sequence[Work], elsewhere: Mapping[Work, int]) -> list[int | None]:
    """The thread of each piece of work; None: it shares one with others, as in an event loop, or it is not known."""
    threads = [native_id(elsewhere.get(work, work.thread)) for work in works]
    number = Counter(threads)
    return [thread if thread and number[thread] == 1 else None for thread in threads]


def native_id(ident: int) -> int | None:
    """The kernel's id of the thread with this `ident`; None: Python's threading does not know it."""
    # not threading.enumerate(): it takes a lock, and a finalizer may call this while that is held
    known = getattr(sys.modules.get("threading"), "_active", {}).get(ident)
    return getattr(known, "native_id", None)
