"""Giving memory back in a worker that is over its limit, or idle: which part of its heap is collected, and in which thread."""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Callable
from functools import partial

from oomsafe.kernel.heap import frozen_blocks
from oomsafe.kernel.malloc import trim
from oomsafe.kernel.process import shared_with_parent
from oomsafe.log import failed, log
from oomsafe.policy.reclaim import generation
from oomsafe.policy.units import MIB, format_size
from oomsafe.worker.background import Background
from oomsafe.worker.meter import Meter


class Reclaim:
    """One attempt, under the lock of the worker's guard. `name` is the worker's name in the log."""

    def __init__(self, meter: Meter, background: Background | None, name: str) -> None:
        """`background` runs malloc_trim() beside the work; None: in place."""
        self._meter = meter
        self._background = background
        self._name = name
        self._before = meter.rss

    def run(self, then: Callable[[int], object], release: Callable[[], None], idle: bool = False) -> bool:
        """Give memory back, then call `then` with the bytes by which the process has shrunk. `idle`: work may come at any time.

        False: the second half runs in the background, which calls `release` at its end.
        """
        collect(others_wait=idle or self._background is not None or self._meter.in_flight > 0)
        if self._background is None:
            then(self._trim())
            return True
        self._background(partial(self._finish, then, release))
        return False

    def _finish(self, then: Callable[[int], object], release: Callable[[], None]) -> None:
        try:
            then(self._trim())
        except Exception as error:
            self._meter.crowded = False
            failed("reclaim", "the server", error)
        finally:
            release()

    def _trim(self) -> int:
        trim()
        freed = max(0, self._before - self._meter.measure())
        self._meter.counters.reclaims += 1
        self._meter.counters.reclaimed += freed
        level, sizes = logging.INFO if freed >= MIB else logging.DEBUG, (freed, self._before, self._meter.rss)
        log.log(level, "%s reclaimed %s by gc and malloc_trim: rss %s -> %s", self._name, *map(format_size, sizes))
        return freed


def collect(others_wait: bool) -> None:
    """Collect garbage without copying memory shared with a parent. `others_wait`: without stalling them for more than 0.05 s either.

    This runs in the calling thread even on an event loop: gc holds the GIL wherever it runs, and finalizers expect this thread.
    """
    frozen = frozen_blocks()
    shared = 0 if frozen is not None else shared_with_parent() or 0
    gc.collect(generation(sys.getallocatedblocks() - (frozen or 0), others_wait, shared))
