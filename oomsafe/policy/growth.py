"""How much one piece of work made its process grow while others were in flight.

With n pieces in flight it is unknown which of them made the process grow, so each gets an equal
share. Adding up the shares would cost O(n) at every event; a clock makes it O(1): at each
begin and end, the growth since the last event, divided by the number in flight, is added to the
clock. A piece of work's share is the clock at its end minus the clock at its begin. Nothing is lost:
the shares and the background add up to the whole growth.
"""

from __future__ import annotations

from collections.abc import Sequence

#: What threads have touched explains growth if it is at least this share of it, and at most this many times as much: memory that is given
#: back and touched again, over and over, would be taken for growth, and huge pages are touched in one go.
LEAST_TOUCHED, MOST_TOUCHED = 0.5, 2.0


class GrowthClock:
    """The growth in bytes of an imaginary piece of work that was always in flight. Callers must serialise their calls."""

    __slots__ = ("background", "in_flight", "last", "value")

    def __init__(self, rss: int) -> None:
        self.value = 0.0
        self.in_flight = 0
        self.last = rss
        self.background = 0
        """Growth in bytes while nothing was in flight."""

    def advance(self, rss: int) -> None:
        """Add a new measurement, in bytes. Call it before the number in flight changes."""
        growth = rss - self.last
        if not growth:
            return
        self.last = rss
        if self.in_flight:
            self.value += growth / self.in_flight
        else:
            self.background += growth

    def skip(self, rss: int) -> int:
        """Take a new measurement, in bytes, without sharing the growth, which is returned: the caller knows whose it is."""
        growth, self.last = rss - self.last, rss
        return growth


def shares_by_touch(shares: Sequence[float], touched: Sequence[int | None], elsewhere: int) -> list[float] | None:
    """Divide growth between pieces of work by what their threads have touched, in place of equal `shares`. All in bytes.

    `touched` has, for each piece of work, what its own thread has touched for the first time while the process grew; None: it has no
    thread of its own, because it waits, or because one thread (an event loop's) does several at a time. `elsewhere` was touched by all
    other threads, and is divided equally between those. The sum stays the same. None: what was touched does not explain the growth.
    """
    grown, without = sum(shares), sum(one is None for one in touched)
    known = sum(one or 0 for one in touched)
    total = known + (elsewhere if without else 0)
    if not known or not grown * LEAST_TOUCHED <= total <= grown * MOST_TOUCHED:
        return None
    return [grown * (elsewhere / without if one is None else one) / total for one in touched]
