"""A worker's state: the same names in code, on the scoreboard, in `oomsafe status` and in the metrics."""

from __future__ import annotations

from enum import Enum


class State(str, Enum):
    """The state of a worker's slot. The scoreboard stores a state's position in this order, so append new states at the end."""

    FREE = "free"
    """The slot has no worker."""
    STARTING = "starting"
    """The worker boots."""
    SERVING = "serving"
    WAITING = "waiting"
    """The worker serves, is over its limit or soon will be, and asks to be replaced."""
    DRAINING = "draining"
    """The worker takes no new work and finishes what it has: that may take long."""
    LEAVING = "leaving"
    """The worker has no more work and exits in a moment."""

    def __str__(self) -> str:
        return self.value

    def __format__(self, spec: str) -> str:  # Python 3.10 and 3.12 differ
        return format(self.value, spec)

    @property
    def serves(self) -> bool:
        """Whether the worker takes new work."""
        return self in (State.SERVING, State.WAITING)

    @property
    def leaves(self) -> bool:
        """Whether the worker is draining or leaving."""
        return self in (State.DRAINING, State.LEAVING)
