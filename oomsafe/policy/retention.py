"""Leak, or memory that the allocators keep? Judged from what the last workers of a pool held when they were recycled. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from oomsafe.policy.curve import FEW, Shape, shape_of
from oomsafe.policy.objects import Cache, keeper
from oomsafe.policy.recycle import PATIENT
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


#: A cache with a bound that holds this share of what is in use of a worker's growth is what it grows by.
MOSTLY_CACHED = 2 / 3

#: What is in use does not rise with the work if it differs by at most this share where the work differs at least so many times.
FLAT, WORK_DIFFERS = 0.1, 1.5

#: Nor with the time, if this share of the growth was there at half of the work. (What is free but kept comes and goes, and blurs this.)
BENT = 0.65

#: Why workers are recycled whatever they hold: those that end at a limit all hold as much as that, whether they leak or not.
WHATEVER_THEY_HOLD = frozenset(reason.value for reason in PATIENT)


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
    known = [one for one in grown if one.objects is not None and one.objects.compared]
    # whether it has grown, too, is known only where it is known what there was before
    enough = len(known) >= FOR_OTHERS
    cached = _cached(known if enough else grown)
    if cached is not None and enough:
        return _enough(cached, FOR_OTHERS, grown)
    others = [each for each in grown if each not in kept and each.work >= LEAST_WORK]
    if len(others) < (len(grown) - len(kept)) / 2:
        why = f"most workers were recycled after less than {LEAST_WORK} {unit}: that does not tell a leak from what they need"
        return Retention(kind=Kind.UNKNOWN, workers=len(grown), why=why)
    lives = [_Life(each, shape) for each in others if (shape := shape_of(each)) is not None]
    going_on = [life for life in lives if life.goes_on]
    flat = _flat(grown, unit)
    if len(going_on) >= MOST * len(lives) > 0 and _goes_on(going_on):
        if flat:
            why = f"{flat}, but it grew on until they ended: that has to do with time rather than with {unit}, or is a cache that fills"
            return Retention(kind=Kind.UNKNOWN, workers=len(lives), why=why)
        if cached is not None:
            why = f"it may be a cache that fills: {cached.why}; what it had before is not known of enough workers"
            return Retention(kind=Kind.UNKNOWN, workers=len(lives), why=why)
        return _enough(_leak(going_on, unit), FOR_A_LEAK, grown)
    needed = [life for life in lives if life.needed]
    if len(needed) > len(lives) / 2:
        # a small cache is full with the first few pieces of work. What one had before is no matter where nothing leaks
        if (cached := _cached([life.one for life in needed])) is not None:
            return _enough(cached, FOR_OTHERS, grown)
        return _enough(_needed(needed, unit), FOR_OTHERS, grown)
    levels = [life.level for life in lives]
    if flat and levels and statistics.median(levels) >= BENT:
        return Retention(kind=Kind.CACHE, workers=len(grown), why=f"{flat}: it levels off", help=ABOVE)
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


#: What helps if it levels off.
ABOVE = "a soft limit above the level, or a smaller cache"


def _needed(lives: Sequence[_Life], unit: str) -> Retention:
    size = format_size(round(statistics.median(life.jump for life in lives)))
    first = all(life.shape.jumped_after <= FEW for life in lives)
    when = f"with the first {unit}" if first else f"at once, after {_numbers([life.shape.jumped_after for life in lives])} {unit}"
    why = f"{size} came {when}, and little else"
    return Retention(kind=Kind.NEEDED, workers=len(lives), why=why, help="a soft limit above that: oomsafe advise")


def _levelled(lives: Sequence[_Life], levels: Sequence[float]) -> Retention:
    why = f"at half of their work the workers had {_percents(levels)} of their growth: it levels off"
    return Retention(kind=Kind.CACHE, workers=len(lives), why=why, help=ABOVE)


def _cached(grown: Sequence[Retirement]) -> Retention | None:
    """The judgement if in most of these a cache with a bound holds most of what is in use of the growth; None: none does."""
    found: dict[str, list[tuple[Cache, float]]] = {}
    for one in grown:
        in_use = max(MIB, (one.grown or 0) - (one.parts.kept or 0))
        for cache in one.objects.caches if one.objects is not None else ():
            held = (cache.size if cache.before is None else cache.grown_bytes) or 0
            if cache.bound and held >= MOSTLY_CACHED * in_use:
                found.setdefault(cache.called, []).append((cache, min(1.0, held / in_use)))
    for called, several in found.items():
        if len(several) > len(grown) / 2:
            full = statistics.median((cache.size or 0) / cache.entries * (cache.bound or 0) for cache, _ in several)
            why = (
                f"{called} holds {_percents([share for _, share in several])} of what is in use of the growth, and has a bound: "
                f"it was {_percents([min(1.0, cache.entries / (cache.bound or 1)) for cache, _ in several])} full"
            )
            helps = f"it holds about {format_size(round(full))} when it is full: a soft limit above that, or a smaller bound"
            return Retention(kind=Kind.CACHE, workers=len(several), why=why, help=helps)
    return None


def _flat(grown: Sequence[Retirement], unit: str) -> str:
    """In figures, that those which have done much more work than others have no more in use; empty: they have, or it can't be told."""
    ended = [one for one in grown if one.reason in WHATEVER_THEY_HOLD and one.work >= LEAST_WORK and one.parts.kept is not None]
    in_use = [(one.grown or 0) - (one.parts.kept or 0) for one in ended]
    work = [one.work for one in ended]
    if len(ended) < FOR_A_LEAK or len(ended) <= len(grown) / 2 or max(work) < WORK_DIFFERS * min(work):
        return ""
    if min(in_use) < GROWN or max(in_use) - min(in_use) > FLAT * min(in_use):
        return ""
    sizes = " to ".join(dict.fromkeys((format_size(min(in_use)), format_size(max(in_use)))))
    return f"{sizes} of the growth are in use after {min(work)} {unit} as after {max(work)}"


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
