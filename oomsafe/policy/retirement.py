"""A worker that was recycled: what it had done, and what its memory was at its end and before. Pure, and small: each worker imports it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from oomsafe.policy.stock import Parts

if TYPE_CHECKING:
    from oomsafe.policy.objects import Objects

#: The most points of a worker's life.
POINTS = 12


class Point(NamedTuple):
    """What a worker held when it had done so many pieces of work, and has not given back since."""

    work: int
    held: int
    """In bytes, without clean file pages."""


@dataclass(frozen=True, kw_only=True)
class Retirement:
    """A worker that was recycled, at its end. Sizes in bytes; None: not known."""

    at: float
    """Seconds since 1970."""
    pid: int
    slot: int
    generation: int
    reason: str
    work: int
    """How many pieces of work it had done."""
    served: float
    """For how many seconds."""
    fresh: int | None
    """What it held when it began to serve, without clean file pages."""
    parts: Parts
    points: tuple[Point, ...] = ()
    """Earlier in its life, the oldest first."""
    objects: Objects | None = None
    """What it held, by objects; None: they were not looked at."""

    @property
    def grown(self) -> int | None:
        """What it has grown by since it was fresh."""
        return None if self.fresh is None else self.parts.total - self.parts.files - self.fresh
