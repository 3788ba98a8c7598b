"""How one worker's memory rose over its work: how much of it came in one jump, and whether the rest goes on. Pure."""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from itertools import accumulate
from operator import itemgetter

from oomsafe.policy.retirement import Point, Retirement

#: A jump is what came within this share of the work, or within one piece of it; with the first work, within so many pieces.
BRIEFLY, FEW = 0.05, 3

#: A jump stands out if it is so many times what came in any other span of work as short.
STANDS_OUT = 3.0

#: Growth that came in so many jumps, and little else, does not go on: as many models may have been loaded.
JUMPS = 3

#: Until this share of its work is done, a worker is warming up.
WARM = 0.2


@dataclass(frozen=True)
class Curve:
    """What a worker held after so much work and never again fell below: (work, bytes), both rising, with straight lines between."""

    points: tuple[tuple[float, float], ...]

    @property
    def rise(self) -> float:
        """From its begin to its end, in bytes."""
        return self.points[-1][1] - self.points[0][1]

    @property
    def work(self) -> float:
        """All of it."""
        return self.points[-1][0]

    def at(self, work: float) -> float:
        """Bytes after so much work."""
        place = bisect.bisect_right(self.points, work, key=itemgetter(0))
        (begin, low), (end, high) = self.points[max(0, place - 1)], self.points[min(place, len(self.points) - 1)]
        return low if end <= work or place == 0 else low + (high - low) * (work - begin) / (end - begin)

    def risen(self, begin: float, end: float) -> float:
        """Bytes between two shares of the work."""
        return self.at(end * self.work) - self.at(begin * self.work)

    def steepest(self, width: float) -> tuple[float, float]:
        """(work, bytes): where the span of work of this width begins in which it rises most, and by how much."""
        # on straight lines, the most is where one end of the span is at a point
        begins = {begin for work, _ in self.points for begin in (work, max(0.0, work - width))}
        return max(((begin, self.at(begin + width) - self.at(begin)) for begin in begins), key=lambda found: (found[1], found[0]))

    def without(self, begin: float, width: float, slope: float = 0.0) -> Curve:
        """This curve as if it had risen in this span of work by `slope` bytes for each piece of it."""
        end = min(begin + width, self.work)
        low, high = self.at(begin), self.at(begin) + slope * (end - begin)
        drop = self.at(end) - high
        before = [point for point in self.points if point[0] <= begin]
        after = [(work, held - drop) for work, held in self.points if work > end]
        return Curve((*before, (begin, low), (end, high), *after))

    def slope_beside(self, begin: float, width: float) -> float:
        """Bytes for each piece of work just before this span of work, and just after it: the less."""
        spans = [(max(0.0, begin - width), begin), (begin + width, min(self.work, begin + 2 * width))]
        return min(((self.at(end) - self.at(start)) / (end - start) for start, end in spans if end > start), default=0.0)


@dataclass(frozen=True)
class Shape:
    """What can be said about one worker's growth."""

    jump: float
    """Bytes that came within a few pieces of work, whenever: with the first request, or with a rare one."""
    jumped_after: int
    """The work that had been done before the jump."""
    stands_out: bool
    """Nowhere else did it grow so fast."""
    rest: Curve
    """Its growth without a jump that stands out."""

    @property
    def level(self) -> float:
        """Which share of the rest was there at half of the work."""
        return self.rest.risen(0, 0.5) / self.rest.rise if self.rest.rise > 0 else 1.0

    @property
    def pace(self) -> float:
        """How much the second half of the work after the warm-up has added, as a multiple of what the first half of that has added."""
        middle = (1 + WARM) / 2
        first, second = self.rest.risen(WARM, middle), self.rest.risen(middle, 1)
        return second / first if first > 0 else (0.0 if second <= 0 else float("inf"))

    @property
    def last_pace(self) -> float:
        """How much the last tenth of the work has added, as a multiple of the mean tenth after the warm-up; 0: it has levelled off."""
        after = self.rest.risen(WARM, 1)
        return self.rest.risen(0.9, 1) / after * (1 - WARM) / 0.1 if after > 0 else 0.0

    @property
    def lumpy(self) -> float:
        """Which share of the rest came in the few jumps that brought most of it."""
        curve, width = self.rest, max(1.0, self.rest.work * BRIEFLY)
        for _ in range(JUMPS):
            curve = curve.without(curve.steepest(width)[0], width)
        return 1.0 - curve.rise / self.rest.rise if self.rest.rise > 0 else 1.0

    @property
    def each(self) -> float:
        """Bytes that a piece of work has added after the warm-up."""
        return self.rest.risen(WARM, 1) / ((1 - WARM) * self.rest.work)


def shape_of(one: Retirement) -> Shape | None:
    """The shape of its growth; None: too little is known of its life."""
    curve = curve_of(one)
    if curve is None:
        return None
    width = max(1.0, curve.work * BRIEFLY)
    begin, jump = curve.steepest(width)
    first = max(width, min(FEW, curve.work / 2))
    if (early := curve.at(first) - curve.at(0)) >= jump:
        begin, jump, width = 0.0, early, first
    rest = curve.without(begin, width)
    stands_out = jump >= STANDS_OUT * max(rest.steepest(width)[1], 0.0)
    # without the jump the rest goes on through it as it does beside it
    rest = curve.without(begin, width, slope=curve.slope_beside(begin, width)) if stands_out else curve
    return Shape(jump=jump, jumped_after=int(begin), stands_out=stands_out, rest=rest)


def curve_of(one: Retirement) -> Curve | None:
    """What it held and never again fell below, until its end; None: not known."""
    if one.grown is None or one.fresh is None or not one.work or not one.points:
        return None
    points = [Point(0, one.fresh), *(point for point in one.points if 0 < point.work < one.work), Point(one.work, one.fresh + one.grown)]
    held = [*accumulate((float(point.held) for point in reversed(points)), min)][::-1]
    return Curve(tuple(zip((float(point.work) for point in points), held, strict=True)))
