"""What one worker's memory was while it served, because an operator asked for it. Pure, and small: each worker imports it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING

from oomsafe.policy.stock import Parts

if TYPE_CHECKING:
    from oomsafe.policy.objects import Objects

#: The most characters of an inspection's text.
TEXT = 256


class Phase(IntEnum):
    """How far the last inspection of a pool is."""

    NONE = 0
    COUNTS = 1
    """The worker has forked, and the fork counts."""
    DONE = 2
    FAILED = 3
    """It was refused by the worker, or has failed: the text says why."""
    UNTAKEN = 4
    """The worker has not taken the order in time."""

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come of it."""
        return self is not Phase.COUNTS


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """The last inspection of a pool's worker. Sizes in bytes; None: not known."""

    at: float
    """When this was written, seconds since 1970."""
    pid: int
    slot: int
    generation: int
    phase: Phase
    text: str = ""
    """Why there are no figures; printable. Empty: there are."""
    work: int = 0
    """How many pieces of work it had done."""
    served: float = 0.0
    """For how many seconds."""
    fresh: int | None = None
    """What it held when it began to serve, without clean file pages."""
    parts: Parts = field(default_factory=Parts)
    """`malloc_kept` is what a trim would have given back."""
    stopped: float | None = None
    """For how many seconds the worker stood still to fork."""
    took: float | None = None
    """How many seconds the fork has counted."""
    objects: Objects | None = None
    """What it held, by objects; None: they were not looked at."""

    @property
    def grown(self) -> int | None:
        """What it has grown by since it was fresh."""
        return None if self.fresh is None else self.parts.total - self.parts.files - self.fresh
