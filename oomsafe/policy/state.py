"""What a worker does: the same names in code, on the scoreboard, in `oomsafe status` and in the metrics."""

from __future__ import annotations

from enum import Enum


class State(str, Enum):
    """Of a worker, as its pool sees it. On the scoreboard it is its place in this order, so a new one goes to the end."""

    FREE = "free"
    """No worker is there."""
    STARTING = "starting"
    """It boots."""
    SERVING = "serving"
    WAITING = "waiting"
    """It serves, is over its limit or soon will be, and asks to be replaced."""
    DRAINING = "draining"
    """It takes nothing new, and has work to finish: that may take long."""
    LEAVING = "leaving"
    """It has no work any more: it is gone in a moment."""

    def __str__(self) -> str:
        return self.value

    def __format__(self, spec: str) -> str:  # Python 3.10 and 3.12 differ
        return format(self.value, spec)

    @property
    def serves(self) -> bool:
        """Whether it takes work."""
        return self in (State.SERVING, State.WAITING)

    @property
    def leaves(self) -> bool:
        """Whether it is on its way out."""
        return self in (State.DRAINING, State.LEAVING)
