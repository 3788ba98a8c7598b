"""When a worker tries to give memory back, and how much of its heap it walks for that. Pure."""

from __future__ import annotations

from oomsafe.policy.units import MIB

#: Seconds between two attempts to reclaim, at least.
RECLAIM_EVERY = 10.0

#: An attempt that gave back less than this share of what the worker was over its limit by was futile,
WORTHWHILE = 0.5

#: and so was one that gave back less than this many bytes.
LEAST = MIB

#: The wait after a futile attempt doubles with each, this many times: up to 640 s.
DOUBLES = 6

#: Blocks of Python's allocator that a full collection may walk while other work waits: 0.1 us each at most, so 0.05 s in all.
WALKED_AT_MOST = 500_000

#: Bytes shared with a parent from which they must not be written to. Every fork shares a little.
SHARED_MUCH = 32 * MIB

#: gc's own numbers: all of the heap, and what has not lived long. The latter takes less than a millisecond.
FULL, YOUNG = 2, 1


def due(reclaimed_at: float | None, futile: int, now: float) -> bool:
    """Whether an attempt may be made at `now`: the last ended at `reclaimed_at` (None: none was made), `futile` in a row were futile."""
    return reclaimed_at is None or now - reclaimed_at >= RECLAIM_EVERY * 2 ** min(futile, DOUBLES)


def futile_after(futile: int, over: int, freed: int) -> int:
    """How many attempts in a row were futile, with one more that was to give back `over` bytes and gave back `freed`."""
    return futile + 1 if freed < max(LEAST, over * WORTHWHILE) else 0


def generation(blocks: int, others_wait: bool, shared: int) -> int:
    """The oldest generation that may be collected.

    A collection writes to the header of every object that it walks and holds the GIL meanwhile. So
    the old ones are left alone where that would copy `shared` bytes that a parent has too, and where
    others wait and the worker has too many `blocks`. What is lost then: garbage that is a cycle and has lived long.
    """
    return YOUNG if shared >= SHARED_MUCH or (others_wait and blocks > WALKED_AT_MOST) else FULL
