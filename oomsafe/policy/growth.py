"""How much one piece of work made its process grow while others were in flight.

With n pieces in flight it is unknown which of them made the process grow, so each gets an equal
share. Adding up the shares would cost O(n) at every event; a clock makes it O(1): at each
begin and end, the growth since the last event, divided by the number in flight, is added to the
clock. A piece of work's share is the clock at its end minus the clock at its begin. Nothing is lost:
the shares and the background add up to the whole growth.
"""

from __future__ import annotations


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
