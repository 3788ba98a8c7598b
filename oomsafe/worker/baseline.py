"""What a worker has when it is ready, to tell at its end what has grown since: threads, descriptors, and objects where they are wanted."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, NamedTuple

from oomsafe.kernel.handles import Handles, own_handles
from oomsafe.kernel.process import shared_with_parent
from oomsafe.policy.units import MIB

if TYPE_CHECKING:
    from oomsafe.policy.objects import Cache, Container
    from oomsafe.scoreboard.header import Header
    from oomsafe.worker.census import Census

#: Seconds that counting objects may take at most, about. It takes 20 to 30 ms with 300 000 objects, 30 to 40 with Django's admin.
LONGEST = 0.1

#: A worker that shares more than this with its parent does not count its objects when it is ready: to look at an object is to write to its
#: page (its reference count), of which the worker then has a copy.
MOST_SHARED = 32 * MIB


#: The share of its budget that a pool may hold.
MOST_HELD = 0.75


class Baseline(NamedTuple):
    """What a worker had when it was ready."""

    handles: Handles
    types: dict[str, int] | None = None
    """How many objects of a type; None: they were not counted. Types that are not here had few."""
    names: dict[str, int] | None = None
    """How many entries a container or a cache had; None: not known. Those that are not here had few, but for the standard library's."""
    modules: int | None = None


class Beginning(NamedTuple):
    """A worker when it began to serve."""

    at: float
    """On the monotonic clock."""
    held: int | None
    """Bytes, as its meter counts; None: not known."""
    baseline: Baseline | None
    """What else it had; None: not known."""


def baseline_of(header: Header | None) -> Baseline:
    """This worker's, on whose scoreboard this is the header; None: on none.

    Objects are counted only in a pool that has recycled a worker before: others pay nothing for it. Nor are they where the pool waits for
    this worker, because it holds most of its budget.
    """
    handles = own_handles()
    if header is None or not header.retirements or header.held_share > MOST_HELD or not can_count_objects():
        return Baseline(handles)
    if (shared_with_parent() or 0) > MOST_SHARED:
        return Baseline(handles)
    from oomsafe.worker.census import take_baseline  # imported here: only a worker of such a pool pays for it

    return _of_census(handles, take_baseline(LONGEST))


def _of_census(handles: Handles, census: Census) -> Baseline:
    types = None if census.tracked is None else {each.name: each.count for each in census.types}
    named: list[Container | Cache] = [*census.containers, *census.caches]
    names = {each.name: each.entries for each in named} if census.complete else None
    return Baseline(handles, types, names, census.modules)


def can_count_objects() -> bool:
    """Whether this Python lists its objects, and counts references to them."""
    return sys.implementation.name == "cpython"
