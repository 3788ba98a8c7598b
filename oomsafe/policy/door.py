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
CHECKS_AFTER, AT_THE_LATEST = 0.5, 16 * MIB

#: The most bytes that a worker takes while it ends: servers' own shutdown code was measured to take 5 to 6 MiB.
ENDING_TAKES = 8 * MIB

#: Seconds within which a door takes effect once there is no room: the time between two checks, and for work already inside to finish.
SHUTS_WITHIN = 0.05

#: A worker that is above its soft limit by this share, and grows fast, makes work wait for its replacement.
ABOVE = 0.05

#: The kernel's limit is near if less than this share of it is left, or these bytes: about what requests that have begun still take.
NEAR, NEAR_AT_MOST = 0.02, 64 * MIB

#: The least and the most seconds for which work is shed in a row. Afterwards, if it was in vain, some is let in for RESTS_FOR.
SHEDS_AT_LEAST, SHEDS_FOR = 1.0, 30.0

#: Seconds within which another worker must leave or boot: otherwise nothing gives memory back, and shedding would never end.
HELPS_WITHIN = 3.0


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
    limit: int | None = None
    """The kernel's limit, in bytes; None: not known."""


class Shedding(NamedTuple):
    """Whether one worker sheds new work. Times in seconds, on the clock of `now`."""

    since: float | None = None
    """Since when; None: it does not."""
    growth: Growth = Growth()
    """The fastest growth since then."""
    helped_at: float = 0.0
    """When another worker was last known to leave or to boot."""
    spent_at: float | None = None
    """When it ended in vain; None: it has not."""


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


def next_shedding(shedding: Shedding, waits: bool, crowd: Crowd, growth: Growth, now: float) -> Shedding:
    """Whether new work is shed from now on. `waits`: it waits already for a worker that leaves.

    It begins when the kernel's limit is near, and waiting does not help or has not helped. It ends when there is more room than that, and
    also if no other worker leaves or boots, or it lasts too long: then it is not what the pool needs.
    """
    growth = growth.at_least(shedding.growth)
    near = min(int((crowd.limit or 0) * NEAR), NEAR_AT_MOST)
    # not what booting workers still take: most of that is there already, and no request would be shed for it that does no harm
    soon = growth.burst * max(1, crowd.serving) * SHUTS_WITHIN
    if shedding.since is None:
        if shedding.spent_at is not None and now - shedding.spent_at < RESTS_FOR:
            return shedding
        out = crowd.room is not None and crowd.room < max(near, soon)
        return Shedding(now, growth, now) if out and not waits else Shedding()
    helped_at = now if crowd.leaving or crowd.starting else shedding.helped_at
    if crowd.room is not None and crowd.room >= soon + 2 * near and now - shedding.since >= SHEDS_AT_LEAST:
        return Shedding()
    if now - helped_at >= HELPS_WITHIN or now - shedding.since >= SHEDS_FOR:
        return Shedding(spent_at=now)
    return shedding._replace(growth=growth, helped_at=helped_at)


def checks_from(held: int, room: int | None, workers: int) -> int | None:
    """Bytes held at which a worker checks its pool's `room` again, given that it holds `held` now; None if `room` is not known."""
    return None if room is None else held + min(AT_THE_LATEST, int(max(0, room) * CHECKS_AFTER / max(1, workers)))
