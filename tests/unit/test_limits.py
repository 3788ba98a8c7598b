"""A policy and a machine, made into limits in bytes."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from unit.scripted import CGROUP

from oomsafe.errors import ConfigError
from oomsafe.policy.limits import MACHINE, Capacity, Kind, Limits, Source, resolve_limits, turns
from oomsafe.policy.recycle import above_baseline, within_reach
from oomsafe.policy.settings import Policy
from oomsafe.policy.units import GIB, MIB, Percent, format_size

sizes = st.integers(MIB, 1 << 45) | st.floats(0.01, 100).map(lambda share: Percent(round(share, 3)))
optional_bytes = st.none() | st.integers(0, 1 << 45)
capacities = st.builds(Capacity, optional_bytes, st.just("here"), optional_bytes, optional_bytes, st.integers(0, 200), st.integers(0, 20))


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    """Any policy that is not refused."""
    keywords: dict[str, Any] = {
        "soft_limit": draw(st.just("auto") | sizes),
        "hard_limit": draw(st.none() | st.just("auto") | sizes),
        "budget": draw(sizes),
        "jitter": draw(st.floats(0, 0.9)),
    }
    try:
        return Policy(**keywords)
    except ConfigError:
        assume(False)
        raise


@given(policies(), capacities, st.floats(0, 1))
def test_limits_are_in_order(policy: Policy, capacity: Capacity, share: float) -> None:
    """Law: 0 <= early <= soft < hard <= effective limit, and soft and early are known together."""
    limits, warnings = resolve_limits(policy, capacity, share)

    assert (limits.soft is None) == (limits.early is None)
    if limits.soft is not None and limits.early is not None:
        assert 0 <= limits.early <= limits.soft
        assert limits.early >= int(limits.soft * (1 - policy.jitter)) - 1
    if limits.soft is not None and limits.hard:
        assert limits.soft < limits.hard
    for limit in (limits.soft, limits.hard, limits.budget):
        if limit is not None and capacity.limit is not None:
            assert limit <= capacity.limit
    assert all(warning.isprintable() for warning in warnings)


@given(policies(), capacities)
def test_auto_shares_out_the_budget(policy: Policy, capacity: Capacity) -> None:
    """Law: with auto, all workers and the supervisor together stay within the budget."""
    assume(policy.soft_limit == "auto")

    limits, _ = resolve_limits(policy, capacity)

    if limits.soft is not None:
        assert limits.budget is not None
        assert limits.soft * (capacity.workers + capacity.beside) + (capacity.supervisor or 0) <= limits.budget


@given(policies(), capacities)
def test_without_jitter_early_is_soft(policy: Policy, capacity: Capacity) -> None:
    """A worker whose random share is 0 has the whole of its limit."""
    limits, _ = resolve_limits(policy, capacity, 0.0)

    assert limits.early == limits.soft


@given(st.integers(MIB, 1 << 45), st.integers(1, 100), st.integers(1, 100))
def test_more_workers_have_less_each(limit: int, few: int, more: int) -> None:
    """Law: the auto limit never rises with the number of workers."""
    fewer, many = (resolve_limits(Policy(), Capacity(limit, CGROUP, workers=n))[0].soft for n in (few, few + more))

    assert fewer is not None
    assert many is not None
    assert many <= fewer


@pytest.mark.parametrize(
    ("policy", "capacity", "expected"),
    [
        pytest.param({}, Capacity(1000 * MIB, CGROUP, workers=3), Limits(300 * MIB, None, 900 * MIB, 300 * MIB, "private"), id="auto"),
        pytest.param(
            {},
            Capacity(1000 * MIB, CGROUP, supervisor_rss=100 * MIB, workers=4),
            Limits(200 * MIB, None, 900 * MIB, 200 * MIB, "private"),
            id="preloaded",
        ),
        pytest.param({"soft_limit": "50%"}, Capacity(GIB, CGROUP), Limits(GIB // 2, None, int(GIB * 0.9), GIB // 2), id="share"),
        pytest.param({"soft_limit": "2MiB"}, Capacity(None, MACHINE), Limits(2 * MIB, None, None, 2 * MIB), id="bytes-anywhere"),
        pytest.param(
            {},
            Capacity(1000 * MIB, MACHINE, supervisor_rss=800 * MIB, supervisor_held=200 * MIB, workers=2),
            Limits(350 * MIB, None, 900 * MIB, 350 * MIB, "private"),
            id="a-supervisor-that-maps-a-file",
        ),
        pytest.param(
            {}, Capacity(1000 * MIB, MACHINE, workers=2, beside=1), Limits(300 * MIB, None, 900 * MIB, 300 * MIB, "private"), id="beside"
        ),
        pytest.param({}, Capacity(None, MACHINE), Limits(None, None, None, None, "private"), id="auto-of-nothing"),
        pytest.param({"soft_limit": "50%"}, Capacity(None, MACHINE), Limits(None, None, None, None), id="share-of-nothing"),
        pytest.param(
            {"hard_limit": "80%", "soft_limit": "2MiB"},
            Capacity(None, MACHINE),
            Limits(2 * MIB, None, None, 2 * MIB),
            id="hard-of-nothing",
        ),
        pytest.param(
            {"hard_limit": "100MiB"},
            Capacity(GIB, CGROUP),
            Limits(90 * MIB, 100 * MIB, int(GIB * 0.9), 90 * MIB, "private"),
            id="auto-gives-way-to-hard",
        ),
    ],
)
def test_limits(policy: dict[str, Any], capacity: Capacity, expected: Limits) -> None:
    """Auto is an equal share of the budget; without any capacity a share is None, never 0."""
    assert expected == resolve_limits(Policy(**policy), capacity)[0]


@pytest.mark.parametrize(
    ("policy", "soft", "hard", "budget"),
    [
        pytest.param({"soft_limit": "2GiB"}, "auto", None, None, id="soft"),
        pytest.param({"soft_limit": "100MiB", "hard_limit": "2GiB"}, 100 * MIB, None, None, id="hard"),
        pytest.param({"soft_limit": "100MiB", "budget": "2GiB"}, 100 * MIB, None, int(GIB * 0.9), id="budget"),
    ],
)
def test_a_limit_above_the_machine(policy: dict[str, Any], soft: Any, hard: int | None, budget: int | None) -> None:
    """It never stops a start: one warning has both figures and where the second comes from, and auto is used."""
    capacity = Capacity(GIB, Source(Kind.CGROUP, "/x", 2), workers=2)

    limits, warnings = resolve_limits(Policy(**policy), capacity)

    (warning,) = warnings
    assert "2.0 GiB is above the effective limit 1.0 GiB (cgroup v2 /x)" in warning
    auto = int(GIB * 0.9) // 2
    assert (auto if soft == "auto" else soft, hard) == (limits.soft, limits.hard)
    if soft == "auto":
        assert f"auto ({format_size(auto)})" in warning
    if budget is not None:
        assert budget == limits.budget


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        pytest.param({}, "set soft_limit", id="auto"),
        pytest.param({"soft_limit": "50%"}, "soft_limit 50%", id="soft"),
        pytest.param({"soft_limit": "100MiB", "hard_limit": "50%"}, "hard_limit 50%", id="hard"),
    ],
)
def test_a_share_of_what_can_not_be_read_is_said(policy: dict[str, Any], says: str) -> None:
    """A limit that somebody set and that will not be used is never dropped in silence."""
    _, warnings = resolve_limits(Policy(**policy), Capacity(None, MACHINE))

    assert len(warnings) == 1
    assert says in warnings[0]


def test_a_supervisor_that_fills_the_budget() -> None:
    """There is nothing to share out: None, and a warning with both figures."""
    limits, warnings = resolve_limits(Policy(), Capacity(100 * MIB, CGROUP, supervisor_rss=95 * MIB, workers=2))

    assert limits.soft is None
    assert "95.0 MiB" in warnings[0]
    assert "90.0 MiB" in warnings[0]


def test_the_machine_turns_soft_and_hard_round() -> None:
    """90 % of this machine is above the hard limit: 90 % of that is used, and a warning has all three figures."""
    limits, warnings = resolve_limits(Policy(soft_limit="90%", hard_limit="500MiB"), Capacity(GIB, CGROUP))

    assert limits.soft == 450 * MIB
    assert warnings == ["soft_limit 922 MiB is not below hard_limit 500 MiB on this machine: 450 MiB is used in its place"]


@pytest.mark.parametrize(
    ("soft", "workers", "hard"),
    [
        pytest.param("100MiB", 4, 640 * MIB, id="what three others at their soft limits leave"),
        pytest.param("auto", 4, 370 * MIB, id="of what the budget leaves free, too"),
        pytest.param("100MiB", 1, 940 * MIB, id="alone"),
        pytest.param("300MiB", 4, None, id="nothing is left"),
    ],
)
def test_hard_limit_auto(soft: str, workers: int, hard: int | None) -> None:
    """Of 1000 MiB, of which the supervisor has 60: then the pool is within what the kernel allows."""
    capacity = Capacity(1000 * MIB, CGROUP, supervisor_rss=60 * MIB, workers=workers)

    limits, warnings = resolve_limits(Policy(hard_limit="auto", soft_limit=soft, budget="82%"), capacity)

    assert limits.hard == hard
    assert [warning.startswith("hard_limit auto can't be worked out: while 3 other workers") for warning in warnings] == (
        [] if hard else [True]
    )


def test_hard_limit_auto_of_nothing() -> None:
    """Where no limit is known there is none."""
    limits, warnings = resolve_limits(Policy(hard_limit="auto", soft_limit="100MiB"), Capacity(None, CGROUP))

    assert limits.hard is None
    assert warnings == ["no memory limit could be read, so hard_limit auto can't be worked out: set hard_limit to a size"]


def test_others_are_in_the_way() -> None:
    """Of 1000 MiB others use 400: a share of the budget is one of the rest; the limits of one worker are shares of what none can pass."""
    capacity = Capacity(1000 * MIB, CGROUP, supervisor_rss=40 * MIB, workers=2, others=400 * MIB, smallest=800 * MIB)

    limits, warnings = resolve_limits(Policy(hard_limit="50%"), capacity)

    assert (limits.budget, limits.soft, limits.hard) == (540 * MIB, 250 * MIB, 400 * MIB)
    assert warnings == []


@pytest.mark.parametrize(
    ("budget", "expected", "warned"), [("500MiB", 500 * MIB, 0), ("700MiB", int(600 * MIB * 0.9), 0), ("1GiB", int(600 * MIB * 0.9), 1)]
)
def test_a_budget_in_bytes_that_others_leave_no_room_for(budget: str, expected: int, warned: int) -> None:
    """It is what there is; said only where it could never have been more."""
    limits, warnings = resolve_limits(Policy(budget=budget, soft_limit="9MiB"), Capacity(1000 * MIB, CGROUP, others=400 * MIB))

    assert (limits.budget, len(warnings)) == (expected, warned)


def test_others_that_leave_nothing_are_named() -> None:
    """Who can't have auto is told why."""
    _, warnings = resolve_limits(Policy(), Capacity(1000 * MIB, CGROUP, supervisor_rss=95 * MIB, others=900 * MIB))

    assert "the budget is 90.0 MiB (others use 900 MiB of 1000 MiB)" in warnings[0]


@pytest.mark.parametrize(
    ("maximum", "workers", "expected"),
    [(1, 1, 1), (3, 10, 3), ("25%", 8, 2), ("25%", 9, 2), ("25%", 2, 1), ("100%", 5, 5), ("1%", 0, 1)],
)
def test_turns(maximum: Any, workers: int, expected: int) -> None:
    """A share is rounded down, and is at least one."""
    assert expected == turns(Policy(max_unavailable=maximum), workers)


limit = st.none() | st.integers(1, 1 << 40)


@given(st.integers(1, 1 << 40), st.floats(0, 0.9), limit, limit, limit)
def test_limits_in_reach_of_a_baseline(soft: int, jitter: float, hard: int | None, baseline: int | None, rss: int | None) -> None:
    """Law: what is left of the limits is above what a worker held at boot, unless nothing is known; jitter included."""
    limits = Limits(soft, hard, None, int(soft * (1 - jitter)))

    left = above_baseline(within_reach(limits, baseline, rss), baseline)

    if baseline is None:
        assert (limits.soft, limits.early) == (left.soft, left.early)
    else:
        assert all(limit is None or limit > baseline for limit in (left.soft, left.early))
        assert (left.soft is None) == (soft <= baseline)
    assert (left.hard is None) == (hard is None or (rss is not None and hard <= rss))


@given(st.floats(1, 1e6), st.floats(0, 0.9), st.floats(0, 1), st.floats(0, 0.99))
def test_a_lifetime_is_lowered_by_jitter(most: float, jitter: float, share: float, least: float) -> None:
    """Law: min_lifetime <= lifetime <= max_lifetime, and lowered by no more than jitter; it needs no figure of memory."""
    policy = Policy(max_lifetime=most, min_lifetime=most * least, jitter=jitter)

    limits, _ = resolve_limits(policy, Capacity(None, MACHINE), share)

    assert limits.max_lifetime == most
    assert limits.lifetime is not None
    assert max(policy.min_lifetime, most * (1 - jitter)) <= limits.lifetime * (1 + 1e-9)
    assert limits.lifetime <= most
    assert resolve_limits(policy, Capacity(None, MACHINE), 0.0)[0].lifetime == most
