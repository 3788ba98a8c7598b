"""Leak, or memory that the allocators keep? Judged from what the last workers of a pool held when they were recycled. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from oomsafe.policy.curve import FEW, Shape, shape_of
from oomsafe.policy.objects import keeper
from oomsafe.policy.retirement import Retirement
from oomsafe.policy.units import MIB, counted, format_size, one_of

#: A worker that has grown by less than this, or by less than this share of what it held when it was fresh, tells nothing.
GROWN, GROWN_SHARE = 16 * MIB, 0.1

#: Growth of which this share is free memory is what the allocators keep.
MOSTLY_KEPT = 0.5

#: But if this share of it is in use, too, and the growth goes on, then it may leak besides.
A_LOT = 0.3

#: Growth of which this share came in one jump was needed at once; and so was less, if the rest is too little to tell anything.
AT_ONCE, MOSTLY_AT_ONCE = 0.8, 0.5

#: Growth of which this share was there at half of the work has levelled off.
LEVELLED = 0.8

#: Growth goes on if the second half of the work adds at least so many times what the first half has added, and at most so many times: in
#: the median of the workers, and in each of them. Both without the warm-up.
GOES_ON, EACH_GOES_ON = (0.6, 1.7), (0.35, 3.0)

#: And if at most this share of it came in a few jumps.
LUMPY = 0.6

#: And if the last tenth of the work adds at least so many times what a tenth has added: else the end of the growth was in sight.
UNTIL_THE_END = 0.5

#: The share of the workers whose growth must go on for a leak.
MOST = 2 / 3

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
    """It came in one jump, with a few pieces of work: a model that is loaded when it is first needed."""
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


@dataclass(frozen=True)
class _Life:
    """A worker that has grown, and how."""

    one: Retirement
    shape: Shape

    @property
    def jump(self) -> float:
        """Bytes that it needed at once."""
        return self.shape.jump if self.shape.stands_out else 0.0

    @property
    def in_use(self) -> float:
        """Bytes that it has grown by otherwise, and that are not free."""
        return (self.one.grown or 0) - (self.one.parts.kept or 0) - self.jump

    @property
    def goes_on(self) -> bool:
        """Whether it grew all the time."""
        if self.in_use < max(GROWN, MOSTLY_KEPT * self.shape.rest.rise):
            return False
        least, most = EACH_GOES_ON
        return least <= self.shape.pace <= most and self.shape.lumpy <= LUMPY

    @property
    def needed(self) -> bool:
        """Whether it grew in one jump."""
        grown = self.one.grown or 0
        mostly = self.shape.rest.rise < GROWN and self.jump >= MOSTLY_AT_ONCE * grown
        return mostly or self.jump >= AT_ONCE * grown

    @property
    def level(self) -> float:
        """Which share of its growth was there at half of its work; what it needed at once is no matter, if there is a rest."""
        return self.shape.level if self.shape.rest.rise >= GROWN else 1.0


def judge(retired: Sequence[Retirement], unit: str = "pieces of work") -> Retention:
    """What the last workers have grown by. `unit`: what they count, in the plural."""
    grown = [each for each in retired if _has_grown(each)]
    if not grown:
        return Retention(kind=Kind.UNKNOWN, workers=0, why=f"no recycled worker has grown by {format_size(GROWN)} yet")
    kept = [each for each in grown if (_kept_share(each) or 0.0) >= MOSTLY_KEPT]
    if len(kept) > len(grown) / 2:
        return _enough(_kept(kept), FOR_OTHERS, grown)
    others = [each for each in grown if each not in kept and each.work >= LEAST_WORK]
    if len(others) < (len(grown) - len(kept)) / 2:
        why = f"most workers were recycled after less than {LEAST_WORK} {unit}: that does not tell a leak from what they need"
        return Retention(kind=Kind.UNKNOWN, workers=len(grown), why=why)
    lives = [_Life(each, shape) for each in others if (shape := shape_of(each)) is not None]
    going_on = [life for life in lives if life.goes_on]
    if len(going_on) >= MOST * len(lives) > 0 and _goes_on(going_on):
        return _enough(_leak(going_on, unit), FOR_A_LEAK, grown)
    needed = [life for life in lives if life.needed]
    if len(needed) > len(lives) / 2:
        return _enough(_needed(needed, unit), FOR_OTHERS, grown)
    levels = [life.level for life in lives]
    if levels and statistics.median(levels) >= LEVELLED:
        return _enough(_levelled(lives, levels), FOR_OTHERS, grown)
    why = (
        f"the growth of {counted(len(lives), 'workers')} has no shape that tells: at half of their work they had {_percents(levels)} of it"
    )
    return Retention(kind=Kind.UNKNOWN, workers=len(grown), why=why)


def _goes_on(lives: Sequence[_Life]) -> bool:
    """Whether the growth of these goes on to their end, taken together."""
    pace = statistics.median(life.shape.pace for life in lives)
    return GOES_ON[0] <= pace <= GOES_ON[1] and statistics.median(life.shape.last_pace for life in lives) >= UNTIL_THE_END


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
    lives = [_Life(each, shape) for each in kept if each.work >= LEAST_WORK and (shape := shape_of(each)) is not None]
    in_use = [life for life in lives if life.in_use >= max(GROWN, A_LOT * (life.one.grown or 0))]
    share = min(1.0, statistics.median(_kept_share(each) or 0.0 for each in kept))
    if len(in_use) > len(kept) / 2 and _goes_on(in_use):
        more = format_size(round(statistics.median(life.in_use for life in in_use)))
        why = (
            f"{share:.0%} of the growth is free memory that allocators keep, but {more} is in use, and the growth goes on: it may leak, too"
        )
        return Retention(kind=Kind.UNKNOWN, workers=len(kept), why=why)
    by_python = sum(each.parts.python_kept or 0 for each in kept)
    by_malloc = sum((each.parts.malloc_kept or 0) + (each.parts.malloc_stuck or 0) for each in kept)
    who, helps = ("Python's allocator", BY_PYTHON) if by_python >= by_malloc else ("malloc", _help_for_malloc(kept))
    why = f"{share:.0%} of the growth is free memory that {who} keeps"
    return Retention(kind=Kind.KEPT, workers=len(kept), why=why, help=helps)


#: What helps if it is Python's allocator that keeps it; if it is malloc, and a trim does not give it back; or does.
BY_PYTHON = "have the work hold less at a time; recycling gives it back, a trim does not"
BY_MALLOC = "fewer arenas (MALLOC_ARENA_MAX=2), or another malloc (jemalloc, mimalloc by LD_PRELOAD)"
TRIMMED = "a trim gives it back: oomsafe trims idle workers (reclaim), and those over their limit"


def _help_for_malloc(kept: Sequence[Retirement]) -> str:
    trimmed = sum(each.parts.malloc_kept or 0 for each in kept)
    return TRIMMED if trimmed > sum(each.parts.malloc_stuck or 0 for each in kept) else BY_MALLOC


def _needed(lives: Sequence[_Life], unit: str) -> Retention:
    size = format_size(round(statistics.median(life.jump for life in lives)))
    first = all(life.shape.jumped_after <= FEW for life in lives)
    when = f"with the first {unit}" if first else f"at once, after {_numbers([life.shape.jumped_after for life in lives])} {unit}"
    why = f"{size} came {when}, and little else"
    return Retention(kind=Kind.NEEDED, workers=len(lives), why=why, help="a soft limit above that: oomsafe advise")


def _levelled(lives: Sequence[_Life], levels: Sequence[float]) -> Retention:
    why = f"at half of their work the workers had {_percents(levels)} of their growth: it levels off"
    return Retention(kind=Kind.CACHE, workers=len(lives), why=why, help="a soft limit above the level, or a smaller cache")


def _leak(lives: Sequence[_Life], unit: str) -> Retention:
    # of what has come for each piece of work, as much is in use as of all that has come
    each = [life.shape.each * min(1.0, life.in_use / life.shape.rest.rise) for life in lives]
    mean = statistics.fmean(each) if each else 0.0
    spread = statistics.stdev(each) if len(each) > 1 else 0.0
    if mean <= 0 or spread > ALIKE * mean:
        why = f"the growth of {counted(len(lives), 'workers')} goes on and on, and is not alike for {unit}"
        return Retention(kind=Kind.UNKNOWN, workers=len(lives), why=why)
    # the standard error, times Student's t for few samples
    band = round(spread / math.sqrt(len(each)) * _T.get(len(each) - 1, 2.0)) if len(each) > 1 else None
    plus = f" (± {format_size(band)})" if band is not None else ""
    jump = round(statistics.median(life.jump for life in lives))
    beside = f"; {format_size(jump)} besides came at once" if jump >= GROWN else ""
    why = f"memory in use rises by {format_size(round(mean))}{plus} a {one_of(unit)}, over all of the workers' lives{beside}"
    who = keeper(life.one.objects for life in lives)
    helps = f"it is a leak, or a cache without a bound: {who + '; ' if who else ''}oomsafe probe names the line"
    return Retention(kind=Kind.LEAK, workers=len(lives), why=why, help=helps, each=round(mean), give_or_take=band)


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


def _numbers(numbers: Sequence[int]) -> str:
    least, most = min(numbers), max(numbers)
    return f"{least}" if least == most else f"{least} to {most}"


def _percents(shares: Sequence[float]) -> str:
    if not shares:
        return "an unknown share"
    least, most = min(shares), max(shares)
    return f"{least:.0%}" if round(least, 2) == round(most, 2) else f"{least:.0%} to {most:.0%}"
