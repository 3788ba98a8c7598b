"""When a worker tries to give memory back, and how much of its heap the collector walks. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from oomsafe.policy.units import MIB

#: The least seconds between two attempts to reclaim.
RECLAIM_EVERY = 10.0

#: An attempt is futile if it gave back less than this share of the worker's excess over its limit,
WORTHWHILE = 0.5

#: or less than this many bytes.
LEAST = MIB

#: The wait doubles with each futile attempt, this many times at most: up to 640 s.
DOUBLES = 6

#: A worker that has had no work for so many seconds is idle. The work that comes then pays for the pages that were given back: about
#: half again as much as without, while it fills them.
IDLE_FOR = 5.0

#: The least bytes that an attempt of an idle worker must give back to pay, and that it must have grown by,
LEAST_WHEN_IDLE = 8 * MIB

#: and the most seconds of a CPU that it may take: a trim takes 8 ms for each 100 MiB that it gives back.
LONGEST_WHEN_IDLE = 0.1

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


def due_when_idle(idle: float, grown: int, reclaimed_at: float | None, futile: int, now: float) -> bool:
    """Whether a worker below its limit should try at `now`, because it has had no work for `idle` seconds.

    `grown`: bytes beyond what it held when it was fresh. The last attempt while it was idle ended at `reclaimed_at`; see due().
    """
    return idle >= IDLE_FOR and grown >= LEAST_WHEN_IDLE and due(reclaimed_at, futile, now)


def futile_when_idle(futile: int, freed: int, took: float) -> int:
    """The new number of futile attempts in a row, after one of an idle worker that gave back `freed` bytes and ran for `took` seconds.

    One that took long is not made again soon, whatever it gave back: work that had come meanwhile would have waited.
    """
    if took > LONGEST_WHEN_IDLE:
        return DOUBLES
    return futile + 1 if freed < LEAST_WHEN_IDLE else 0


def pays(attempts: int, freed: int) -> bool:
    """Whether so many attempts have given back enough, in the mean; `freed`: bytes of all. False: there were none."""
    return attempts > 0 and freed >= attempts * LEAST_WHEN_IDLE


def would_pay(trimmed: Sequence[int]) -> bool:
    """Whether a trim has given back enough in at least half of these workers, at their ends. In bytes; False: there were none."""
    return bool(trimmed) and 2 * sum(freed >= LEAST_WHEN_IDLE for freed in trimmed) >= len(trimmed)


def generation(blocks: int, others_wait: bool, shared: int) -> int:
    """The oldest generation to collect.

    A collection writes to the header of every object that it walks, and holds the GIL meanwhile. So
    old objects are left alone if that would copy `shared` bytes that a parent has too, or if
    other work waits and the worker has too many `blocks`. The cost: cyclic garbage that has lived long stays.
    """
    return YOUNG if shared >= SHARED_MUCH or (others_wait and blocks > WALKED_AT_MOST) else FULL
