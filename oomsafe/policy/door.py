"""Whether a worker keeps new work waiting for the memory that another is about to give back. Pure.

A pool that leaks at full speed fills what is left of its limit within a tenth of a second; a worker that drains takes longer to be gone.
"""

from __future__ import annotations

from typing import NamedTuple

from oomsafe.policy.recycle import outruns
from oomsafe.policy.trend import Growth
from oomsafe.policy.units import MIB

#: Seconds that work waits at most, and that a door stays shut: less than the one second that Kubernetes gives a probe.
WAITS_FOR = 0.8

#: Seconds for which a door that has waited in vain stays open, whatever comes: room that comes and goes is no reason to wait over and over.
RESTS_FOR = 10.0

#: A worker looks at the room that is left after it has grown by this share of its part in it, and by so many bytes at the latest: to
#: touch them takes the kernel twenty times as long as the look.
LOOKS_AFTER, AT_THE_LATEST = 0.5, 16 * MIB

#: Bytes that a worker takes at most while it ends: 5 to 6 MiB were seen, of a server's own shutting down.
ENDING_TAKES = 8 * MIB

#: Seconds within which a door is shut once there is no room: between two looks, and until what has passed it is done.
SHUTS_WITHIN = 0.05

#: A worker that is above its soft limit by this share, and grows fast, lets work wait for the one that takes its place.
ABOVE = 0.05


class Door(NamedTuple):
    """One worker's. Times in seconds, on the clock of `now`."""

    shut_at: float | None = None
    """Since when new work waits; None: it does not."""
    growth: Growth = Growth()
    """How fast it grew at most since that began: who waits does not grow."""
    spent_at: float | None = None
    """When it had waited as long as it may, and what it waited for had not come."""


class Crowd(NamedTuple):
    """What there is to know of the pool's memory, and of the others."""

    room: int | None = None
    """Bytes up to the kernel's limit; None where that is not known."""
    full: bool = False
    """The budget does not hold one more worker that grows as this one does."""
    serving: int = 1
    """How many workers take work, this one included."""
    leaving: int = 0
    """How many others drain or leave."""
    starting: int = 0
    """How many others boot."""
    fresh: int = 0
    """What one of those needs, in bytes."""


def next_door(door: Door, crowd: Crowd, limit: int | None, used: int, growth: Growth, now: float) -> Door:
    """What becomes of the door of a worker that uses so many bytes of this soft limit; None: it has none.

    While nobody leaves, and nobody boots, nothing would come of waiting.
    """
    growth = growth.at_least(door.growth)
    soon = growth.burst * max(1, crowd.serving) * SHUTS_WITHIN + crowd.starting * crowd.fresh + crowd.leaving * ENDING_TAKES
    out = crowd.room is not None and crowd.room < soon
    above = crowd.full and limit is not None and used > limit * (1 + ABOVE) and outruns(limit, growth.burst)
    if not (out and growth.burst) and not above:
        return door._replace(shut_at=None) if door.spent_at is not None and now - door.spent_at < RESTS_FOR else Door()
    if door.spent_at is not None or not (crowd.leaving or (above and crowd.starting)):
        return door._replace(shut_at=None)
    if door.shut_at is None:
        return Door(now, growth)
    return door._replace(growth=growth) if now - door.shut_at < WAITS_FOR else Door(None, growth, now)


def looks_from(held: int, room: int | None, workers: int) -> int | None:
    """Bytes held from which a worker looks again at the `room` that its pool has; None where that is not known."""
    return None if room is None else held + min(AT_THE_LATEST, int(max(0, room) * LOOKS_AFTER / max(1, workers)))
