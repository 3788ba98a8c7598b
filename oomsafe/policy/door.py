"""Whether a worker makes new work wait for the memory that another worker is about to give back. Pure.

A pool that leaks at full speed fills the rest of its limit within a tenth of a second; a draining worker takes longer to be gone.
"""

from __future__ import annotations

from typing import NamedTuple

from oomsafe.policy.recycle import outruns
from oomsafe.policy.trend import Growth
from oomsafe.policy.units import MIB

#: The most seconds that work waits, and that a door stays shut: less than the one second that Kubernetes gives a probe.
WAITS_FOR = 0.8

#: Seconds for which a door that waited in vain stays open, whatever happens: fluctuating room must not make work wait again and again.
RESTS_FOR = 10.0

#: A worker checks the remaining room after it has grown by this share of its part of it, or by this many bytes, whichever is less:
#: touching these bytes takes the kernel twenty times as long as the check.
LOOKS_AFTER, AT_THE_LATEST = 0.5, 16 * MIB

#: The most bytes that a worker takes while it ends: servers' own shutdown code was measured to take 5 to 6 MiB.
ENDING_TAKES = 8 * MIB

#: Seconds within which a door takes effect once there is no room: the time between two checks, and for work already inside to finish.
SHUTS_WITHIN = 0.05

#: A worker that is above its soft limit by this share, and grows fast, makes work wait for its replacement.
ABOVE = 0.05


class Door(NamedTuple):
    """One worker's door. Times in seconds, on the clock of `now`."""

    shut_at: float | None = None
    """Since when new work waits; None: it does not."""
    growth: Growth = Growth()
    """The fastest growth since then, because a worker whose work waits does not grow."""
    spent_at: float | None = None
    """When the door had been shut for as long as allowed, in vain; None: it has not."""


class Crowd(NamedTuple):
    """The pool's memory, and its other workers."""

    room: int | None = None
    """Bytes left up to the kernel's limit; None: not known."""
    full: bool = False
    """The budget does not hold one more worker that grows as this one does."""
    serving: int = 1
    """How many workers take work, including this one."""
    leaving: int = 0
    """How many others drain or leave."""
    starting: int = 0
    """How many others boot."""
    fresh: int = 0
    """What a booting worker needs, in bytes."""


def next_door(door: Door, crowd: Crowd, limit: int | None, used: int, growth: Growth, now: float) -> Door:
    """The next door of a worker that uses `used` bytes; `limit` is its soft limit (None: it has none).

    While no other worker leaves or boots, waiting would be pointless.
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
    """Bytes held at which a worker checks its pool's `room` again, given that it holds `held` now; None if `room` is not known."""
    return None if room is None else held + min(AT_THE_LATEST, int(max(0, room) * LOOKS_AFTER / max(1, workers)))
