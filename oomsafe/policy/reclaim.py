"""When a worker tries to give memory back, and how much of its heap the collector walks. Pure."""

from __future__ import annotations

from oomsafe.policy.units import MIB

#: The least seconds between two attempts to reclaim.
RECLAIM_EVERY = 10.0

#: An attempt is futile if it gave back less than this share of the worker's excess over its limit,
WORTHWHILE = 0.5

#: or less than this many bytes.
LEAST = MIB

#: The wait doubles with each futile attempt, this many times at most: up to 640 s.
DOUBLES = 6

#: Blocks of Python's allocator that a full collection may walk while other work waits: at most 0.1 us each, so 0.05 s in all.
WALKED_AT_MOST = 500_000

#: From this many bytes on, memory shared with a parent must not be written to. Every fork shares a little.
SHARED_MUCH = 32 * MIB

#: gc's generation numbers: the whole heap, and only the young objects. The latter takes less than a millisecond.
FULL, YOUNG = 2, 1


def due(reclaimed_at: float | None, futile: int, now: float) -> bool:
    """Whether to try at `now`. The last attempt ended at `reclaimed_at` (None: there was none); the last `futile` attempts were futile."""
    return reclaimed_at is None or now - reclaimed_at >= RECLAIM_EVERY * 2 ** min(futile, DOUBLES)


def futile_after(futile: int, over: int, freed: int) -> int:
    """The new number of futile attempts in a row, after one that should have given back `over` bytes and gave back `freed`."""
    return futile + 1 if freed < max(LEAST, over * WORTHWHILE) else 0


def generation(blocks: int, others_wait: bool, shared: int) -> int:
    """The oldest generation to collect.

    A collection writes to the header of every object that it walks, and holds the GIL meanwhile. So
    old objects are left alone if that would copy `shared` bytes that a parent has too, or if
    other work waits and the worker has too many `blocks`. The cost: cyclic garbage that has lived long stays.
    """
    return YOUNG if shared >= SHARED_MUCH or (others_wait and blocks > WALKED_AT_MOST) else FULL
