"""How many workers a pool should have, with which limits, and what to expect then. Pure.

The limits are those that the pool itself computes from the advised settings (policy/limits.py), and that it accepts right after boot
(policy/recycle.py). All workers at their soft limits, the supervisor, and a replacement that boots fit in the budget; with one worker at
its hard limit in place of its soft one, they still fit below the limit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import Enum

from oomsafe.policy.caps import FAST
from oomsafe.policy.limits import MACHINE, Capacity, resolve_limits
from oomsafe.policy.readers import MOST_WORKERS, Metric
from oomsafe.policy.recycle import BOOTS_LATE, ENDS_WITHIN, replaced_within
from oomsafe.policy.settings import Policy
from oomsafe.policy.sizing.facts import Facts, Style
from oomsafe.policy.units import GIB, LARGEST, MIB

#: The settings that are advised leave the rest at these.
DEFAULTS = Policy()

#: A soft limit is at least a fresh worker and this share of one, at least so many bytes: first requests fill caches, and a limit just above
#: what a worker needs is passed by its own noise.
LEAST_ROOM, LEAST_BYTES = 0.5, 32 * MIB

#: A worker that lives shorter than this is booted too often: seconds, and times a boot.
LIVES, BOOTS = 300.0, 20

#: Where workers live shorter than so many times min_lifetime, min_lifetime is lowered to that share of their life; seconds at least: then
#: workers boot as fast as they can.
YOUNG, SHORTEST = 3, 1.0

#: How many times as fast as in the mean a pool grows at a moment, because work comes in bursts. Of requests that leak 256 KiB, 20 MiB/s in
#: each worker, none of 23 378 were refused on 2 shared cores at load averages of 5 to 13, and 98 of 12 868 at loads of 38 to 42, where
#: workers came to their hard limits before their replacements served.
BURSTS = 8

#: Instances are sized in steps of this: below 1 GiB, and above.
STEP_BELOW, STEP_ABOVE = 64 * MIB, 256 * MIB


class Bound(Enum):
    """What decides how many workers there are."""

    CPU = "cpu"
    MEMORY = "memory"
    GIVEN = "given"
    """Their number was given."""


class TooSmall(ValueError):
    """The memory does not hold so many workers."""

    def __init__(self, workers: int, holds: int, needs: int) -> None:
        super().__init__(f"{workers} workers need {needs} bytes")
        self.workers, self.holds = workers, holds
        """How many workers were asked for, and how many this memory holds."""
        self.needs = needs
        """The memory that would do for them, in bytes."""


@dataclass(frozen=True, kw_only=True)
class Advice:
    """Sizes in bytes, times in seconds; None is a figure that can't be known from the facts."""

    workers: int
    bound: Bound
    by_cpu: int | None
    by_memory: int
    """How many workers this memory holds."""
    budget: int
    soft: int
    hard: int | None
    """None: none is advised: what the largest work may need is not known, or its workers may leak faster than they are replaced."""
    min_lifetime: float | None
    """What oomsafe's setting of this name should be; None: its default will do, or how fast workers grow is not known."""
    metric: Metric
    """What the soft limit is compared with."""
    least_soft: int
    """The lowest soft limit that makes sense for such workers."""
    headroom: int
    """What is kept free for a replacement that boots while all others are at their limits."""
    balloon_fits: bool | None
    """Whether a worker at its soft limit can still run the largest work; None: that work's size is not known."""
    life: float | None
    """How long a worker lives until it is recycled; inf: for ever."""
    recycles: float | None
    """Recycles an hour."""
    saved: int | None
    """What preloading saves the pool, compared with workers that share nothing."""
    would_do: int
    """The memory that would do for as many workers as there are now, else for those advised, each with a life as it should be."""
    would_do_for: int
    """How many workers these are."""

    should_live: float
    """How long it should live at least, or the pool boots too often."""

    @property
    def short_lived(self) -> bool:
        """Whether workers would be replaced too often."""
        return self.life is not None and self.life < self.should_live


def advise(facts: Facts, workers: int | None = None) -> Advice:
    """For as many workers as processors and memory allow, or for `workers`. Raises TooSmall if these do not fit."""
    by_cpu, by_memory = by_processors(facts), holds(facts)
    if (workers or 1) > by_memory:
        raise TooSmall(workers or 1, by_memory, would_do(facts, workers or 1, lives=0))
    number = workers or min(by_memory, by_cpu or by_memory)
    bound = Bound.GIVEN if workers else Bound.CPU if by_cpu is not None and by_cpu <= by_memory else Bound.MEMORY
    budget, soft = _budget(facts), _soft(facts, number)
    hard = None if facts.balloon is None or leaks_fast(facts, number) else _hard(facts, number, soft)
    # both are rounded down
    fits = None if facts.balloon is None or hard is None else soft + facts.common + facts.balloon < hard + MIB
    life = _life(facts, number, soft)
    present = facts.workers or number
    return Advice(
        workers=number,
        bound=bound,
        by_cpu=by_cpu,
        by_memory=by_memory,
        budget=budget,
        soft=soft,
        hard=hard,
        min_lifetime=_min_lifetime(life),
        metric=metric_of(facts),
        least_soft=least_soft(facts),
        headroom=headroom(facts),
        balloon_fits=fits,
        life=life,
        should_live=should_live(facts),
        recycles=None if life is None else number * 3600 / life,
        saved=(number - 1) * facts.common if facts.preloads else None,
        would_do=would_do(facts, present),
        would_do_for=present,
    )


def by_processors(facts: Facts) -> int | None:
    """How many workers keep the processors busy, by the rules of thumb of the servers' own documentation; None: not known.

    2 x processors + 1 if a worker waits while its work waits (gunicorn's design page), one each if not.
    """
    if facts.cpus is None:
        return None
    most = 2 * facts.cpus + 1 if facts.style is Style.BLOCKING else math.ceil(facts.cpus)
    return max(1, min(int(most), MOST_WORKERS))


def leaks_fast(facts: Facts, workers: int) -> bool:
    """Whether so many workers may leak so fast that one is at its hard limit before it is replaced: then requests are refused for it."""
    return (facts.pace or 0.0) / workers >= FAST / BURSTS


def metric_of(facts: Facts) -> Metric:
    """What the soft limit is to be compared with: what is shared must not count as each worker's own."""
    return "private" if facts.preloads else "anon"


def least_soft(facts: Facts) -> int:
    """The lowest soft limit that makes sense for such workers, in bytes."""
    return _up(facts.own + max(int(facts.own * LEAST_ROOM), LEAST_BYTES), MIB)


def headroom(facts: Facts) -> int:
    """What a replacement needs beside all others: a fresh worker, and what the pool grows by until the replacement helps."""
    ahead = (facts.pace or 0.0) * min(replaced_within(facts.boot or 0.0), ENDS_WITHIN)
    return facts.own + int(min(ahead, LARGEST))


def holds(facts: Facts) -> int:
    """How many workers this memory holds: at their least soft limits, with room for a replacement, and for the largest work in one."""
    within_budget = _budget(facts) - facts.parent - headroom(facts)
    within_limit = facts.room - facts.parent - headroom(facts) - (facts.balloon or 0)
    least = least_soft(facts)
    # a single worker is better than none, though its largest work is refused
    with_balloon = max(min(within_budget, within_limit) // least, min(1, within_budget // least))
    return max(0, min(with_balloon, MOST_WORKERS))


def should_live(facts: Facts) -> float:
    """Seconds that a worker should live at least, or the pool boots too often."""
    return max(LIVES, BOOTS * (facts.boot or 0.0))


def would_do(facts: Facts, workers: int, lives: float | None = None) -> int:
    """The memory that holds so many workers, the largest work in one of them, and lets each live for `lives` seconds, in bytes.

    `lives` None: as long as they should.
    """
    soft = max(least_soft(facts), _up(_soft_for(facts, workers, should_live(facts) if lives is None else lives), MIB))
    together = workers * soft + facts.parent + headroom(facts)
    # a byte more, because a share of the limit is rounded down
    room = max(math.ceil(together / _share()) + 1, together + (facts.balloon or 0))
    total = room + (facts.others or 0)
    return _up(total, STEP_BELOW if total <= GIB else STEP_ABOVE)


def _share() -> float:
    """The budget's share of the limit."""
    return resolve_budget(GIB) / GIB


def resolve_budget(room: int) -> int:
    """What the pool computes as its budget, of what others leave it."""
    budget = resolve_limits(DEFAULTS, Capacity(room, MACHINE))[0].budget
    assert budget is not None
    return budget


def _budget(facts: Facts) -> int:
    return resolve_budget(facts.room)


def _soft(facts: Facts, workers: int) -> int:
    """What the budget leaves each of so many workers, beside a replacement; less, if the largest work would not fit otherwise."""
    beside = facts.parent + headroom(facts)
    share = (_budget(facts) - beside) // workers
    with_balloon = (facts.room - beside - (facts.balloon or 0)) // workers
    return (share if with_balloon < least_soft(facts) else min(share, with_balloon)) // MIB * MIB


def _hard(facts: Facts, workers: int, soft: int) -> int:
    """What the pool computes as hard_limit auto, less the headroom; with what is shared, which counts for a hard limit."""
    policy = replace(DEFAULTS, soft_limit=soft, hard_limit="auto")
    capacity = Capacity(facts.room, MACHINE, supervisor_rss=facts.parent, workers=workers)
    auto = resolve_limits(policy, capacity)[0].hard
    assert auto is not None
    return (auto - headroom(facts) + facts.common) // MIB * MIB


def _life(facts: Facts, workers: int, soft: int) -> float | None:
    """Seconds from a worker's boot to the end of its service, at this pool's growth; None: not known."""
    if facts.pace is None:
        return None
    speed = facts.pace / workers
    if speed <= 0:
        return math.inf
    # in the mean, half of the jitter lowers a soft limit; a worker asks a boot and BOOTS_LATE before it is there
    gains = soft * (1 - DEFAULTS.jitter / 2) - facts.own - speed * BOOTS_LATE
    return max(gains / speed, SHORTEST)


def _min_lifetime(life: float | None) -> float | None:
    """A share of the life of a worker that grows so fast that the default would keep it for long after it is over its limit."""
    if life is None or life >= YOUNG * DEFAULTS.min_lifetime:
        return None
    return max(SHORTEST, float(round(life / YOUNG)))


def _soft_for(facts: Facts, workers: int, lives: float) -> int:
    """The soft limit with which a worker lives for so many seconds; 0 if its growth is not known."""
    speed = (facts.pace or 0.0) / workers
    return int(min((facts.own + speed * (lives + BOOTS_LATE)) / (1 - DEFAULTS.jitter / 2), LARGEST)) + 1 if speed and lives else 0


def _up(size: int, step: int) -> int:
    return -(-size // step) * step
