"""Which route made this worker grow: remembers what happened in each moment, and names a route only if that is certain."""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from oomsafe.policy.culprit import EXPLAINS, LEAST_GROWTH, Moments
from oomsafe.policy.text import printable
from oomsafe.policy.units import format_change, format_size
from oomsafe.scoreboard.layout import UNMATCHED
from oomsafe.worker.meter import MOST_NAMES, Meter, Work

#: The share of a worker's growth that one piece of work must have caused to be named.
BALLOON = 0.5

#: Work in flight that has caused this share of a moment's growth, and at least so many bytes of it, is looked at when it ends: until then
#: its growth would be put down to others' calls. Of several that merely wait beside a leak, each has an equal share, half at most.
BALLOONING, LEAST_BALLOONING = 0.6, 4 << 20

#: The parts of a path that vary within a route: numbers, and long hexadecimal ids.
_IDS: Final = re.compile(rb"(?<=/)(?:\d+|[0-9a-fA-F-]{16,})(?=/|$)")


class Blame(NamedTuple):
    """What made a worker grow."""

    text: str = ""
    """For the line about its end; empty: not known."""
    route: str | None = None
    """The route that kept most of it with its calls; None: none is certain."""


class Suspects:
    """The growth of one worker. Called once a second, and when the worker ends; work whose route is not known pays for Meter.names."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._moments = Moments()
        self._ready_with: int | None = None
        self._booted = 0
        """The growth with nothing in flight before the worker began to serve: it has loaded its app."""
        self._apart = 0
        self._held = 0
        """What the process held at the last call, in bytes."""
        self._in_flight: dict[Work, tuple[float, float]] = {}
        """Work in flight at the last call: its growth, and how much of that is set apart until it ends. Bytes."""

    def follow(self, now: float) -> None:
        """Record the present memory and counts. Call it right after memory was read, first when the worker begins to serve."""
        meter = self._meter
        # explained already: the first call of each route imports and fills caches; growth with nothing in flight belongs to no call
        known = meter.warm_up + meter.clock.background + self._ballooning()
        if self._ready_with is None:
            self._ready_with, self._booted, self._apart = meter.held, meter.clock.background, known
        self._moments.add(now, meter.held, self._calls(), known - self._apart)
        self._apart = known

    def blame(self, now: float) -> Blame:
        """Its text is ``; GET /leak keeps about 300 KiB a call: 92 % of its growth``, for the line about the worker's end."""
        self.follow(now)  # a worker that grows fast has done half of its work since it was last measured
        meter = self._meter
        grown = meter.held - (self._ready_with or meter.held)
        background = meter.clock.background - self._booted
        if grown >= LEAST_GROWTH and background >= grown * EXPLAINS:
            return Blame(f"; {format_change(background)} of it while nothing was in flight")
        culprit = self._moments.culprit()
        if culprit is not None:
            each, share = format_size(culprit.each), round(100 * culprit.share)
            return Blame(f"; {printable(culprit.route)} keeps about {each} a call: {share} % of its growth", culprit.route)
        for (growth, name), what in ((meter.largest, "largest growth in one of them"), (meter.first, "first of its kind here")):
            if growth and growth >= grown * BALLOON:
                return Blame(f"; {what}: {printable(name)} ({format_change(growth)})")
        return Blame()

    def _ballooning(self) -> int:
        """The bytes of growth that are set apart because whoever caused them is still in flight."""
        meter, before = self._meter, self._in_flight
        least = max(LEAST_BALLOONING, BALLOONING * (meter.held - self._held))
        self._held, self._in_flight = meter.held, {}
        for work, grown in meter.apart.grown(meter.clock).items():
            had, apart = before.get(work, (0.0, 0.0))
            if grown - had >= least:
                apart += grown - had
            self._in_flight[work] = (grown, apart)
        return int(sum(apart for _, apart in self._in_flight.values()))

    def _calls(self) -> dict[str, int]:
        """The number of calls by route, or by path if no framework gives the route."""
        meter = self._meter
        calls = {route: sum(row[1:]) for route, row in list(meter.counters.routes.items()) if route != UNMATCHED}
        names = dict(meter.names)
        if len(names) >= MOST_NAMES:
            meter.names = dict(sorted(names.items(), key=lambda named: -named[1])[: MOST_NAMES // 2])
        for name, number in names.items():
            path = _IDS.sub(b"*", name).decode("utf-8", "replace")
            calls[path] = calls.get(path, 0) + number
        return calls
