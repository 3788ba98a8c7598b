"""How far the last probe of a pool is. Pure, and small: each worker imports it."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple


class Stage(IntEnum):
    """How far the last probe of a pool is."""

    NONE = 0
    TRACES = 1
    """The worker traces its allocations."""
    ENDS = 2
    """It has traced enough, and finishes its work so that what is still alive can be counted."""
    DONE = 3
    """It has found a line that leaks."""
    FAILED = 4
    NOTHING = 5
    """It has found none."""

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come of it."""
        return self not in (Stage.TRACES, Stage.ENDS)


class Probed(NamedTuple):
    """The last probe of a pool, as its scoreboard shows it."""

    at: float
    """When this was written, seconds since 1970."""
    pid: int
    generation: int
    stage: Stage
    text: str
    """What it is about to do, has found, or why it failed; printable."""
    path: str
    """Where its report lies; empty: nowhere. Written by a worker: not to be trusted."""
