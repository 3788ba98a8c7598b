"""Which workers a pool above its budget recycles, without waiting for their soft limits. Pure.

Idle workers first, then those above their soft limit, then those with the most memory of their own. One after the other, and several at
once if the pool is far above its budget; never one that boots, and never the last that serves. If recycling can't help, nothing is done:
because fresh workers alone hold more than the budget, or because those that were recycled soon came to hold as much as before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import NamedTuple

#: Recycling can't help if the pool would hold more than this share of its budget with fresh workers alone: it would soon be above it again.
CAN_HELP = 0.95

#: Once it was found that recycling can't help, it can again below this share.
HELPS_AGAIN = 0.9

#: Recycling a worker that would give back less than this share of what a fresh one holds is not worth its boot.
WORTH = 0.1

#: Far above the budget: above it by more than this share of what lies between it and the kernel's limit; or by this share of the budget,
#: if that limit is not known.
FAR, FAR_OF_BUDGET = 0.5, 0.05

#: If as many workers as the pool has were recycled within this many seconds, all of which had stopped growing, workers need that much.
RECUR = 300.0

#: Then they are left alone for this many seconds.
NEEDED_FOR = 600.0

#: Seconds that a worker must have served before it can be known whether it still grows.
KNOWN_AFTER = 2.0

#: A worker has stopped growing if it has gained less than this share of its growth since it was half as old, or younger.
LEVEL = 0.25

#: Seconds between two checks, at most and at least.
SELDOM, OFTEN = 1.0, 0.1


class Why(Enum):
    """Why recycling can't help."""

    FRESH = "fresh"
    """Fresh workers alone hold more than the budget."""
    NEEDED = "needed"
    """Workers come to hold that much, and then grow no more."""


class Candidate(NamedTuple):
    """One worker now; sizes in bytes."""

    generation: int
    serves: bool
    """It takes work, and nothing has ordered it to leave."""
    leaves: bool = False
    """It drains or leaves, or has been ordered to."""
    own: int = 0
    """What it holds and shares with no other process."""
    gained: int = 0
    """What it has grown by since its boot: recycling it gives this back."""
    over: bool = False
    """It is above its soft limit."""
    idle: bool = False
    """It has nothing to do, and has had nothing to do for a while."""
    level: bool = False
    """It has stopped growing."""


class Pool(NamedTuple):
    """What the pool holds and may hold, in bytes; None: not known."""

    used: int | None
    budget: int | None
    ahead: int = 0
    """What it will have grown by before a worker that is ordered to leave now is gone."""
    room: int | None = None
    """What it may hold before the kernel kills."""
    wanted: int = 1
    """How many workers it should have."""
    turns: int = 1
    """How many workers may be away at once while it is not far above its budget."""
    sustain: float = 0.0
    """Seconds for which it must be above its budget, unless it is far above."""


@dataclass(frozen=True)
class Watch:
    """What is remembered. Times in seconds, on the clock of `now`."""

    since: float | None = None
    """Since when the pool has been above its budget; None: it is not."""
    level: tuple[float, ...] = ()
    """When workers were recycled that had stopped growing."""
    refused: Why | None = None
    """Why nothing is done."""
    until: float = 0.0
    """Until when, if workers need that much."""


class Plan(NamedTuple):
    """What to do."""

    watch: Watch
    victims: tuple[int, ...] = ()
    """The generations of the workers to recycle."""
    floor: int | None = None
    """What the pool would hold if all its workers were fresh, in bytes; None: not known."""


def next_check(pool: Pool, pace: float) -> float:
    """Seconds until a pool that grows by `pace` bytes a second is checked again: half of what it needs to be above its budget."""
    if pool.used is None or pool.budget is None or pace <= 0:
        return SELDOM
    return min(SELDOM, max(OFTEN, (pool.budget - pool.used - pool.ahead) / pace / 2))


class Life(NamedTuple):
    """What a worker held at two earlier ages, of which `mark` is between a quarter and half of its present one. Seconds, bytes."""

    began: float
    mark: tuple[float, int]
    next: tuple[float, int]


def lived(life: Life | None, used: int, now: float) -> Life:
    """The worker's life, now that it holds `used` bytes; None: this is the first time that it is seen to serve."""
    if life is None:
        return Life(now, (now, used), (now, used))
    age = now - life.began
    due = age >= max(KNOWN_AFTER / 2, 2 * (life.next[0] - life.began))
    return life._replace(mark=life.next, next=(now, used)) if due else life


def is_level(life: Life, used: int, gained: int, now: float) -> bool:
    """Whether the worker, which has grown by `gained` bytes in all, has stopped growing."""
    return now - life.began >= KNOWN_AFTER and used - life.mark[1] < LEVEL * max(gained, 1)


def plan(watch: Watch, pool: Pool, workers: Sequence[Candidate], now: float) -> Plan:
    """What to do at `now`. If a figure is not known, nothing."""
    if pool.used is None or pool.budget is None:
        return Plan(replace(watch, since=None))
    floor = pool.used - sum(worker.gained for worker in workers)
    watch = _believed(watch, floor, pool.budget, now)
    # what leaving workers hold will be free in a moment
    excess = pool.used + pool.ahead - sum(worker.gained for worker in workers if worker.leaves) - pool.budget
    if excess <= 0:
        return Plan(replace(watch, since=None) if pool.used + pool.ahead <= pool.budget else watch, floor=floor)
    watch = replace(watch, since=now if watch.since is None else watch.since)
    if watch.refused is None and floor > pool.budget * CAN_HELP:
        watch = replace(watch, refused=Why.FRESH)
    far = excess > (FAR_OF_BUDGET * pool.budget if pool.room is None else FAR * max(0, pool.room - pool.budget))
    if watch.refused is not None or (not far and now - (watch.since or now) < pool.sustain):
        return Plan(watch, floor=floor)
    if len(watch.level) >= max(2, pool.wanted):
        return Plan(replace(watch, refused=Why.NEEDED, until=now + NEEDED_FOR, level=()), floor=floor)
    victims = _victims(pool, workers, excess, far)
    level = (*watch.level, *(now for victim in victims if victim.level))
    return Plan(replace(watch, level=level), tuple(victim.generation for victim in victims), floor)


def _believed(watch: Watch, floor: int, budget: int, now: float) -> Watch:
    """`watch` without what no longer holds."""
    over = (watch.refused is Why.FRESH and floor <= budget * HELPS_AGAIN) or (watch.refused is Why.NEEDED and now >= watch.until)
    return replace(watch, refused=None if over else watch.refused, level=tuple(at for at in watch.level if now - at < RECUR))


def _victims(pool: Pool, workers: Sequence[Candidate], excess: int, far: bool) -> list[Candidate]:
    serving = [worker for worker in workers if worker.serves]
    away = max(pool.wanted, len(workers)) - len(serving)
    may_go = pool.turns - away
    if far:
        may_go = max(may_go, len(serving) // 2 - sum(worker.leaves for worker in workers))
    may_go = min(may_go, len(serving) - 1)
    # the average gain of those that serve is above their share of the excess, so half of that share always finds one
    least = excess / (2 * max(1, len(serving)))
    worth = [one for one in serving if one.gained >= max(least, WORTH * (one.own - one.gained), 1)]
    victims: list[Candidate] = []
    for one in sorted(worth, key=lambda one: (not one.idle, not one.over, -one.own, one.generation))[: max(0, may_go)]:
        victims.append(one)
        excess -= one.gained
        if excess <= 0:
            break
    return victims
