"""What a worker held over its life, in a few points: those without which the curve would look most unlike itself."""

from __future__ import annotations

from oomsafe.policy.retirement import POINTS, Point

#: A worker is young until it has done so much work: its first pieces are noted one by one, because a model may come with one of them.
YOUNG = 10

#: A piece of work that has brought so many bytes, and at least half of what came since the last point, was a jump.
LEAP = 4 << 20


class Life:
    """The points of one worker's life: what it held after so much work and has not given back since.

    follow() is called about once a second, and for the first pieces of work at the end of each; it takes some 10 us.
    """

    def __init__(self) -> None:
        self._points = [Point(0, 0)]
        self.young = True
        """Whether its pieces of work are still noted one by one."""

    def begin(self, fresh: int) -> None:
        """Before its first work it holds so many bytes."""
        self._points = [Point(0, fresh)]

    def follow(self, work: int, held: int, leap: int = 0) -> None:
        """It has done so much work, and holds so many bytes; `leap`: what the one piece of work that brought most has brought since."""
        points = self._points
        self.young = work < YOUNG
        self._cut(held)
        last = points[-1]
        if work <= last.work:
            return
        if leap >= max(LEAP, (held - last.held) / 2) and work - 1 > last.work:
            # Which piece of work since then it was is not known: the last will do. What else came may have been for a while only,
            # and so may what was held before, if the jump began from less.
            before = max(0, min(last.held, held - leap))
            self._cut(before)
            self._add(Point(work - 1, before))
        self._add(Point(work, held))

    def _cut(self, held: int) -> None:
        """The curve is of what stays: what was held only for a while is no growth."""
        points = self._points
        for place in range(len(points) - 1, 0, -1):
            if points[place].held <= held:
                break
            points[place] = points[place]._replace(held=held)

    def _add(self, point: Point) -> None:
        points = self._points
        points.append(point)
        if len(points) > POINTS + 1:
            least = min(range(1, len(points) - 1), key=lambda at: _bend(points[at - 1], points[at], points[at + 1]))
            del points[least]

    @property
    def points(self) -> tuple[Point, ...]:
        """The oldest first, without the one before its first work."""
        return tuple(self._points[1:])


def _bend(before: Point, point: Point, after: Point) -> tuple[int, int]:
    """How much the curve would lose with this point: the area between it and the straight line past it (Visvalingam and Whyatt, 1993)."""
    width = after.work - before.work
    area = (point.work - before.work) * (after.held - before.held) - width * (point.held - before.held)
    return abs(area), width
