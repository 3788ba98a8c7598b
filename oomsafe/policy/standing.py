"""Which capacity is in force while what the kernel allows moves: less holds at once, more once it has lasted. Pure."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

from oomsafe.policy.limits import Capacity

#: Seconds for which there must have been more room, all the time, before a pool counts on it: a limit may flicker.
LASTS = 10.0

#: By less than this share of its room, what others use moves all the time.
STILL = 1 / 32


class Standing(NamedTuple):
    """What a pool reckons with. Times in seconds, on the clock of `now`."""

    capacity: Capacity
    more: Capacity | None = None
    """The least that was seen since there has been more room than that; None: there is not."""
    since: float = 0.0


def follow(standing: Standing, seen: Capacity, now: float) -> Standing:
    """The same, or another, now that `seen` is what the kernel allows."""
    before = standing.capacity
    if _is_as_before(before, seen):
        return Standing(before)
    if _room(seen) <= _room(before):
        return Standing(seen)
    least = seen if standing.more is None or _room(seen) <= _room(standing.more) else standing.more
    since = now if standing.more is None else standing.since
    return Standing(least) if now - since >= LASTS else Standing(before, least, since)


def in_force(standing: Standing, seen: Capacity) -> Capacity:
    """`seen`, with the limit and the others that the pool reckons with: whose use is the pool's own, is that of now."""
    room = standing.capacity
    if _room(seen) < _room(room):
        return seen  # by less than would have the pool reckon anew
    held = None if seen.held is None else seen.held + (room.others or 0)
    return replace(
        seen, limit=room.limit, source=room.source, others=room.others, smallest=room.smallest, unseen=room.unseen, working_set=held
    )


def is_another_limit(before: Capacity, after: Capacity) -> bool:
    """Whether a limit was set anew, so that what was learnt under the old one holds no more. What others use is no limit."""
    return (before.smallest, before.limit is None) != (after.smallest, after.limit is None) or (
        before.source == after.source and before.limit != after.limit
    )


def reckons_as(before: Capacity, after: Capacity) -> bool:
    """Whether what limits are worked out from has hardly moved."""
    grown = abs((after.supervisor or 0) - (before.supervisor or 0))
    return _is_as_before(before, after) and grown <= _room(before) * STILL


def _is_as_before(before: Capacity, seen: Capacity) -> bool:
    same = (before.limit, before.source, before.smallest) == (seen.limit, seen.source, seen.smallest)
    return same and (before.limit is None or abs(_room(seen) - _room(before)) < _room(before) * STILL)


def _room(capacity: Capacity) -> float:
    return math.inf if capacity.room is None else capacity.room
