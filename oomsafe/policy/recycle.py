"""The product in one function: a worker's limits, its figures and its history in, what it should do out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum, IntEnum
from typing import NamedTuple

from oomsafe.policy.limits import Limits
from oomsafe.policy.reclaim import due
from oomsafe.policy.settings import Policy
from oomsafe.policy.trend import SAMPLE_EVERY, Growth

#: A worker that has grown by less than this share of its limit since it came over it does not leak: it needs that much.
SETTLED = 0.1

#: After so many workers in a row that settled above their soft limit, the next one stays.
SETTLED_WORKERS = 3

#: By this share of its soft limit, the limit of one that stays is above what it has settled at.
SETTLED_ROOM = 0.25

#: Seconds after which the limit of one that stays is its old one again: what was needed once may not be needed any more.
SETTLED_FOR = 600.0

#: A worker that came over its limit in one step took at least this share of the way from its boot to the limit in it.
STEP = 0.5

#: Seconds for which one that seemed to climb must stay where it is, to be taken for one that came by a step.
STAYS_FOR = 1.0

#: A worker that grows steadily asks when it will be over its limit by the time its replacement serves, but from this share of the limit.
ASKS_FROM = 0.5


#: Seconds within which a worker that drains has given its memory back, mostly.
ENDS_WITHIN = 1.0

#: Seconds for which what grows fast just now is taken to go on so.
GOES_ON_FOR = 0.3

#: Seconds that a worker which has nothing to do takes to end, at the least.
GONE_WITHIN = 0.2

#: Seconds for which an order to go is the answer to having asked: a replacement may be brought up after the longest pause between two
#: tries, and take as long to boot. Its worker may have stopped growing meanwhile.
ANSWERED_WITHIN = 120.0

#: Seconds by which a replacement is taken to be late: a machine on which a worker leaks at full speed boots more slowly.
BOOTS_LATE = 0.3


class Action(Enum):
    """From mildest to last."""

    SERVE = "serve"
    RECLAIM = "reclaim"
    ASK = "ask"
    """Serve on, and have the supervisor know that this worker should be replaced."""
    RECYCLE = "recycle"


class Order(IntEnum):
    """What a supervisor has ordered a worker to do."""

    NONE = 0
    GO = 1
    """Drain now: its replacement serves, or there is one worker too many."""
    PERMIT = 2
    """Drain as soon as it is over its limit: it need not wait for a replacement."""


class Reason(Enum):
    """Why; the values are labels in metrics, so they never change."""

    WITHIN = "within_limits"
    UNKNOWN = "unknown"
    REFUSED = "soft_limit_refused"
    YOUNG = "min_lifetime"
    SUSTAIN = "sustain"
    TURN = "max_unavailable"
    ABANDONED = "no_supervisor"
    SOON = "soon_over_limit"
    SETTLED = "settled"
    SOFT = "soft_limit"
    HARD = "hard_limit"
    REPLACED = "replaced"


class Pool(NamedTuple):
    """The rest of the pool, as this worker sees it on the scoreboard."""

    away: int = 0
    """Workers, this one not counted, that do not serve: they start, drain, or leave."""
    turns: int = 1
    """How many may be away at once."""
    short: bool = False
    """The pool is over its budget, or about to be: nothing may wait for a worker's age."""
    full: bool = False
    """The budget does not hold one more worker that grows as this one does."""
    out: bool = False
    """The kernel is about to kill."""
    leaving: int = 0
    """Workers, this one not counted, that drain or leave."""
    supervised: bool = False
    """A supervisor decides who goes, and when."""
    abandoned: bool = False
    """Nobody would bring up another worker in this one's place: what should is gone, or stands still."""
    order: Order = Order.NONE
    boot: float = 1.0
    """Seconds until a replacement serves."""
    settled: int = 0
    """How many workers in a row were recycled that had settled above their limit."""


class Snapshot(NamedTuple):
    """One worker's memory, measured now. Bytes; None is a figure that could not be read."""

    used: int | None
    """What the soft limit is compared with, as Limits.metric says."""
    held: int | None
    """What the hard limit is compared with: rss or anon."""
    speed: float = 0.0
    """Bytes a second that `used` grows by, steadily; 0 while that is not known."""
    burst: float = 0.0
    """The same over the last moment."""


@dataclass(frozen=True)
class History:
    """What the worker remembers. Times in seconds, on the clock of `now`."""

    ready_at: float
    """When it began to serve."""
    breached_since: float | None = None
    """Since when it has been over its soft limit without a break; None while it is not."""
    breached_with: int | None = None
    """What it held when that began, in bytes."""
    breached_by_step: bool = False
    """Whether it came there in one step."""
    climbed: bool = True
    """Whether it had grown right before, too, or that is not known."""
    reclaimed_at: float | None = None
    futile: int = 0
    """How many attempts to reclaim in a row have given back next to nothing."""
    refused: bool = False
    """Its soft limit is below what a worker needs: recycling would never end."""
    asked_at: float | None = None
    """When it last asked to be replaced; None: it never has."""
    stays: bool = False
    """Whether its limit has been raised, for it had settled above it: once, else clients could raise it step by step."""
    ready_with: int | None = None
    """What it held when it began to serve, by the limits' metric, in bytes."""


class Decision(NamedTuple):
    """What to do, and why."""

    action: Action
    reason: Reason


def decide(policy: Policy, limits: Limits, seen: Snapshot, history: History, pool: Pool, now: float) -> Decision:
    """What a worker with these figures should do at `now`. Pure: call it again after each new measurement."""
    decision = _decide(policy, limits, seen, history, pool, now)
    if pool.abandoned and decision.action in (Action.ASK, Action.RECYCLE):
        return Decision(Action.SERVE, Reason.ABANDONED)  # an order may be older than the end of who gave it
    return decision


def _decide(policy: Policy, limits: Limits, seen: Snapshot, history: History, pool: Pool, now: float) -> Decision:
    over = seen.used is not None and limits.early is not None and seen.used > limits.early and not history.refused
    far_over = seen.held is not None and limits.hard is not None and seen.held > limits.hard
    if pool.order is Order.GO:
        asked = history.asked_at is not None and now - history.asked_at <= ANSWERED_WITHIN
        return Decision(Action.RECYCLE, Reason.HARD if far_over else Reason.SOFT if over or asked else Reason.REPLACED)
    if far_over:
        return _leave(Reason.HARD, pool, outruns(limits.hard, seen.burst))
    if seen.used is None or limits.soft is None or limits.early is None:
        return Decision(Action.SERVE, Reason.UNKNOWN)
    if history.refused:
        return Decision(Action.SERVE, Reason.REFUSED if seen.used > limits.early else Reason.WITHIN)
    young = now - history.ready_at < policy.min_lifetime
    soon = pool.supervised and not young and not policy.sustain and will_be_over(limits, seen, pool)
    if not over and not soon:
        return Decision(Action.SERVE, Reason.WITHIN)
    fast = outruns(limits.soft, seen.burst)
    # it takes as long as to end, and what grows so fast is not what lies about
    if policy.reclaim and due(history.reclaimed_at, history.futile, now) and not (pool.full and fast):
        return Decision(Action.RECLAIM, Reason.SOFT)
    if not over:
        return Decision(Action.ASK, Reason.SOON)
    if young and not pool.short:
        return Decision(Action.SERVE, Reason.YOUNG)
    if history.breached_since is None or now - history.breached_since < policy.sustain:
        return Decision(Action.SERVE, Reason.SUSTAIN)
    if pool.settled >= SETTLED_WORKERS and not pool.short and not history.stays and stays_put(limits, seen.used, history):
        settled = has_settled(policy, limits, seen.used, history, now)
        return Decision(Action.SERVE, Reason.SETTLED if settled else Reason.SUSTAIN)  # until it has shown that it has
    return _leave(Reason.SOFT, pool, fast)


def _leave(reason: Reason, pool: Pool, fast: bool) -> Decision:
    """This worker should go: when a supervisor says so, or when fewer than may be are away."""
    if pool.supervised:
        # a supervisor may be slow, or of another user and can't be woken; a worker that fills the memory within a moment is not
        goes = pool.order is not Order.NONE or (pool.short and fast) or (pool.out and not pool.leaving)
        return Decision(Action.RECYCLE if goes else Action.ASK, reason)
    return Decision(Action.RECYCLE, reason) if pool.away < pool.turns else Decision(Action.SERVE, Reason.TURN)


def will_be_over(limits: Limits, seen: Snapshot, pool: Pool) -> bool:
    """Whether this worker, as steadily as it grows, will be over its limit when a replacement that is asked for now serves."""
    if seen.used is None or limits.early is None:
        return False
    return limits.early * ASKS_FROM < seen.used and limits.early < seen.used + seen.speed * replaced_within(pool.boot)


def replaced_within(boot: float) -> float:
    """Seconds until a replacement helps, where a worker takes `boot` seconds to boot."""
    return boot + BOOTS_LATE


def is_short(used: int | None, bound: int | None, growth: Growth, boot: float) -> bool:
    """Whether a pool that uses so many bytes, and grows so fast, is above `bound` before anything can be done about it.

    That takes no longer than a boot, nor than a worker takes to end: what is far off can wait for a replacement. False where a
    figure is not known, for what is done when memory is short costs service.
    """
    if used is None or bound is None:
        return False
    return used + max(growth.steady * min(replaced_within(boot), ENDS_WITHIN), growth.burst * GOES_ON_FOR) > bound


def holds_up(used: int | None, budget: int | None, growth: Growth, boot: float, fresh: int) -> bool:
    """Whether a pool that uses so many bytes has no room for one more worker of `fresh` bytes, which grows as fast as those before."""
    return is_short(None if used is None else used + fresh, budget, growth, boot)


def is_out(used: int | None, limit: int | None, growth: Growth) -> bool:
    """Whether a pool that uses so many bytes, and grows so fast, meets the kernel's limit before the next worker that drains is gone."""
    return used is not None and limit is not None and used + growth.burst * GONE_WITHIN > limit


def outruns(soft: int | None, burst: float) -> bool:
    """Whether a worker grows by more than a tenth of its soft limit while another ends: it can't wait for that."""
    return soft is not None and burst * GONE_WITHIN > soft * SETTLED


def has_settled(policy: Policy, limits: Limits, used: int | None, history: History, now: float) -> bool:
    """Whether this worker went over its soft limit in one step, and has stayed where it came to.

    An app that loads its models with its first work does that, and so does one that a single heavy request has passed
    through. A leak climbs. Once may be chance; when one worker after the other settles, recycling them is of no use.
    """
    if history.breached_since is None or now - history.ready_at < policy.min_lifetime:
        return False
    if history.climbed and now - history.breached_since < STAYS_FOR:
        return False
    return stays_put(limits, used, history)


def stays_put(limits: Limits, used: int | None, history: History) -> bool:
    """Whether this worker went over its soft limit in one step, and has not grown since."""
    if used is None or limits.soft is None or history.breached_with is None or not history.breached_by_step:
        return False
    return used - history.breached_with < limits.soft * SETTLED


def settled_limits(limits: Limits, used: int) -> Limits:
    """The limits of a worker that stays though it has settled above its soft limit: with room to see it grow again."""
    if limits.soft is None:
        return limits
    raised = used + int(limits.soft * SETTLED_ROOM)
    if limits.hard is not None:
        raised = max(limits.soft, min(raised, limits.hard))
    return replace(limits, soft=raised, early=raised)


def came_by_a_step(limits: Limits, began_with: int | None, growth: int | None) -> bool:
    """Whether a worker that began with so many bytes came over its limit in one step, by its `growth` within a moment."""
    if limits.early is None or began_with is None or growth is None:
        return False
    return growth >= STEP * (limits.early - began_with)


def note_breach(history: History, limits: Limits, used: int | None, growth: int | None, pace: float | None, now: float) -> History:
    """What a worker that uses so many bytes remembers of its breach: since when it is over its limit, and how it came there.

    `growth` and `pace` are those of its last step, as Trend.step() tells them.
    """
    if used is None or limits.early is None or used <= limits.early:
        return replace(history, breached_since=None, breached_with=None)
    if history.breached_since is not None:
        return history
    step = came_by_a_step(limits, history.ready_with, growth)
    climbed = pace is None or pace * SAMPLE_EVERY >= limits.early * SETTLED
    return replace(history, breached_since=now, breached_with=used, breached_by_step=step, climbed=climbed)


def within_reach(limits: Limits, baseline: int | None, held: int | None) -> Limits:
    """The same limits without those that a worker is above right after boot: recycling would never end.

    `baseline` is what it then held by the limits' metric, `held` what the hard limit is compared with.
    """
    if baseline is not None and limits.soft is not None and baseline >= limits.soft:
        limits = replace(limits, soft=None, early=None)
    return replace(limits, hard=None) if held is not None and limits.hard is not None and held >= limits.hard else limits


def above_baseline(limits: Limits, baseline: int | None) -> Limits:
    """The same limits, with jitter never asking for less than the worker held right after boot."""
    if baseline is None or limits.early is None or limits.early > baseline:
        return limits
    return replace(limits, early=limits.soft)
