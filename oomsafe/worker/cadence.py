"""When a worker is measured next: the faster it grows towards its limit, the sooner."""

from __future__ import annotations

import sys

from oomsafe.policy.recycle import ASKS_FROM
from oomsafe.policy.trend import SAMPLE_EVERY, Trend
from oomsafe.worker.door import Door
from oomsafe.worker.life import Life
from oomsafe.worker.meter import PUBLISH_EVERY, Meter
from oomsafe.worker.neighbours import Neighbours
from oomsafe.worker.pressure import SHORT_EVERY
from oomsafe.worker.thresholds import Thresholds

#: Seconds between two reports of a worker that asks to be replaced; each wakes its supervisor.
ASK_EVERY = 0.1

#: A worker that will be over its limit within this many seconds, at its last pace, is measured more often.
AHEAD = 2.0

#: A growing worker is measured about this many times before it is over its limit: fewer would not show which route makes it grow.
CHECKS_LEFT = 12


class Cadence:
    """The cadence of one worker; used under its guard's lock."""

    def __init__(self, meter: Meter, trend: Trend, thresholds: Thresholds, neighbours: Neighbours, door: Door, life: Life) -> None:
        self._meter = meter
        self._trend = trend
        self._thresholds = thresholds
        self._neighbours = neighbours
        self._door = door
        self._life = life
        self.near: float = sys.maxsize
        """When the worker holds this many bytes, its limit is near; figures that stall it are read only above this."""
        self.alert: float = sys.maxsize
        """When the worker holds this many bytes, there is something to decide."""

    def set_alert(self) -> None:
        """Set how many bytes the worker must hold for the end of work to have something to decide."""
        self.near = self._thresholds.alert
        if self._grows_fast and self._neighbours.supervised:
            self.near *= ASKS_FROM
        self.alert = min(self.near, self._door.checks_from)
        # the end of each of its first pieces of work is noted
        self._meter.alert = -1 if self._life.young else self.alert

    def pause(self, now: float, asks: bool) -> float:
        """Seconds until the next measurement of a worker that `asks` to be replaced, or does not."""
        return min(ASK_EVERY if asks else PUBLISH_EVERY, self._until_over(now))

    @property
    def _grows_fast(self) -> bool:
        """Whether it will soon be over its limit, at its last pace; also True right after boot, when the pace is not known."""
        pace = self._trend.pace
        return pace is None or (pace > 0 and self._meter.held + pace * AHEAD > self._thresholds.alert)

    def _until_over(self, now: float) -> float:
        """The seconds until it is over its limit, at its present growth, divided by CHECKS_LEFT."""
        if self._trend.pace is None:
            return SAMPLE_EVERY
        burst, left = self._trend.growth(now, self._meter.held).burst, self._thresholds.alert - self._meter.held
        return max(SHORT_EVERY, left / burst / CHECKS_LEFT) if burst > 0 else PUBLISH_EVERY
