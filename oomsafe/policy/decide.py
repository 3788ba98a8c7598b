"""The product in one function: a worker's limits, its figures and its history in, what it should do out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import NamedTuple

from oomsafe.policy.limits import Limits
from oomsafe.policy.settings import Policy

#: Seconds between two attempts to reclaim: gc.collect() walks the whole heap.
RECLAIM_EVERY = 10.0

#: One that breached its limit while it was young and has grown by less than this share of it since does not leak:
#: it needs that much.
SETTLED = 0.1

#: A worker this far over its soft limit waits for nobody any more.
WAITS_UP_TO = 1.05

#: Seconds by which a replacement is taken to be late: a machine on which a worker leaks at full speed boots more slowly.
BOOTS_LATE = 0.3

#: One whose replacement is being brought up, and will be there in time, waits for it up to here: with what it takes
#: while it drains, it stays below 1.25.
REPLACED_UP_TO = 1.2


class Action(Enum):
    """From mildest to last."""

    SERVE = "serve"
    RECLAIM = "reclaim"
    RECYCLE = "recycle"


class Reason(Enum):
    """Why; the values are labels in metrics, so they never change."""

    WITHIN = "within_limits"
    UNKNOWN = "unknown"
    REFUSED = "soft_limit_refused"
    YOUNG = "min_lifetime"
    SUSTAIN = "sustain"
    TURN = "max_unavailable"
    SURGE = "surge"
    BOOT = "boots_fail"
    SOFT = "soft_limit"
    HARD = "hard_limit"
    REPLACED = "replaced"


class Pool(NamedTuple):
    """The rest of the pool, as this worker sees it on the scoreboard."""

    draining: int = 0
    """Workers, this one not counted, that finish what they have."""
    replacing: int = 0
    """Workers, this one not counted, that have no work any more, or not yet."""
    turns: int = 1
    """How many may be away at once."""
    over_budget: bool = False
    """The working set is above the budget: nothing may wait for a worker's age."""
    surges: bool = False
    """A supervisor brings the replacement first, and tells who may go."""
    told: bool = False
    """It has told this worker."""
    boot: float = 1.0
    """Seconds until a replacement serves."""
    boots_fail: bool = False
    """The last worker that was started died before it served."""


class Snapshot(NamedTuple):
    """One worker's memory, measured now. Bytes; None is a figure that could not be read."""

    used: int | None
    """What the soft limit is compared with: rss, pss or uss, as Limits.metric says."""
    rss: int | None


@dataclass(frozen=True)
class History:
    """What the worker remembers. Times in seconds, on the clock of `now`."""

    ready_at: float
    """When it began to serve."""
    breached_since: float | None = None
    """Since when it has been over its soft limit without a break; None while it is not."""
    breached_with: int | None = None
    """What it held when that began, in bytes."""
    reclaimed_at: float | None = None
    refused: bool = False
    """Its soft limit is below what a worker needs: recycling would never end."""
    ready_with: int | None = None
    """What it held when it began to serve, by the limits' metric, in bytes."""


class Decision(NamedTuple):
    """What to do, and why."""

    action: Action
    reason: Reason


def decide(policy: Policy, limits: Limits, seen: Snapshot, history: History, pool: Pool, now: float) -> Decision:
    """What a worker with these figures should do at `now`. Pure: call it again after each new measurement."""
    if seen.rss is not None and limits.hard is not None and seen.rss > limits.hard:
        return Decision(Action.RECYCLE, Reason.HARD)
    if pool.told:
        over = seen.used is not None and limits.early is not None and seen.used > limits.early and not history.refused
        return Decision(Action.RECYCLE, Reason.SOFT if over else Reason.REPLACED)
    if seen.used is None or limits.soft is None or limits.early is None:
        return Decision(Action.SERVE, Reason.UNKNOWN)
    if seen.used <= limits.early:
        return Decision(Action.SERVE, Reason.WITHIN)
    if history.refused:
        return Decision(Action.SERVE, Reason.REFUSED)
    if policy.reclaim and (history.reclaimed_at is None or now - history.reclaimed_at >= RECLAIM_EVERY):
        return Decision(Action.RECLAIM, Reason.SOFT)
    if now - history.ready_at < policy.min_lifetime and not pool.over_budget:
        return Decision(Action.SERVE, Reason.YOUNG)
    if history.breached_since is None or now - history.breached_since < policy.sustain:
        return Decision(Action.SERVE, Reason.SUSTAIN)
    if pool.boots_fail and not pool.over_budget:
        return Decision(Action.SERVE, Reason.BOOT)  # nobody would take its place
    if waits_for_replacement(seen.used, limits.soft, speed(seen.used, history, now), pool):
        return Decision(Action.SERVE, Reason.SURGE)
    if not may_leave(seen.used, limits.soft, pool):
        return Decision(Action.SERVE, Reason.TURN)
    return Decision(Action.RECYCLE, Reason.SOFT)


def speed(used: int, history: History, now: float) -> float:
    """Bytes a second that the worker has grown by over its life: over a shorter time, one request would look like a leak."""
    if history.ready_with is None or now <= history.ready_at:
        return 0.0
    return (used - history.ready_with) / (now - history.ready_at)


def waits_for_replacement(used: int, soft: int, speed: float, pool: Pool) -> bool:
    """Whether this worker stays until its replacement serves.

    Not one that grows so fast that it would be far over its limit by then.
    """
    return pool.surges and max(used, used + speed * (pool.boot + BOOTS_LATE)) <= soft * REPLACED_UP_TO


def may_leave(used: int, soft: int, pool: Pool) -> bool:
    """Whether it is this worker's turn: the more it holds, the less it waits.

    Up to its soft limit (it asks from a little below, by its jitter) it waits until nobody else is
    away: neither draining, nor being replaced. Above it, only for those who drain. A worker that
    grew by another twentieth while it waited goes: an unserved moment is better than a kernel kill.
    """
    if used > soft * WAITS_UP_TO:
        return True
    away = pool.draining if used > soft else pool.draining + pool.replacing
    return away < pool.turns


def has_settled(policy: Policy, limits: Limits, used: int | None, history: History, now: float) -> bool:
    """Whether this worker went over its soft limit in its first seconds and stayed there.

    An app that loads its models with its first work does that. Once may be chance; when one worker
    after the other does, recycling them is of no use.
    """
    if used is None or limits.soft is None or history.breached_since is None or history.breached_with is None:
        return False
    went_young = history.breached_since - history.ready_at < policy.min_lifetime <= now - history.ready_at
    return went_young and used - history.breached_with < limits.soft * SETTLED


def within_reach(limits: Limits, baseline: int | None, rss: int | None) -> Limits:
    """The same limits without those that a worker is above right after boot: recycling would never end.

    `baseline` is what it then held by the limits' metric, `rss` what it had resident.
    """
    if baseline is not None and limits.soft is not None and baseline >= limits.soft:
        limits = replace(limits, soft=None, early=None)
    return replace(limits, hard=None) if rss is not None and limits.hard is not None and rss >= limits.hard else limits


def above_baseline(limits: Limits, baseline: int | None) -> Limits:
    """The same limits, with jitter never asking for less than the worker held right after boot."""
    if baseline is None or limits.early is None or limits.early > baseline:
        return limits
    return replace(limits, early=limits.soft)
