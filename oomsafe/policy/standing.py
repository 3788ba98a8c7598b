"""Which capacity is in force while the kernel's limits move: less takes effect at once, more only after it has lasted. Pure."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

from oomsafe.policy.limits import Capacity

#: Seconds for which there must continuously be more room before a pool relies on it: a limit may flicker.
LASTS = 10.0

#: What others use fluctuates by less than this share of the pool's room all the time; smaller changes are ignored.
STILL = 1 / 32


class Standing(NamedTuple):
    """The capacity that a pool relies on. Times in seconds, on the clock of `now`."""

    capacity: Capacity
    more: Capacity | None = None
    """The smallest capacity measured since there has been more room than `capacity` has; None: there has not."""
    since: float = 0.0
    """Since when, if `more` is not None."""


def follow(standing: Standing, measured: Capacity, now: float) -> Standing:
    """The next standing, given what the kernel allows now."""
    before = standing.capacity
    if _is_as_before(before, measured):
        return Standing(before)
    if _room(measured) <= _room(before):
        return Standing(measured)
    least = measured if standing.more is None or _room(measured) <= _room(standing.more) else standing.more
    since = now if standing.more is None else standing.since
    return Standing(least) if now - since >= LASTS else Standing(before, least, since)


def in_force(standing: Standing, measured: Capacity) -> Capacity:
    """`measured`, but with the standing limit and the standing use by others; the pool's own use is the measured one."""
    room = standing.capacity
    if _room(measured) < _room(room):
        return measured  # the difference is too small for follow(), but less always takes effect
    held = None if measured.held is None else measured.held + (room.others or 0)
    return replace(
        measured, limit=room.limit, source=room.source, others=room.others, smallest=room.smallest, unseen=room.unseen, working_set=held
    )


def is_another_limit(before: Capacity, after: Capacity) -> bool:
    """Whether a limit itself was changed, which invalidates what was learnt under the old one. What others use does not count."""
    return (before.smallest, before.limit is None) != (after.smallest, after.limit is None) or (
        before.source == after.source and before.limit != after.limit
    )


def reckons_as(before: Capacity, after: Capacity) -> bool:
    """Whether the inputs of the limits have hardly changed."""
    grown = abs((after.supervisor or 0) - (before.supervisor or 0))
    return _is_as_before(before, after) and grown <= _room(before) * STILL


def _is_as_before(before: Capacity, after: Capacity) -> bool:
    same = (before.limit, before.source, before.smallest) == (after.limit, after.source, after.smallest)
    return same and (before.limit is None or abs(_room(after) - _room(before)) < _room(before) * STILL)


def _room(capacity: Capacity) -> float:
    return math.inf if capacity.room is None else capacity.room
