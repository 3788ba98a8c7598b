"""What a worker held over its life, in a few points: the more work it has done, the further apart they are."""

from __future__ import annotations

from collections import deque

from oomsafe.policy.retirement import POINTS, Point

#: Each point comes after so many times the work of the one before.
FURTHER = 1.5


class Life:
    """The points of one worker's life. follow() is called about once a second, and costs a comparison then."""

    def __init__(self) -> None:
        self._points: deque[Point] = deque(maxlen=POINTS)
        self._next = 1

    def follow(self, work: int, held: int) -> None:
        """It has done so much work, and holds so many bytes."""
        if work >= self._next:
            self._points.append(Point(work, held))
            self._next = int(work * FURTHER) + 1

    @property
    def points(self) -> tuple[Point, ...]:
        """The oldest first."""
        return tuple(self._points)
