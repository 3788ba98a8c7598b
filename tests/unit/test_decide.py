"""What a worker with these figures should do."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oomsafe.policy.limits import Limits
from oomsafe.policy.reclaim import RECLAIM_EVERY
from oomsafe.policy.recycle import (
    BOOTS_LATE,
    GOES_ON_FOR,
    SETTLED_WORKERS,
    Action,
    Decision,
    History,
    Order,
    Pool,
    Reason,
    Snapshot,
    decide,
    has_settled,
    holds_up,
    is_short,
    jumped,
    settled_limits,
    within,
)
from oomsafe.policy.settings import Policy
from oomsafe.policy.trend import Growth

MIB = 1 << 20
NOW = 1000.0
LIMITS = Limits(soft=100 * MIB, hard=200 * MIB, early=90 * MIB)
OLD = History(ready_at=NOW - 60, breached_since=NOW - 5, reclaimed_at=NOW - 1)

SUPERVISED = Pool(supervised=True, boot=1.0 - BOOTS_LATE)
GO = SUPERVISED._replace(order=Order.GO)
BUDGET = SUPERVISED._replace(order=Order.BUDGET)
PERMIT = SUPERVISED._replace(order=Order.PERMIT)

SERVE, RECLAIM, ASK, RECYCLE = Action

AGED = Limits(soft=100 * MIB, hard=200 * MIB, early=90 * MIB, max_lifetime=60, lifetime=55)
NO_FIGURES = Snapshot(None, None)

ORDERED = replace(OLD, ordered=Reason.OPERATOR)

#: It came over its limit in one step, five seconds ago, and has stayed there.
STEPPED = replace(OLD, breached_with=101 * MIB, breached_by_jump=True, climbed=False)


def at(used: int | None, rss: int | None = None, speed: float = 0) -> Snapshot:
    """Figures in MiB and MiB a second; rss as well where it differs."""
    return Snapshot(*(None if size is None else size * MIB for size in (used, used if rss is None else rss)), speed * MIB)


@pytest.mark.parametrize(
    ("policy", "limits", "seen", "history", "pool", "action", "reason"),
    [
        pytest.param({}, LIMITS, at(90), OLD, Pool(), SERVE, Reason.WITHIN, id="at-the-early-limit"),
        pytest.param({}, LIMITS, at(91), OLD, Pool(), RECYCLE, Reason.SOFT, id="above-it"),
        pytest.param({}, LIMITS, at(101), OLD, Pool(), RECYCLE, Reason.SOFT, id="above-the-soft-limit"),
        pytest.param({}, LIMITS, at(200), replace(OLD, refused=True), Pool(), SERVE, Reason.REFUSED, id="refused"),
        pytest.param({}, LIMITS, at(201), replace(OLD, refused=True), Pool(), RECYCLE, Reason.HARD, id="refused-and-hard"),
        pytest.param({}, LIMITS, at(101), replace(OLD, reclaimed_at=None), Pool(), RECLAIM, Reason.SOFT, id="reclaim-first"),
        pytest.param({}, LIMITS, at(101), replace(OLD, reclaimed_at=NOW - RECLAIM_EVERY), Pool(), RECLAIM, Reason.SOFT, id="reclaim-again"),
        pytest.param({}, LIMITS, at(101), replace(OLD, reclaimed_at=NOW - 9.9), Pool(), RECYCLE, Reason.SOFT, id="reclaimed-lately"),
        pytest.param(
            {},
            LIMITS,
            at(101),
            replace(OLD, reclaimed_at=NOW - 39, futile=2),
            Pool(),
            RECYCLE,
            Reason.SOFT,
            id="futile-lately",
        ),
        pytest.param(
            {},
            LIMITS,
            at(101),
            replace(OLD, reclaimed_at=NOW - 40, futile=2),
            Pool(),
            RECLAIM,
            Reason.SOFT,
            id="futile-long-ago",
        ),
        pytest.param({"reclaim": False}, LIMITS, at(101), replace(OLD, reclaimed_at=None), Pool(), RECYCLE, Reason.SOFT, id="no-reclaim"),
        pytest.param({}, LIMITS, at(101), replace(OLD, ready_at=NOW - 9), Pool(), SERVE, Reason.YOUNG, id="young"),
        pytest.param({}, LIMITS, at(101), replace(OLD, ready_at=NOW - 10), Pool(), RECYCLE, Reason.SOFT, id="old-enough"),
        pytest.param({}, LIMITS, at(101), replace(OLD, ready_at=NOW), Pool(short=True), RECYCLE, Reason.SOFT, id="young, and short"),
        pytest.param({"sustain": 6}, LIMITS, at(101), OLD, Pool(), SERVE, Reason.SUSTAIN, id="not-for-long-enough"),
        pytest.param({"sustain": 5}, LIMITS, at(101), OLD, Pool(), RECYCLE, Reason.SOFT, id="for-long-enough"),
        pytest.param({}, LIMITS, at(101), replace(OLD, breached_since=None), Pool(), SERVE, Reason.SUSTAIN, id="no-breach-noted"),
        pytest.param({}, LIMITS, at(101), OLD, Pool(1), SERVE, Reason.TURN, id="another is away"),
        pytest.param({}, LIMITS, at(101), OLD, Pool(1, turns=2), RECYCLE, Reason.SOFT, id="two turns"),
        pytest.param({}, LIMITS, at(190), OLD, Pool(1, short=True), SERVE, Reason.TURN, id="one at a time, however much it holds"),
        pytest.param({}, LIMITS, at(91), OLD, SUPERVISED, ASK, Reason.SOFT, id="asks"),
        pytest.param({}, LIMITS, at(190), OLD, SUPERVISED, ASK, Reason.SOFT, id="asks, however much it holds"),
        pytest.param({}, LIMITS, at(101), replace(OLD, ready_at=NOW - 9), SUPERVISED, SERVE, Reason.YOUNG, id="young, so it does not ask"),
        pytest.param({}, LIMITS, at(91), OLD, PERMIT, RECYCLE, Reason.SOFT, id="may go, and is over"),
        pytest.param({}, LIMITS, at(91), OLD, SUPERVISED._replace(out=True), RECYCLE, Reason.SOFT, id="the kernel is about to kill"),
        pytest.param({}, LIMITS, at(91), OLD, SUPERVISED._replace(out=True, leaving=1), ASK, Reason.SOFT, id="and another leaves"),
        pytest.param(
            {},
            LIMITS,
            at(91)._replace(burst=51 * MIB),
            OLD,
            SUPERVISED._replace(short=True, leaving=1),
            RECYCLE,
            Reason.SOFT,
            id="too fast",
        ),
        pytest.param({}, LIMITS, at(90), OLD, SUPERVISED._replace(out=True), SERVE, Reason.WITHIN, id="and it is not over"),
        pytest.param({}, LIMITS, at(90), OLD, PERMIT, SERVE, Reason.WITHIN, id="may go, and is not over"),
        pytest.param({}, LIMITS, at(80, speed=11), OLD, SUPERVISED, ASK, Reason.SOON, id="soon over"),
        pytest.param({}, LIMITS, at(80, speed=10), OLD, SUPERVISED, SERVE, Reason.WITHIN, id="not before a replacement serves"),
        pytest.param({}, LIMITS, at(44, speed=99), OLD, SUPERVISED, SERVE, Reason.WITHIN, id="not from so far below"),
        pytest.param({}, LIMITS, at(80, speed=11), OLD, PERMIT, ASK, Reason.SOON, id="soon over, and may go then"),
        pytest.param({}, LIMITS, at(80, speed=11), OLD, Pool(), SERVE, Reason.WITHIN, id="soon over, and nobody to ask"),
        pytest.param({"sustain": 5}, LIMITS, at(80, speed=11), OLD, SUPERVISED, SERVE, Reason.WITHIN, id="soon over, not for long"),
        pytest.param({}, LIMITS, at(80, speed=11), replace(OLD, reclaimed_at=None), SUPERVISED, RECLAIM, Reason.SOFT, id="reclaims first"),
        pytest.param({}, LIMITS, at(80, speed=11), replace(OLD, ready_at=NOW), SUPERVISED, SERVE, Reason.WITHIN, id="soon over, and young"),
        pytest.param({}, LIMITS, at(91), OLD, GO, RECYCLE, Reason.SOFT, id="told"),
        pytest.param({}, LIMITS, at(80), replace(OLD, asked_at=NOW), GO, RECYCLE, Reason.SOFT, id="told, for it asks"),
        pytest.param({}, LIMITS, at(60), replace(OLD, asked_at=NOW - 120), GO, RECYCLE, Reason.SOFT, id="told, for it has asked"),
        pytest.param({}, LIMITS, at(60), replace(OLD, asked_at=NOW - 121), GO, RECYCLE, Reason.REPLACED, id="told long after it asked"),
        pytest.param({}, LIMITS, at(91), History(NOW), GO, RECYCLE, Reason.SOFT, id="told beats age, reclaim and sustain"),
        pytest.param({}, LIMITS, at(90), OLD, GO, RECYCLE, Reason.REPLACED, id="told though it is below its limit again"),
        pytest.param({}, LIMITS, at(201), OLD, GO, RECYCLE, Reason.HARD, id="told, over its hard limit"),
        pytest.param({}, LIMITS, Snapshot(None, None), OLD, GO, RECYCLE, Reason.REPLACED, id="told without figures"),
        pytest.param({}, LIMITS, at(150), replace(OLD, refused=True), GO, RECYCLE, Reason.REPLACED, id="told though refused"),
        pytest.param({}, LIMITS, at(50), History(NOW), BUDGET, RECYCLE, Reason.BUDGET, id="for the budget, young and below its limit"),
        pytest.param({}, LIMITS, at(91), OLD, BUDGET, RECYCLE, Reason.SOFT, id="for the budget, and over its limit"),
        pytest.param({}, LIMITS, at(201), OLD, BUDGET, RECYCLE, Reason.HARD, id="for the budget, and over its hard limit"),
        pytest.param({}, LIMITS, Snapshot(None, None), OLD, BUDGET, RECYCLE, Reason.BUDGET, id="for the budget, without figures"),
        pytest.param({}, LIMITS, at(201), OLD, GO._replace(abandoned=True), SERVE, Reason.ABANDONED, id="nobody would take its place"),
        pytest.param({}, LIMITS, at(101), OLD, Pool(abandoned=True), SERVE, Reason.ABANDONED, id="nobody, and no schedule"),
        pytest.param({}, LIMITS, at(102), STEPPED, Pool(settled=SETTLED_WORKERS), SERVE, Reason.SETTLED, id="settled, as others before"),
        pytest.param(
            {},
            LIMITS,
            at(102),
            replace(STEPPED, climbed=True, breached_since=NOW - 0.9),
            Pool(settled=9),
            SERVE,
            Reason.SUSTAIN,
            id="may settle",
        ),
        pytest.param({}, LIMITS, at(102), STEPPED, Pool(settled=2), RECYCLE, Reason.SOFT, id="settled, as too few before"),
        pytest.param({}, LIMITS, at(102), replace(STEPPED, stays=True), Pool(settled=9), RECYCLE, Reason.SOFT, id="settled twice"),
        pytest.param({}, LIMITS, at(112), STEPPED, Pool(settled=9), RECYCLE, Reason.SOFT, id="others had settled, this one grows"),
        pytest.param({}, LIMITS, at(102), STEPPED, Pool(settled=9, short=True), RECYCLE, Reason.SOFT, id="settled, and memory is short"),
        pytest.param({"sustain": 99}, LIMITS, at(201), History(NOW), Pool(), RECYCLE, Reason.HARD, id="hard-waits-for-no-time"),
        pytest.param({"sustain": 99}, LIMITS, at(201), History(NOW), SUPERVISED, ASK, Reason.HARD, id="hard-asks"),
        pytest.param({}, LIMITS, at(201), OLD, PERMIT, RECYCLE, Reason.HARD, id="hard-and-may-go"),
        pytest.param({}, LIMITS, at(201), OLD, Pool(1), SERVE, Reason.TURN, id="hard-waits-for-its-turn"),
        pytest.param({}, LIMITS, at(50), replace(OLD, spent=True), Pool(), RECYCLE, Reason.HARD, id="spent"),
        pytest.param({}, LIMITS, at(50), replace(OLD, spent=True), SUPERVISED, ASK, Reason.HARD, id="spent asks"),
        pytest.param({}, LIMITS, at(50), replace(OLD, spent=True), GO, RECYCLE, Reason.HARD, id="spent, and told"),
        pytest.param({}, LIMITS, at(50), History(NOW, spent=True), Pool(), SERVE, Reason.WITHIN, id="spent, and young"),
        pytest.param({}, LIMITS, at(50, rss=201), OLD, Pool(), RECYCLE, Reason.HARD, id="hard-is-of-rss"),
        pytest.param({}, LIMITS, at(None, rss=201), OLD, Pool(), RECYCLE, Reason.HARD, id="hard-needs-only-rss"),
        pytest.param({}, LIMITS, Snapshot(None, None), OLD, Pool(), SERVE, Reason.UNKNOWN, id="no-figures"),
        # its lifetime
        pytest.param({}, AGED, at(50), replace(OLD, ready_at=NOW - 54.9), Pool(), SERVE, Reason.WITHIN, id="not its time yet"),
        pytest.param({}, AGED, at(50), OLD, Pool(), RECYCLE, Reason.LIFETIME, id="its time"),
        pytest.param({}, AGED, NO_FIGURES, OLD, Pool(), RECYCLE, Reason.LIFETIME, id="its time, by the clock alone"),
        pytest.param({}, replace(AGED, soft=None, early=None), at(50), OLD, Pool(), RECYCLE, Reason.LIFETIME, id="no other limit"),
        pytest.param({}, AGED, at(99), replace(OLD, refused=True), Pool(), RECYCLE, Reason.LIFETIME, id="its other limit is refused"),
        pytest.param({"min_lifetime": 70}, AGED, at(50), OLD, Pool(), SERVE, Reason.WITHIN, id="never younger than it may"),
        pytest.param({"min_lifetime": 70}, AGED, at(50), OLD, Pool(short=True), SERVE, Reason.WITHIN, id="nor when memory is short"),
        pytest.param({}, AGED, at(99), replace(OLD, reclaimed_at=None), Pool(), RECYCLE, Reason.LIFETIME, id="who goes reclaims nothing"),
        pytest.param({}, AGED, at(99), replace(OLD, reclaimed_at=None), Pool(1), RECLAIM, Reason.SOFT, id="who waits does"),
        pytest.param({"sustain": 9}, AGED, at(99), OLD, Pool(), RECYCLE, Reason.LIFETIME, id="over its limit, not for long enough"),
        pytest.param({}, AGED, at(102), STEPPED, Pool(settled=9), RECYCLE, Reason.LIFETIME, id="settled, and its time"),
        pytest.param({}, AGED, at(99), OLD, Pool(), RECYCLE, Reason.SOFT, id="over both"),
        pytest.param({}, AGED, at(50), OLD, Pool(1), SERVE, Reason.WITHIN, id="another is away, so it waits"),
        pytest.param({}, AGED, at(50), OLD, Pool(1, turns=2), RECYCLE, Reason.LIFETIME, id="two may"),
        pytest.param({}, AGED, at(50), OLD, Pool(missing=1), SERVE, Reason.WITHIN, id="another is to be brought up yet"),
        pytest.param({}, AGED, at(99), OLD, Pool(missing=1), RECYCLE, Reason.SOFT, id="memory does not wait for that"),
        pytest.param({}, AGED, at(50), OLD, SUPERVISED, ASK, Reason.LIFETIME, id="its time, so it asks"),
        pytest.param({}, AGED, NO_FIGURES, OLD, SUPERVISED, ASK, Reason.LIFETIME, id="it asks without figures"),
        pytest.param({}, AGED, at(50), OLD, PERMIT, RECYCLE, Reason.LIFETIME, id="its time, and it may go"),
        pytest.param({}, AGED, at(80, speed=11), OLD, PERMIT, RECYCLE, Reason.LIFETIME, id="its time beats soon"),
        pytest.param({}, AGED, at(50), OLD, SUPERVISED._replace(out=True), ASK, Reason.LIFETIME, id="its time is no reason to hurry"),
        pytest.param({}, AGED, at(50), OLD, GO, RECYCLE, Reason.LIFETIME, id="its time, and told"),
        pytest.param({}, AGED, at(99), OLD, GO, RECYCLE, Reason.SOFT, id="told, over both"),
        pytest.param({}, AGED, at(50), replace(OLD, ready_at=NOW - 9), GO, RECYCLE, Reason.REPLACED, id="told before its time"),
        pytest.param({}, AGED, at(50), OLD, Pool(abandoned=True), SERVE, Reason.ABANDONED, id="its time, and nobody would replace it"),
        pytest.param(
            {}, AGED, at(99), replace(OLD, reclaimed_at=None), Pool(abandoned=True), RECLAIM, Reason.SOFT, id="it reclaims all the same"
        ),
        # an operator's order
        pytest.param({}, LIMITS, at(50), ORDERED, SUPERVISED, ASK, Reason.OPERATOR, id="ordered, so it asks"),
        pytest.param({}, LIMITS, at(50), ORDERED, GO, RECYCLE, Reason.OPERATOR, id="ordered, and its replacement serves"),
        pytest.param({}, LIMITS, at(50), ORDERED, PERMIT, RECYCLE, Reason.OPERATOR, id="ordered, and it may go"),
        pytest.param({}, LIMITS, NO_FIGURES, ORDERED, GO, RECYCLE, Reason.OPERATOR, id="ordered, without figures"),
        pytest.param({}, LIMITS, at(99), ORDERED, GO, RECYCLE, Reason.SOFT, id="ordered, and over its limit"),
        pytest.param({}, AGED, at(50), ORDERED, GO, RECYCLE, Reason.OPERATOR, id="ordered beats its time"),
        pytest.param({}, LIMITS, at(50), replace(ORDERED, ready_at=NOW), SUPERVISED, ASK, Reason.OPERATOR, id="ordered right after boot"),
        pytest.param({}, LIMITS, at(50), ORDERED, Pool(), RECYCLE, Reason.OPERATOR, id="ordered, its turn"),
        pytest.param({}, LIMITS, at(50), ORDERED, Pool(1), SERVE, Reason.WITHIN, id="ordered, another is away"),
        pytest.param({}, LIMITS, at(50), ORDERED, Pool(missing=1), SERVE, Reason.WITHIN, id="ordered, another is to be brought up yet"),
        pytest.param({}, LIMITS, at(50), ORDERED, Pool(abandoned=True), SERVE, Reason.ABANDONED, id="ordered, nobody would replace it"),
        pytest.param({}, Limits(soft=None), at(999), OLD, Pool(), SERVE, Reason.UNKNOWN, id="no-limits"),
        pytest.param({}, Limits(soft=None, hard=200 * MIB), at(201), OLD, Pool(), RECYCLE, Reason.HARD, id="only-a-hard-limit"),
    ],
)
def test_each_rung(
    policy: dict[str, float], limits: Limits, seen: Snapshot, history: History, pool: Pool, action: Action, reason: Reason
) -> None:
    """One row a rung of the ladder, just before it and just on it."""
    decided = decide(Policy(jitter=0, **policy), limits, seen, history, pool, NOW)  # type: ignore[arg-type]

    assert Decision(action, reason) == decided


memory = st.integers(0, 300 * MIB)
times = st.floats(NOW - 100, NOW)
histories = st.builds(
    History, ready_at=times, breached_since=st.none() | times, breached_with=st.none() | memory, breached_by_jump=st.booleans(),
    climbed=st.booleans(), reclaimed_at=st.none() | times, futile=st.integers(0, 7), refused=st.booleans(),
    spent=st.booleans(), asked_at=st.none() | times,
    stays=st.booleans(),
)  # fmt: skip
pools = st.builds(
    Pool, away=st.integers(0, 3), turns=st.integers(1, 3), short=st.booleans(), full=st.booleans(), out=st.booleans(),
    leaving=st.integers(0, 3), supervised=st.booleans(), order=st.sampled_from(Order), boot=st.floats(0, 9), settled=st.integers(0, 5),
    missing=st.integers(0, 2), abandoned=st.just(False),
)  # fmt: skip
policies = st.builds(
    lambda sustain, reclaim, min_lifetime: Policy(sustain=sustain, reclaim=reclaim, min_lifetime=min_lifetime),
    st.floats(0, 50), st.booleans(), st.floats(0, 50),
)  # fmt: skip
limits = st.builds(
    lambda soft, early, hard, lifetime: Limits(
        soft=soft * MIB, early=int(soft * MIB * early), hard=hard and (soft + hard) * MIB, max_lifetime=lifetime, lifetime=lifetime
    ),
    st.integers(1, 200), st.floats(0.1, 1), st.none() | st.integers(1, 100), st.none() | st.floats(0, 100),
)  # fmt: skip


@given(policies, limits, memory, memory, histories, pools)
def test_more_memory_never_gives_a_milder_action(
    policy: Policy, limits: Limits, less: int, more: int, history: History, pool: Pool
) -> None:
    """Law: with everything else equal, the action only grows with memory."""
    order = list(Action)

    mild, hard = (decide(policy, limits, Snapshot(size, size), history, pool, NOW) for size in sorted((less, more)))

    assert order.index(mild.action) <= order.index(hard.action)


@given(policies, limits, st.none() | memory, histories, pools)
def test_unknown_memory_never_acts(policy: Policy, limits: Limits, used: int | None, history: History, pool: Pool) -> None:
    """Law: a figure that could not be read is no reason for anything; nor is a limit that is not there."""
    pool, limits = pool._replace(order=Order.PERMIT), replace(limits, lifetime=None)
    no_figure = decide(policy, limits, Snapshot(None, None), history, pool, NOW)
    no_limits = decide(policy, Limits(soft=None), Snapshot(used, used), history, pool, NOW)

    assert [no_figure.action, no_limits.action] == [SERVE, SERVE]


@given(policies, limits, memory, histories, pools)
def test_refused_never_recycles_on_soft(policy: Policy, limits: Limits, used: int, history: History, pool: Pool) -> None:
    """Law: a soft limit below what a worker needs is no limit."""
    limits = replace(limits, lifetime=None)
    decided = decide(policy, limits, Snapshot(used, used), replace(history, refused=True, asked_at=None), pool, NOW)

    assert decided.reason in (Reason.HARD, Reason.REPLACED, Reason.BUDGET) or decided.action is SERVE


@given(policies, limits, memory, histories, pools)
def test_a_supervisor_decides_who_goes(policy: Policy, limits: Limits, used: int, history: History, pool: Pool) -> None:
    """Law: where there is one, nobody goes without its order until the kernel is about to kill; and whoever has lost it stays."""
    alone = pool._replace(supervised=True, order=Order.NONE, out=False)  # nor is a burst known
    unordered = decide(policy, limits, Snapshot(used, used), history, alone, NOW)
    abandoned = decide(policy, limits, Snapshot(used, used), history, pool._replace(abandoned=True), NOW)

    assert unordered.action is not RECYCLE
    assert abandoned.action in (SERVE, RECLAIM)


@given(policies, limits, st.none() | memory, histories, pools, times)
def test_an_older_worker_never_has_a_milder_action(
    policy: Policy, limits: Limits, used: int | None, history: History, pool: Pool, born: float
) -> None:
    """Law: with everything else equal, the action only grows with age; before min_lifetime nobody goes for it."""
    order, seen = list(Action), Snapshot(used, used)
    older, younger = sorted((history.ready_at, born))

    mild, hard = (decide(policy, limits, seen, replace(history, ready_at=at), pool, NOW) for at in (younger, older))

    assert order.index(mild.action) <= order.index(hard.action)
    assert mild.reason is not Reason.LIFETIME or pool.order is Order.GO or NOW - younger >= policy.min_lifetime


@given(policies, limits, st.none() | memory, histories, pools, st.booleans())
def test_an_operator_s_order_only_adds(
    policy: Policy, limits: Limits, used: int | None, history: History, pool: Pool, abandoned: bool
) -> None:
    """Law: with an order the action is never milder, and a supervised worker that is not told to go keeps serving."""
    seen, order, pool = Snapshot(used, used), list(Action), pool._replace(abandoned=abandoned)
    without = decide(policy, limits, seen, replace(history, ordered=None), pool, NOW)

    with_it = decide(policy, limits, seen, replace(history, ordered=Reason.OPERATOR), pool, NOW)

    assert order.index(without.action) <= order.index(with_it.action)
    if pool.supervised and pool.order is Order.NONE and without.action is not RECYCLE:
        assert with_it.action is not RECYCLE


@given(policies, limits, st.none() | memory, histories, pools, st.booleans())
def test_a_lifetime_only_adds(policy: Policy, limits: Limits, used: int | None, history: History, pool: Pool, abandoned: bool) -> None:
    """Law: before it is over it changes nothing; afterwards the action is never milder, and only other where that leaves for its age."""
    seen, order, pool = Snapshot(used, used), list(Action), pool._replace(abandoned=abandoned)
    without = decide(policy, replace(limits, lifetime=None), seen, history, pool, NOW)

    with_it = decide(policy, limits, seen, history, pool, NOW)

    if limits.lifetime is None or NOW - history.ready_at < limits.lifetime:
        assert with_it == without
    assert order.index(without.action) <= order.index(with_it.action)
    if without.action is not with_it.action:
        assert with_it.reason is Reason.LIFETIME
        assert not abandoned


@given(policies, limits, memory, histories, pools, st.floats(0, 9.99))
def test_reclaims_at_most_every_so_often(policy: Policy, limits: Limits, used: int, history: History, pool: Pool, ago: float) -> None:
    """Law: no second attempt within RECLAIM_EVERY, and none at all where the policy has none."""
    lately = decide(policy, limits, Snapshot(used, used), replace(history, reclaimed_at=NOW - ago), pool, NOW)
    never = decide(Policy(reclaim=False), limits, Snapshot(used, used), history, pool, NOW)

    assert RECLAIM not in (lately.action, never.action)


@given(st.integers(1, 4), st.lists(st.tuples(st.integers(0, 9), st.integers(80, 300)), max_size=60))
def test_no_more_than_turns_go_at_once(turns: int, asking: list[tuple[int, int]]) -> None:
    """Law: where workers take turns among themselves, never more than `turns` of a pool are away, whatever they hold, and however old."""
    away: set[int] = set()
    for worker, used in asking:
        if worker in away:
            away.discard(worker)  # it has ended, and its replacement serves
            continue

        if decide(Policy(), AGED, at(used), OLD, Pool(len(away), turns), NOW).action is RECYCLE:
            away.add(worker)

        assert len(away) <= turns


@pytest.mark.parametrize(
    ("breach", "used", "age", "expected"),
    [
        pytest.param((5, 120, True, False), 121, 10, True, id="in one step, and stayed"),
        pytest.param((50, 120, True, False), 121, 60, True, id="at any age"),
        pytest.param((5, 120, True, False), 129, 10, True, id="grew by less than a tenth"),
        pytest.param((5, 120, True, False), 130, 10, False, id="still grows"),
        pytest.param((5, 120, True, False), 121, 9, False, id="has not shown it yet"),
        pytest.param((5, 120, False, False), 121, 10, False, id="climbed there"),
        pytest.param((19.5, 120, True, True), 121, 20, False, id="a leak that fills its limit in a moment"),
        pytest.param((19, 120, True, True), 121, 20, True, id="it seemed to climb, and has stayed for a while"),
        pytest.param((None, None, True, False), 50, 10, False, id="is not over"),
        pytest.param((5, 120, True, False), None, 10, False, id="no figure"),
    ],
)
def test_has_settled(breach: tuple[float | None, int | None, bool, bool], used: int | None, age: float, expected: bool) -> None:
    """An app that loads its models with its first work, or has met one heavy request, stays where it came to; a leak does not."""
    since, began_with, step, climbed = breach
    history = History(
        NOW,
        None if since is None else NOW + since,
        None if began_with is None else began_with * MIB,
        breached_by_jump=step,
        climbed=climbed,
    )

    settled = has_settled(Policy(min_lifetime=10), LIMITS, None if used is None else used * MIB, history, NOW + age)

    assert expected is settled


def test_one_that_stays_has_a_limit_all_the_same() -> None:
    """It is above what it has settled at, and never above the hard one."""
    assert settled_limits(LIMITS, 120 * MIB).early == 145 * MIB
    assert settled_limits(LIMITS, 190 * MIB).early == LIMITS.hard
    assert settled_limits(Limits(soft=None), 190 * MIB) == Limits(soft=None)


@pytest.mark.parametrize(
    ("began_with", "growth", "expected"), [(30, 30, True), (30, 29, False), (None, 99, False), (30, None, False), (95, 1, True)]
)
def test_jumped(began_with: int | None, growth: int | None, expected: bool) -> None:
    """At least half of the way up from where it began, at once."""
    sizes = (None if size is None else size * MIB for size in (began_with, growth))

    assert jumped(LIMITS, *sizes) is expected


@pytest.mark.parametrize(
    ("used", "bound", "growth", "boot", "expected"),
    [
        pytest.param(90, 100, Growth(), 9.0, False, id="below it"),
        pytest.param(101, 100, Growth(), 9.0, True, id="above it"),
        pytest.param(90, 100, Growth(steady=20), 0.2, False, id="a replacement helps before that"),
        pytest.param(90, 100, Growth(steady=21), 0.2, True, id="not before that"),
        pytest.param(90, 100, Growth(steady=10), 9.0, False, id="what is far off can wait"),
        pytest.param(90, 100, Growth(steady=11), 9.0, True, id="what is near can't"),
        pytest.param(90, 100, Growth(burst=33), 9.0, False, id="a balloon that fits"),
        pytest.param(90, 100, Growth(burst=34), 9.0, True, id="a balloon that does not"),
        pytest.param(None, 100, Growth(99, 99), 9.0, False, id="nobody knows what is used"),
        pytest.param(99, None, Growth(99, 99), 9.0, False, id="nobody knows the bound"),
    ],
)
def test_is_short(used: int | None, bound: int | None, growth: Growth, boot: float, expected: bool) -> None:
    """Above the bound now, or before anything can be done about it; what is not known is no reason."""
    assert is_short(used, bound, growth, boot) is expected


@pytest.mark.parametrize(
    ("used", "fresh", "growth", "expected"),
    [
        pytest.param(60, 30, Growth(), False, id="room for one more"),
        pytest.param(80, 30, Growth(), True, id="no room"),
        pytest.param(60, 30, Growth(burst=50), True, id="not for one that grows as fast"),
        pytest.param(80, 0, Growth(), False, id="nobody knows what one more takes"),
        pytest.param(None, 30, Growth(), False, id="nobody knows what is used"),
    ],
)
def test_holds_up(used: int | None, fresh: int, growth: Growth, expected: bool) -> None:
    """Whether there is room for another worker before the one that leaves is gone."""
    assert holds_up(used, 100, growth, 1.0, fresh) is expected


@pytest.mark.parametrize(
    ("full", "burst", "action"), [(False, 200, Action.RECLAIM), (True, 200, Action.RECYCLE), (True, 1, Action.RECLAIM)]
)
def test_a_worker_that_grows_fast_in_a_full_pool_does_not_stop_to_reclaim(full: bool, burst: int, action: Action) -> None:
    """It would take as much meanwhile as it might give back."""
    limits = Limits(soft=100 * MIB, hard=None, early=100 * MIB, metric="rss", budget=None)
    history = History(ready_at=0.0, breached_since=99.0, breached_with=101 * MIB)
    pool = Pool(full=full, short=full, supervised=True, turns=1)

    assert decide(Policy(), limits, Snapshot(102 * MIB, 102 * MIB, 0.0, burst * MIB), history, pool, 100.0).action is action


@given(st.builds(Growth, st.floats(0, 1e12), st.floats(0, 1e12)), st.none() | st.integers(-(1 << 40), 1 << 40))
def test_growth_within_a_hard_limit(growth: Growth, room: int | None) -> None:
    """Law: what a worker may still get is all that it can grow by, however fast it does."""
    bounded = within(growth, room)

    assert bounded.steady == growth.steady
    assert bounded.burst * GOES_ON_FOR <= (float("inf") if room is None else max(0, room) * 1.000001)
    assert bounded.burst <= growth.burst
