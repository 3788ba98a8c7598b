"""What a worker with these figures should do."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oomsafe.policy.decide import (
    RECLAIM_EVERY,
    WAITS_UP_TO,
    Action,
    Decision,
    History,
    Pool,
    Reason,
    Snapshot,
    decide,
    has_settled,
    may_leave,
)
from oomsafe.policy.limits import Limits
from oomsafe.policy.settings import Policy

MIB = 1 << 20
NOW = 1000.0
LIMITS = Limits(soft=100 * MIB, hard=200 * MIB, early=90 * MIB)
OLD = History(ready_at=NOW - 60, breached_since=NOW - 5, reclaimed_at=NOW - 1)

#: It has grown by 60 MiB a second.
FAST = replace(OLD, ready_at=NOW - 1, ready_with=31 * MIB)
SURGES = Pool(surges=True, boot=1.0)
TOLD = Pool(surges=True, told=True)

SERVE, RECLAIM, RECYCLE = Action.SERVE, Action.RECLAIM, Action.RECYCLE


def at(used: int | None, rss: int | None = None) -> Snapshot:
    """Figures in MiB; rss as well where it differs."""
    return Snapshot(*(None if size is None else size * MIB for size in (used, used if rss is None else rss)))


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
        pytest.param({"reclaim": False}, LIMITS, at(101), replace(OLD, reclaimed_at=None), Pool(), RECYCLE, Reason.SOFT, id="no-reclaim"),
        pytest.param({}, LIMITS, at(101), replace(OLD, ready_at=NOW - 9), Pool(), SERVE, Reason.YOUNG, id="young"),
        pytest.param({}, LIMITS, at(101), replace(OLD, ready_at=NOW - 10), Pool(), RECYCLE, Reason.SOFT, id="old-enough"),
        pytest.param(
            {}, LIMITS, at(101), replace(OLD, ready_at=NOW), Pool(over_budget=True), RECYCLE, Reason.SOFT, id="young-in-a-pool-over-budget"
        ),
        pytest.param({"sustain": 6}, LIMITS, at(101), OLD, Pool(), SERVE, Reason.SUSTAIN, id="not-for-long-enough"),
        pytest.param({"sustain": 5}, LIMITS, at(101), OLD, Pool(), RECYCLE, Reason.SOFT, id="for-long-enough"),
        pytest.param({}, LIMITS, at(101), replace(OLD, breached_since=None), Pool(), SERVE, Reason.SUSTAIN, id="no-breach-noted"),
        pytest.param({}, LIMITS, at(101), OLD, Pool(draining=1), SERVE, Reason.TURN, id="another-drains"),
        pytest.param({}, LIMITS, at(101), OLD, Pool(draining=1, turns=2), RECYCLE, Reason.SOFT, id="two-turns"),
        pytest.param({}, LIMITS, at(95), OLD, Pool(replacing=1), SERVE, Reason.TURN, id="another-starts"),
        pytest.param({}, LIMITS, at(101), OLD, Pool(replacing=1), RECYCLE, Reason.SOFT, id="above-soft-waits-for-no-start"),
        pytest.param({}, LIMITS, at(126), OLD, Pool(draining=9), RECYCLE, Reason.SOFT, id="a-quarter-over"),
        pytest.param({}, LIMITS, at(91), OLD, SURGES, SERVE, Reason.SURGE, id="waits-for-its-replacement"),
        pytest.param({}, LIMITS, at(120), OLD, SURGES, SERVE, Reason.SURGE, id="waits-up-to-a-fifth-over"),
        pytest.param({}, LIMITS, at(121), OLD, SURGES, RECYCLE, Reason.SOFT, id="and-no-longer"),
        pytest.param({"min_lifetime": 0}, LIMITS, at(91), FAST, SURGES, RECYCLE, Reason.SOFT, id="too-fast-to-wait"),
        pytest.param(
            {"min_lifetime": 0}, LIMITS, at(91), FAST, SURGES._replace(draining=1), SERVE, Reason.TURN, id="too-fast-and-another-drains"
        ),
        pytest.param(
            {"min_lifetime": 0}, LIMITS, at(91), FAST, SURGES._replace(boot=0.1), SERVE, Reason.SURGE, id="not-too-fast-for-a-quick-boot"
        ),
        pytest.param({}, LIMITS, at(126), OLD, SURGES._replace(boots_fail=True), SERVE, Reason.BOOT, id="nobody-would-take-its-place"),
        pytest.param({}, LIMITS, at(126), OLD, Pool(boots_fail=True), SERVE, Reason.BOOT, id="nor-without-surge"),
        pytest.param({}, LIMITS, at(126), OLD, Pool(boots_fail=True, over_budget=True), RECYCLE, Reason.SOFT, id="the-pool-matters-more"),
        pytest.param({}, LIMITS, at(91), OLD, TOLD, RECYCLE, Reason.SOFT, id="told"),
        pytest.param({}, LIMITS, at(91), History(NOW), TOLD, RECYCLE, Reason.SOFT, id="told-beats-age-reclaim-and-sustain"),
        pytest.param({}, LIMITS, at(90), OLD, TOLD, RECYCLE, Reason.REPLACED, id="told-though-it-is-below-its-limit-again"),
        pytest.param({}, LIMITS, Snapshot(None, None), OLD, TOLD, RECYCLE, Reason.REPLACED, id="told-without-figures"),
        pytest.param({}, LIMITS, at(150), replace(OLD, refused=True), TOLD, RECYCLE, Reason.REPLACED, id="told-though-refused"),
        pytest.param({"sustain": 99}, LIMITS, at(201), History(NOW), Pool(draining=9), RECYCLE, Reason.HARD, id="hard-beats-everything"),
        pytest.param({}, LIMITS, at(50, rss=201), OLD, Pool(), RECYCLE, Reason.HARD, id="hard-is-of-rss"),
        pytest.param({}, LIMITS, at(None, rss=201), OLD, Pool(), RECYCLE, Reason.HARD, id="hard-needs-only-rss"),
        pytest.param({}, LIMITS, Snapshot(None, None), OLD, Pool(), SERVE, Reason.UNKNOWN, id="no-figures"),
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
histories = st.builds(History, times, st.none() | times, st.none() | memory, st.none() | times, st.booleans())
pools = st.builds(
    lambda draining, replacing, turns, over_budget, surges, boots_fail: Pool(
        draining, replacing, turns, over_budget, surges=surges, boots_fail=boots_fail
    ),
    st.integers(0, 5), st.integers(0, 5), st.integers(1, 3), st.booleans(), st.booleans(), st.booleans(),
)  # fmt: skip
policies = st.builds(
    lambda sustain, reclaim, min_lifetime: Policy(sustain=sustain, reclaim=reclaim, min_lifetime=min_lifetime),
    st.floats(0, 50), st.booleans(), st.floats(0, 50),
)  # fmt: skip
limits = st.builds(
    lambda soft, early, hard: Limits(soft=soft * MIB, early=int(soft * MIB * early), hard=hard and (soft + hard) * MIB),
    st.integers(1, 200), st.floats(0.1, 1), st.none() | st.integers(1, 100),
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
    no_figure = decide(policy, limits, Snapshot(None, None), history, pool, NOW)
    no_limits = decide(policy, Limits(soft=None), Snapshot(used, used), history, pool, NOW)

    assert [no_figure.action, no_limits.action] == [SERVE, SERVE]


@given(policies, limits, memory, histories, pools)
def test_refused_never_recycles_on_soft(policy: Policy, limits: Limits, used: int, history: History, pool: Pool) -> None:
    """Law: a soft limit below what a worker needs is no limit."""
    decided = decide(policy, limits, Snapshot(used, used), replace(history, refused=True), pool, NOW)

    assert decided.reason is Reason.HARD or decided.action is SERVE


@given(policies, limits, memory, histories, pools)
def test_hard_beats_everything(policy: Policy, limits: Limits, used: int, history: History, pool: Pool) -> None:
    """Law: above the hard limit there is only one answer; below it that is never the reason."""
    decided = decide(policy, limits, Snapshot(used, used), history, pool, NOW)

    above = limits.hard is not None and used > limits.hard
    assert above == (decided == Decision(RECYCLE, Reason.HARD))


@given(policies, limits, memory, histories, pools, st.floats(0, 9.99))
def test_reclaims_at_most_every_so_often(policy: Policy, limits: Limits, used: int, history: History, pool: Pool, ago: float) -> None:
    """Law: no second attempt within RECLAIM_EVERY, and none at all where the policy has none."""
    lately = decide(policy, limits, Snapshot(used, used), replace(history, reclaimed_at=NOW - ago), pool, NOW)
    never = decide(Policy(reclaim=False), limits, Snapshot(used, used), history, pool, NOW)

    assert RECLAIM not in (lately.action, never.action)


@given(st.integers(1, 4), st.lists(st.tuples(st.integers(0, 9), st.integers(80, 105)), max_size=60), st.data())
def test_no_more_than_turns_go_at_once(turns: int, asking: list[tuple[int, int]], data: st.DataObject) -> None:
    """Law: up to 1.05 x soft, however they ask, never more than `turns` of a pool drain at the same time."""
    draining: set[int] = set()
    for worker, used in asking:
        if worker in draining:
            draining.discard(worker)  # it has ended, and its replacement asks later
            continue
        replacing = data.draw(st.integers(0, 3))

        if may_leave(used * MIB, 100 * MIB, Pool(len(draining), replacing, turns)):
            draining.add(worker)

        assert len(draining) <= turns


@given(st.integers(1, 1 << 40), st.integers(0, 1 << 41), pools)
def test_more_memory_never_waits_longer(soft: int, used: int, pool: Pool) -> None:
    """Law: who may leave may also leave with more."""
    if may_leave(used, soft, pool):
        assert may_leave(used + 1, soft, pool)
    assert may_leave(int(soft * WAITS_UP_TO) + 1, soft, pool)


@pytest.mark.parametrize(
    ("since", "began_with", "used", "age", "expected"),
    [
        pytest.param(5, 120, 121, 10, True, id="went-over-young-and-stayed"),
        pytest.param(5, 120, 129, 10, True, id="grew-by-less-than-a-tenth"),
        pytest.param(5, 120, 130, 10, False, id="still-grows"),
        pytest.param(5, 120, 121, 9, False, id="has-not-shown-it-yet"),
        pytest.param(10, 120, 121, 20, False, id="went-over-later"),
        pytest.param(None, None, 50, 10, False, id="is-not-over"),
        pytest.param(5, 120, None, 10, False, id="no-figure"),
    ],
)
def test_has_settled(since: float | None, began_with: int | None, used: int | None, age: float, expected: bool) -> None:
    """An app that loads its models with its first work goes over its limit early, and stays there; a leak does not stay."""
    history = History(NOW, None if since is None else NOW + since, None if began_with is None else began_with * MIB)

    settled = has_settled(Policy(min_lifetime=10), LIMITS, None if used is None else used * MIB, history, NOW + age)

    assert expected is settled
