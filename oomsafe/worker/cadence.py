"""When a worker is measured next: the sooner, the faster it grows towards its limit."""

from __future__ import annotations

import sys

from oomsafe.policy.recycle import ASKS_FROM
from oomsafe.policy.trend import SAMPLE_EVERY, Trend
from oomsafe.worker.door import Door
from oomsafe.worker.meter import PUBLISH_EVERY, Meter
from oomsafe.worker.neighbours import Neighbours
from oomsafe.worker.pressure import SHORT_EVERY
from oomsafe.worker.thresholds import Thresholds

#: Seconds between two times that a worker which asks to be replaced says what it holds, and wakes its supervisor.
ASK_EVERY = 0.1

#: A worker that will be over its limit within so many seconds, at the pace of the last moment, is measured more often.
LOOKS_AHEAD = 2.0

#: A worker that grows is measured about so many times until it is over its limit: fewer would not tell who makes it grow.
LOOKS_LEFT = 12


class Cadence:
    """Of one worker; used under its guard's lock."""

    def __init__(self, meter: Meter, trend: Trend, thresholds: Thresholds, neighbours: Neighbours, door: Door) -> None:
        self._meter = meter
        self._trend = trend
        self._thresholds = thresholds
        self._neighbours = neighbours
        self._door = door
        self.near: float = sys.maxsize
        """Bytes held from which its own limit is near: only there are figures read that stall it."""

    def set_alert(self) -> None:
        """From how many bytes on the end of work has something to decide."""
        self.near = self._thresholds.alert
        if self._grows_fast and self._neighbours.supervised:
            self.near *= ASKS_FROM
        self._meter.alert = min(self.near, self._door.looks_from)

    def pause(self, now: float, asks: bool) -> float:
        """Seconds until the next measurement of a worker that `asks` to be replaced, or does not."""
        return min(ASK_EVERY if asks else PUBLISH_EVERY, self._until_over(now))

    @property
    def _grows_fast(self) -> bool:
        """Whether it will soon be over its limit, at the pace of the last moment; also right after boot, when that is not known."""
        pace = self._trend.pace
        return pace is None or (pace > 0 and self._meter.held + pace * LOOKS_AHEAD > self._thresholds.alert)

    def _until_over(self, now: float) -> float:
        """A part of the seconds that are left until it is over its limit, as fast as it grows."""
        if self._trend.pace is None:
            return SAMPLE_EVERY
        burst, left = self._trend.growth(now, self._meter.held).burst, self._thresholds.alert - self._meter.held
        return max(SHORT_EVERY, left / burst / LOOKS_LEFT) if burst > 0 else PUBLISH_EVERY
