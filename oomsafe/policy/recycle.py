"""The product in one function: from a worker's limits, figures and history, decide what it should do."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum, IntEnum
from typing import NamedTuple

from oomsafe.policy.limits import Limits
from oomsafe.policy.reclaim import due
from oomsafe.policy.settings import Policy
from oomsafe.policy.trend import SAMPLE_EVERY, Growth

#: A worker that has grown by less than this share of its limit since it went over it does not leak: it needs that much.
SETTLED = 0.1

#: After this many workers in a row settled above their soft limit, the next one stays.
SETTLED_WORKERS = 3

#: The limit of a worker that stays is what it settled at, plus this share of its soft limit.
SETTLED_ROOM = 0.25

#: Seconds after which a worker that stays gets its old limit back: what was needed once may no longer be needed.
SETTLED_FOR = 600.0

#: A worker went over its limit in one jump if the jump covered at least this share of the way from its boot to the limit.
JUMP = 0.5

#: Seconds for which a worker that seemed to climb must stay level to count as one that jumped.
STAYS_FOR = 1.0

#: A worker that grows steadily asks early, if it will be over its limit by the time its replacement serves; but only above this
#: share of the limit.
ASKS_FROM = 0.5

#: Seconds within which a draining worker has usually given its memory back.
ENDS_WITHIN = 1.0

#: Seconds for which fast growth is assumed to continue.
GOES_ON_FOR = 0.3

#: The least seconds that an idle worker takes to end.
GONE_WITHIN = 0.2

#: Seconds for which an order to go answers an earlier request to be replaced: the replacement may be started after the longest pause
#: between two attempts, and may take as long to boot. The worker may have stopped growing in the meantime.
ANSWERED_WITHIN = 120.0

#: Seconds by which a replacement is assumed to be late: a machine on which a worker leaks at full speed boots more slowly.
BOOTS_LATE = 0.3


class Action(Enum):
    """From mildest to last."""

    SERVE = "serve"
    RECLAIM = "reclaim"
    ASK = "ask"
    """Keep serving, and ask the supervisor for a replacement."""
    RECYCLE = "recycle"


_MILDEST_FIRST = tuple(Action)


class Order(IntEnum):
    """What a supervisor has ordered a worker to do."""

    NONE = 0
    GO = 1
    """Drain now: the replacement serves, or the pool has one worker too many."""
    PERMIT = 2
    """Drain as soon as it is over its limit, without waiting for a replacement."""
    BUDGET = 3
    """Drain now: the pool is above its budget."""


class Reason(Enum):
    """Why a worker does what it does. The values are labels in metrics, so they never change."""

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
    LIFETIME = "max_lifetime"
    BUDGET = "budget"
    OPERATOR = "operator"
    PROBED = "probed"


#: Reasons that are no matter of memory: they can wait, until a replacement serves or until others are back.
PATIENT = (Reason.LIFETIME, Reason.OPERATOR, Reason.PROBED)


class Pool(NamedTuple):
    """The rest of the pool, as the scoreboard shows it to this worker."""

    away: int = 0
    """How many other workers do not serve: they start, drain, or leave."""
    turns: int = 1
    """How many may be away at once."""
    short: bool = False
    """The pool is over its budget, or about to be: `min_lifetime` no longer holds."""
    full: bool = False
    """The budget does not hold one more worker that grows as this one does."""
    out: bool = False
    """The kernel is about to kill."""
    leaving: int = 0
    """How many other workers drain or leave."""
    supervised: bool = False
    """A supervisor decides which worker leaves, and when."""
    abandoned: bool = False
    """Nothing would replace this worker: its supervisor is gone, or stands still."""
    order: Order = Order.NONE
    boot: float = 1.0
    """Seconds that a worker takes from its start until it serves."""
    settled: int = 0
    """How many workers in a row were recycled after they had settled above their limit."""
    missing: int = 0
    """How many workers are wanted and have not been started yet: the parent has not noticed that others are gone."""


class Snapshot(NamedTuple):
    """One worker's memory, measured now. Bytes; None is a figure that could not be read."""

    used: int | None
    """What the soft limit is compared with, in Limits.metric."""
    held: int | None
    """What the hard limit is compared with: rss or anon."""
    speed: float = 0.0
    """Steady growth of `used` in bytes a second; 0 while it is not known."""
    burst: float = 0.0
    """Growth of `used` over the last moment, in bytes a second."""


@dataclass(frozen=True)
class History:
    """The worker's past. Times in seconds, on the clock of `now`."""

    ready_at: float
    """When it began to serve."""
    breached_since: float | None = None
    """Since when it has been over its soft limit without a break; None while it is not."""
    breached_with: int | None = None
    """What it held when that began, in bytes."""
    breached_by_jump: bool = False
    """Whether it went over the limit in one jump."""
    climbed: bool = True
    """Whether it was growing just before that, too, or whether that is not known."""
    reclaimed_at: float | None = None
    """When the last attempt to reclaim ended; None: there was none."""
    futile: int = 0
    """How many attempts to reclaim in a row were futile."""
    refused: bool = False
    """Its soft limit is below what a worker needs: recycling would never end."""
    asked_at: float | None = None
    """When it last asked to be replaced; None: it never has."""
    stays: bool = False
    """Whether its limit has been raised because it settled above it. Only once, or clients could raise it bit by bit."""
    ready_with: int | None = None
    """What it held when it began to serve, in the limits' metric, in bytes."""
    spent: bool = False
    """It was refused memory by its hard limit, and little of the room that it had after boot has come back."""
    ordered: Reason | None = None
    """Why it need not stay, whatever it holds: OPERATOR, who has ordered it to be recycled, or PROBED, which has made it slow."""


class Decision(NamedTuple):
    """What to do, and why."""

    action: Action
    reason: Reason


def decide(policy: Policy, limits: Limits, snapshot: Snapshot, history: History, pool: Pool, now: float) -> Decision:
    """What a worker with these figures should do at `now`. Pure: call it again after each new measurement."""
    decision = _unless_abandoned(_by_memory(policy, limits, snapshot, history, pool, now), pool)
    if history.ordered is not None:
        reason = history.ordered  # despite min_lifetime, which keeps limits from recycling one worker after the other
    elif has_served_its_time(limits, history, now) and not _is_young(policy, history, now):
        reason = Reason.LIFETIME
    else:
        return decision
    patient = _unless_abandoned(_leave(reason, pool, at_once=False), pool)
    # the stronger of the two: a worker that leaves for its age need not reclaim first
    return max(decision, patient, key=lambda each: (_MILDEST_FIRST.index(each.action), each.reason is Reason.ABANDONED))


def _unless_abandoned(decision: Decision, pool: Pool) -> Decision:
    if pool.abandoned and decision.action in (Action.ASK, Action.RECYCLE):
        return Decision(Action.SERVE, Reason.ABANDONED)  # also despite an order: its supervisor may have died since it gave it
    return decision


def _by_memory(policy: Policy, limits: Limits, snapshot: Snapshot, history: History, pool: Pool, now: float) -> Decision:
    over = snapshot.used is not None and limits.early is not None and snapshot.used > limits.early and not history.refused
    far_over = snapshot.held is not None and limits.hard is not None and snapshot.held > limits.hard
    if pool.order is Order.GO:
        return Decision(
            Action.RECYCLE,
            Reason.HARD
            if far_over or (history.spent and limits.hard is not None)
            else Reason.SOFT
            if over
            else _why_it_asked(limits, history, now),
        )
    if pool.order is Order.BUDGET:
        return Decision(Action.RECYCLE, Reason.HARD if far_over or history.spent else Reason.SOFT if over else Reason.BUDGET)
    if far_over:
        return _leave(Reason.HARD, pool, _can_not_wait(pool, outruns(limits.hard, snapshot.burst)))
    spent = history.spent and snapshot.held is not None and limits.hard is not None
    if spent and not _is_young(policy, history, now):
        return _leave(Reason.HARD, pool, at_once=False)
    if snapshot.used is None or limits.soft is None or limits.early is None:
        return Decision(Action.SERVE, Reason.UNKNOWN)
    if history.refused:
        return Decision(Action.SERVE, Reason.REFUSED if snapshot.used > limits.early else Reason.WITHIN)
    young = _is_young(policy, history, now)
    soon = pool.supervised and not young and not policy.sustain and will_be_over(limits, snapshot, pool)
    if not over and not soon:
        return Decision(Action.SERVE, Reason.WITHIN)
    fast = outruns(limits.soft, snapshot.burst)
    # reclaiming takes as long as ending, and memory that grows so fast is not garbage
    if policy.reclaim and due(history.reclaimed_at, history.futile, now) and not (pool.full and fast):
        return Decision(Action.RECLAIM, Reason.SOFT)
    if not over:
        return Decision(Action.ASK, Reason.SOON)
    if young and not pool.short:
        return Decision(Action.SERVE, Reason.YOUNG)
    if history.breached_since is None or now - history.breached_since < policy.sustain:
        return Decision(Action.SERVE, Reason.SUSTAIN)
    if pool.settled >= SETTLED_WORKERS and not pool.short and not history.stays and stays_put(limits, snapshot.used, history):
        settled = has_settled(policy, limits, snapshot.used, history, now)
        return Decision(Action.SERVE, Reason.SETTLED if settled else Reason.SUSTAIN)  # wait until it has settled for certain
    return _leave(Reason.SOFT, pool, _can_not_wait(pool, fast))


def _is_young(policy: Policy, history: History, now: float) -> bool:
    return now - history.ready_at < policy.min_lifetime


def _why_it_asked(limits: Limits, history: History, now: float) -> Reason:
    """Why a worker that is below its limits has been ordered to go."""
    if history.ordered is not None:
        return history.ordered
    if has_served_its_time(limits, history, now):
        return Reason.LIFETIME
    asked = history.asked_at is not None and now - history.asked_at <= ANSWERED_WITHIN
    return Reason.SOFT if asked else Reason.REPLACED


def _can_not_wait(pool: Pool, fast: bool) -> bool:
    """Whether memory would be gone before a supervisor answers: it may be slow, or run as another user so that it can't be woken."""
    return (pool.short and fast) or (pool.out and not pool.leaving)


def _leave(reason: Reason, pool: Pool, at_once: bool) -> Decision:
    """This worker should leave: when a supervisor orders or permits it, or `at_once`; without one, when few enough others are away."""
    if pool.supervised:
        return Decision(Action.RECYCLE if pool.order is not Order.NONE or at_once else Action.ASK, reason)
    # Celery may take five seconds to notice that a child is gone and to start another: age can wait for that, memory can't
    away = pool.away + pool.missing if reason in PATIENT else pool.away
    return Decision(Action.RECYCLE, reason) if away < pool.turns else Decision(Action.SERVE, Reason.TURN)


def has_served_its_time(limits: Limits, history: History, now: float) -> bool:
    """Whether this worker has served for its lifetime."""
    return limits.lifetime is not None and now - history.ready_at >= limits.lifetime


def will_be_over(limits: Limits, snapshot: Snapshot, pool: Pool) -> bool:
    """Whether this worker, at its steady growth, will be over its limit by the time that a replacement requested now serves."""
    if snapshot.used is None or limits.early is None:
        return False
    return limits.early * ASKS_FROM < snapshot.used and limits.early < snapshot.used + snapshot.speed * replaced_within(pool.boot)


def replaced_within(boot: float) -> float:
    """Seconds until a replacement helps, if a worker takes `boot` seconds to boot."""
    return boot + BOOTS_LATE


def is_short(used: int | None, bound: int | None, growth: Growth, boot: float) -> bool:
    """Whether a pool that uses `used` bytes and grows like `growth` will be above `bound` before anything can be done about it.

    It looks ahead by one boot, or by the time that a worker takes to end if that is shorter: a breach further off can wait for a
    replacement. False if a figure is not known, because acting on short memory costs service.
    """
    if used is None or bound is None:
        return False
    return used + max(growth.steady * min(replaced_within(boot), ENDS_WITHIN), growth.burst * GOES_ON_FOR) > bound


def holds_up(used: int | None, budget: int | None, growth: Growth, boot: float, fresh: int) -> bool:
    """Whether a pool that uses `used` bytes has no room in `budget` for one more worker of `fresh` bytes.

    `growth` is the pool's growth, which is assumed to continue.
    """
    return is_short(None if used is None else used + fresh, budget, growth, boot)


def is_out(used: int | None, limit: int | None, growth: Growth) -> bool:
    """Whether a pool that uses `used` bytes and grows like `growth` hits the kernel's limit before the next draining worker is gone."""
    return used is not None and limit is not None and used + growth.burst * GONE_WITHIN > limit


def outruns(soft: int | None, burst: float) -> bool:
    """Whether a worker grows by more than a tenth of its soft limit while another ends, so that it can't wait for that."""
    return soft is not None and burst * GONE_WITHIN > soft * SETTLED


def within(growth: Growth, room: int | None) -> Growth:
    """`growth` of a worker that gets `room` bytes more and no more, because the kernel holds it to its hard limit; None: it does not."""
    return growth if room is None else growth._replace(burst=min(growth.burst, max(0, room) / GOES_ON_FOR))


def has_settled(policy: Policy, limits: Limits, used: int | None, history: History, now: float) -> bool:
    """Whether this worker went over its soft limit in one jump and has certainly stayed level since.

    An app that loads its models with its first work does that, and so does a worker that served a single heavy request. A leak
    climbs. One worker may do so by chance; if one worker after the other settles, recycling them does not help.
    """
    if history.breached_since is None or _is_young(policy, history, now):
        return False
    if history.climbed and now - history.breached_since < STAYS_FOR:
        return False
    return stays_put(limits, used, history)


def stays_put(limits: Limits, used: int | None, history: History) -> bool:
    """Whether this worker went over its soft limit in one jump, and has not grown since."""
    if used is None or limits.soft is None or history.breached_with is None or not history.breached_by_jump:
        return False
    return used - history.breached_with < limits.soft * SETTLED


def settled_limits(limits: Limits, used: int) -> Limits:
    """The limits of a worker that stays although it settled above its soft limit: above what it uses, so that new growth still counts."""
    if limits.soft is None:
        return limits
    raised = used + int(limits.soft * SETTLED_ROOM)
    if limits.hard is not None:
        raised = max(limits.soft, min(raised, limits.hard))
    return replace(limits, soft=raised, early=raised)


def jumped(limits: Limits, began_with: int | None, growth: int | None) -> bool:
    """Whether a worker that began with `began_with` bytes went over its limit in one jump of `growth` bytes.

    False if a figure is None (not known).
    """
    if limits.early is None or began_with is None or growth is None:
        return False
    return growth >= JUMP * (limits.early - began_with)


def note_breach(history: History, limits: Limits, used: int | None, growth: int | None, pace: float | None, now: float) -> History:
    """`history` with the breach of a worker that uses `used` bytes: since when it has been over its limit, and how it got there.

    `growth` and `pace` are those of Trend.jump().
    """
    if used is None or limits.early is None or used <= limits.early:
        return replace(history, breached_since=None, breached_with=None)
    if history.breached_since is not None:
        return history
    jump = jumped(limits, history.ready_with, growth)
    climbed = pace is None or pace * SAMPLE_EVERY >= limits.early * SETTLED
    return replace(history, breached_since=now, breached_with=used, breached_by_jump=jump, climbed=climbed)


def within_reach(limits: Limits, baseline: int | None, held: int | None) -> Limits:
    """`limits` without those that a worker exceeds right after boot, because recycling would never end.

    `baseline` is what it then held in the limits' metric, `held` what the hard limit is compared with; None: not known.
    """
    if baseline is not None and limits.soft is not None and baseline >= limits.soft:
        limits = replace(limits, soft=None, early=None)
    return replace(limits, hard=None) if held is not None and limits.hard is not None and held >= limits.hard else limits


def above_baseline(limits: Limits, baseline: int | None) -> Limits:
    """`limits` without jitter if that would put the limit below what the worker held right after boot (None: not known)."""
    if baseline is None or limits.early is None or limits.early > baseline:
        return limits
    return replace(limits, early=limits.soft)
