"""Leak, or memory that the allocators keep? Judged from what the last workers of a pool held when they were recycled. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from oomsafe.policy.objects import keeper
from oomsafe.policy.retirement import Retirement
from oomsafe.policy.units import MIB, counted, format_size

#: A worker that has grown by less than this, or by less than this share of what it held when it was fresh, tells nothing.
GROWN, GROWN_SHARE = 16 * MIB, 0.1

#: Growth of which this share is free memory is what the allocators keep.
MOSTLY_KEPT = 0.5

#: Growth of which this share was there after so much of the work, and after few pieces of it, was needed at once.
AT_ONCE, EARLY, FEW = 0.8, 0.05, 3

#: Growth of which this share was there at half of the work has levelled off; between the other two it has gone on all the time.
LEVELLED, ON_AND_ON = 0.8, (0.3, 0.7)

#: Retirements that must agree: for a leak, and for anything else.
FOR_A_LEAK, FOR_OTHERS = 3, 2

#: A worker that has done less work than this does not tell a leak from what it needs at once.
LEAST_WORK = 10

#: The growth for each piece of work, of the different workers, must lie this close together: the standard deviation over the mean.
ALIKE = 0.5


class Kind(Enum):
    """What a pool's workers grow by."""

    LEAK = "leak"
    """It rises with the work done."""
    KEPT = "kept"
    """It is free memory that the allocators keep."""
    CACHE = "cache"
    """It levels off."""
    NEEDED = "needed"
    """It was there after the first pieces of work."""
    UNKNOWN = "unknown"


@dataclass(frozen=True, kw_only=True)
class Retention:
    """The judgement, and what it was made from."""

    kind: Kind
    workers: int
    """How many retirements it was made from."""
    why: str
    """In figures; a sentence without its full stop."""
    help: str = ""
    """What would help here; empty: nothing to say."""
    each: int | None = None
    """For a leak: bytes for each piece of work."""
    give_or_take: int | None = None
    """Half of the interval in which it lies with 95 % confidence, in bytes; None: not known."""

    @property
    def brief(self) -> str:
        """In a few words; empty: not known."""
        if self.each is not None:
            return f"leaks {format_size(self.each)} each"
        words = {Kind.KEPT: "free memory is kept", Kind.CACHE: "levels off", Kind.NEEDED: "needed at once"}
        return f"no leak: {words[self.kind]}" if self.kind in words else ""


def judge(retired: Sequence[Retirement], unit: str = "pieces of work") -> Retention:
    """What the last workers have grown by. `unit`: what they count, in the plural."""
    grown = [each for each in retired if _has_grown(each)]
    if not grown:
        return Retention(kind=Kind.UNKNOWN, workers=0, why=f"no recycled worker has grown by {format_size(GROWN)} yet")
    kept = [each for each in grown if (_kept_share(each) or 0.0) >= MOSTLY_KEPT]
    if len(kept) > len(grown) / 2:
        return _enough(_kept(kept), FOR_OTHERS, grown)
    live = [each for each in grown if each not in kept and each.work >= LEAST_WORK]
    if len(live) < (len(grown) - len(kept)) / 2:
        why = f"most workers were recycled after less than {LEAST_WORK} {unit}: that does not tell a leak from what they need"
        return Retention(kind=Kind.UNKNOWN, workers=len(grown), why=why)
    early = [each for each in live if (each.share_at(max(FEW, each.work * EARLY)) or 0.0) >= AT_ONCE]
    if len(early) > len(live) / 2:
        return _enough(_needed(early, unit), FOR_OTHERS, grown)
    halves = [share for each in live if (share := each.share_at(each.work / 2)) is not None]
    if halves and statistics.median(halves) >= LEVELLED:
        return _enough(_levelled(live, halves), FOR_OTHERS, grown)
    if halves and all(ON_AND_ON[0] <= share <= ON_AND_ON[1] for share in halves):
        return _enough(_leak(live, unit), FOR_A_LEAK, grown)
    why = f"the growth of {counted(len(live), 'workers')} has no shape that tells: at half of their work they had {_percents(halves)} of it"
    return Retention(kind=Kind.UNKNOWN, workers=len(grown), why=why)


def _has_grown(one: Retirement) -> bool:
    return one.grown is not None and one.grown >= max(GROWN, GROWN_SHARE * (one.fresh or 0))


def _kept_share(one: Retirement) -> float | None:
    return None if one.parts.kept is None or not one.grown else one.parts.kept / one.grown


def _enough(found: Retention, least: int, grown: Sequence[Retirement]) -> Retention:
    """`found`, if it was made from enough retirements."""
    if found.kind is Kind.UNKNOWN or found.workers >= least:
        return found
    why = f"{counted(found.workers, 'workers')} of the {least} that it takes: so far it looks like {found.kind.value}, {found.why}"
    return Retention(kind=Kind.UNKNOWN, workers=len(grown), why=why)


def _kept(kept: Sequence[Retirement]) -> Retention:
    by_python = sum(each.parts.python_kept or 0 for each in kept)
    by_malloc = sum((each.parts.malloc_kept or 0) + (each.parts.malloc_stuck or 0) for each in kept)
    share = statistics.median(_kept_share(each) or 0.0 for each in kept)
    who, helps = (
        ("Python's allocator", "have the work hold less at a time; recycling gives it back, a trim does not")
        if by_python >= by_malloc
        else ("malloc", "fewer arenas (MALLOC_ARENA_MAX=2), or another malloc (jemalloc, mimalloc by LD_PRELOAD)")
    )
    why = f"{min(1.0, share):.0%} of the growth is free memory that {who} keeps"
    return Retention(kind=Kind.KEPT, workers=len(kept), why=why, help=helps)


def _needed(early: Sequence[Retirement], unit: str) -> Retention:
    size = format_size(round(statistics.median(each.grown or 0 for each in early)))
    why = f"{size} came with the first {unit}, and little since"
    return Retention(kind=Kind.NEEDED, workers=len(early), why=why, help="a soft limit above that: oomsafe advise")


def _levelled(live: Sequence[Retirement], halves: Sequence[float]) -> Retention:
    why = f"at half of their work the workers had {_percents(halves)} of their growth: it levels off"
    return Retention(kind=Kind.CACHE, workers=len(live), why=why, help="a soft limit above the level, or a smaller cache")


def _leak(live: Sequence[Retirement], unit: str) -> Retention:
    each = [((one.grown or 0) - (one.parts.kept or 0)) / one.work for one in live if one.work]
    mean = statistics.fmean(each) if each else 0.0
    spread = statistics.stdev(each) if len(each) > 1 else 0.0
    if mean <= 0 or spread > ALIKE * mean:
        why = f"the growth of {counted(len(live), 'workers')} goes on and on, and is not alike for {unit}"
        return Retention(kind=Kind.UNKNOWN, workers=len(live), why=why)
    # the standard error, times Student's t for few samples
    band = round(spread / math.sqrt(len(each)) * _T.get(len(each) - 1, 2.0)) if len(each) > 1 else None
    one = unit.removesuffix("s") if " " not in unit else unit.replace("s ", " ", 1)
    plus = f" (± {format_size(band)})" if band is not None else ""
    why = f"memory in use rises by {format_size(round(mean))}{plus} a {one}, over all of the workers' lives"
    who = keeper(one.objects for one in live)
    helps = f"it is a leak, or a cache without a bound: {who + '; ' if who else ''}oomsafe probe names the line"
    return Retention(kind=Kind.LEAK, workers=len(live), why=why, help=helps, each=round(mean), give_or_take=band)


#: Student's t for 95 % confidence, by degrees of freedom.
_T = {
    1: 12.7,
    2: 4.3,
    3: 3.18,
    4: 2.78,
    5: 2.57,
    6: 2.45,
    7: 2.36,
    8: 2.31,
    9: 2.26,
    10: 2.23,
    11: 2.2,
    12: 2.18,
    13: 2.16,
    14: 2.14,
    15: 2.13,
}


def _percents(shares: Sequence[float]) -> str:
    if not shares:
        return "an unknown share"
    least, most = min(shares), max(shares)
    return f"{least:.0%}" if round(least, 2) == round(most, 2) else f"{least:.0%} to {most:.0%}"
