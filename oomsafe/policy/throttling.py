"""When it is said that the kernel throttles a pool at memory.high. Pure."""

from __future__ import annotations

from typing import NamedTuple

#: Above memory.high, the share of the time in which some process of the pool waited for memory, from which on that matters: reclaiming
#: page cache there is the kernel's usual work, and takes next to no time.
STALLED = 0.05

#: Where that is not known (no PSI), the share of memory.high that can't be dropped from which on it matters.
FULL = 0.95

#: Seconds for which that must be so, until it is said; and seconds without it, after which an episode is over.
LASTS, CALM = 2.0, 30.0


class Episode(NamedTuple):
    """A time in which a pool is throttled. Seconds on the clock of `now`."""

    since: float
    last: float
    """When it was last so."""
    said: bool = False


def is_throttled(breaches: int, stalled: float | None, undroppable: int | None, high: int) -> bool:
    """Whether the pool is slowed down there now.

    `breaches`: how often memory.high was passed since the last check; `stalled`: the share of the time since then in which some process of
    the pool waited for memory, None: not known; `undroppable`: bytes below that level that the kernel can't drop, None: not known.
    """
    if not breaches:
        return False
    if stalled is not None:
        return stalled >= STALLED
    return undroppable is not None and undroppable >= high * FULL


def follow(episode: Episode | None, throttled: bool, now: float) -> tuple[Episode | None, bool]:
    """The next episode (None: there is none), and whether it is to be said now, which is once in each."""
    if not throttled:
        return (None if episode is None or now - episode.last >= (CALM if episode.said else LASTS) else episode), False
    if episode is None:
        return Episode(now, now), False
    says = not episode.said and now - episode.since >= LASTS
    return Episode(episode.since, now, episode.said or says), says
