"""Giving memory back in a worker that is idle, and below its limit: only where trims have paid before, and as long as they do."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from oomsafe.policy.reclaim import due_when_idle, futile_when_idle, pays, would_pay
from oomsafe.worker.meter import Meter

if TYPE_CHECKING:
    from oomsafe.scoreboard.header import Header


class Idle:
    """Since when a worker has had no work, and what came of giving memory back meanwhile. Used under its guard's lock."""

    def __init__(self, meter: Meter, header: Header | None) -> None:
        """`header`: of the scoreboard that tells of the pool's other workers; None: there is none."""
        self._meter = meter
        self._header = header
        self._fresh = meter.held
        self._work = 0
        self._since = 0.0
        self._worked = False
        """Whether there has been work since the last attempt: without, there is nothing new to give back."""
        self._reclaimed_at: float | None = None
        self._futile = 0
        self._began = 0.0

    def begin(self, fresh: int, now: float) -> None:
        """The worker serves from now on, and holds so many bytes."""
        self._fresh, self._since = fresh, now

    def due(self, now: float) -> bool:
        """Whether to give memory back now. Called about once a second, right after memory was read; if True, call tried() after that."""
        meter = self._meter
        if meter.in_flight or meter.counters.work != self._work:
            self._work, self._since, self._worked = meter.counters.work, now, True
            return False
        due = self._worked and due_when_idle(now - self._since, meter.held - self._fresh, self._reclaimed_at, self._futile, now)
        if not due or not self._paid():
            return False
        self._worked, self._began = False, time.process_time()
        return True

    def tried(self, freed: int, now: float) -> None:
        """Memory has been given back, so many bytes."""
        self._reclaimed_at = now
        self._futile = futile_when_idle(self._futile, freed, time.process_time() - self._began)

    def _paid(self) -> bool:
        """Whether this worker's own attempts have paid, or those of workers that are gone, or would have at the end of those."""
        own, header = self._meter.counters, self._header
        if pays(own.reclaims, own.reclaimed) or self._reclaimed_at is not None:
            return True
        return header is not None and (pays(*header.reclaims()) or would_pay(header.trimmed()))
