"""The arithmetic of oomsafe advise: its laws, and that the pool itself would compute and accept what is advised."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from oomsafe.policy.limits import MACHINE, Capacity, Limits, resolve_limits
from oomsafe.policy.recycle import within_reach
from oomsafe.policy.settings import Policy
from oomsafe.policy.sizing.advice import Bound, TooSmall, advise, holds, leaks_fast, would_do
from oomsafe.policy.sizing.facts import Facts, Style, preloaded
from oomsafe.policy.units import GIB, KIB, MIB

SHOP = Facts(limit=2 * GIB, cpus=2, fresh=180 * MIB, supervisor=60 * MIB, growth=40 * KIB, balloon=200 * MIB, rate=50)


@st.composite
def facts(draw: st.DrawFn) -> Facts:
    """Of a pool that may well not fit."""
    fresh = draw(st.integers(5 * MIB, 2 * GIB))
    shared = draw(st.none() | st.integers(0, fresh))
    return Facts(
        limit=draw(st.integers(16 * MIB, 64 * GIB)),
        others=draw(st.none() | st.integers(0, 8 * GIB)),
        cpus=draw(st.none() | st.floats(0.05, 256)),
        style=draw(st.sampled_from(Style)),
        fresh=fresh,
        shared=shared,
        supervisor=draw(st.none() | st.just(0) | st.integers(shared or 0, 4 * GIB)),
        growth=draw(st.none() | st.just(0.0) | st.floats(0, 64 * MIB)),
        balloon=draw(st.none() | st.integers(0, 4 * GIB)),
        rate=draw(st.none() | st.floats(0, 10_000)),
        boot=draw(st.none() | st.floats(0, 300)),
        workers=draw(st.none() | st.integers(1, 64)),
    )


def roomy(of: Facts) -> Facts:
    """With memory for one worker at least."""
    return replace(of, limit=max(of.limit, would_do(of, 1, lives=0)))


def test_an_example_by_hand() -> None:
    """1843 MiB are 90 % of 2 GiB; less 60 and 180 for the supervisor and a replacement, and 0.6 for growth, 5 x 320 are left."""
    advice = advise(SHOP)

    assert (advice.workers, advice.bound, advice.by_cpu, advice.by_memory) == (5, Bound.CPU, 5, 5)
    assert (advice.budget, advice.soft // MIB, (advice.hard or 0) // MIB, advice.metric) == (int(2 * GIB * 0.9), 320, 527, "anon")
    # (304 - 180 - 0.12) MiB at 10 requests of 40 KiB a second
    assert advice.life == pytest.approx(317, abs=1)
    assert advice.recycles == pytest.approx(5 * 3600 / 317, rel=0.01)
    assert advice.balloon_fits is True
    assert (advice.would_do, advice.would_do_for) == (2 * GIB, 5)


@given(facts())
def test_what_is_advised_fits(of: Facts) -> None:
    """All at their soft limits with a replacement in the budget; one at its hard limit, below the kernel's."""
    of = roomy(of)
    advice = advise(of)
    beside = of.parent + advice.headroom

    assert advice.workers * advice.soft + beside <= advice.budget <= of.room
    assert advice.soft >= advice.least_soft
    assert (advice.hard is None) == (of.balloon is None or leaks_fast(of, advice.workers))
    if advice.hard is not None:
        assert (advice.workers - 1) * advice.soft + (advice.hard - of.common) + beside <= of.room
        assert advice.soft < advice.hard <= of.limit
        assert advice.balloon_fits == (advice.hard - of.common > advice.soft + (of.balloon or 0) - MIB)


@given(facts(), st.floats(0, 1))
def test_the_pool_computes_and_accepts_it(of: Facts, jitter: float) -> None:
    """The settings give these very limits, without a warning, and a worker right after boot is below both: none is refused."""
    of = roomy(of)
    advice = advise(of)
    policy = Policy(soft_limit=advice.soft, hard_limit=advice.hard, metric=advice.metric)
    capacity = Capacity(of.limit, MACHINE, supervisor_rss=of.parent, workers=advice.workers, others=of.others)

    limits, warnings = resolve_limits(policy, capacity, jitter)

    assert warnings == []
    assert (limits.soft, limits.hard, limits.metric) == (advice.soft, advice.hard, advice.metric)
    assert within_reach(limits, of.own, of.fresh) == limits
    assert limits.early is not None and limits.early > of.own


@given(facts(), st.integers(0, 8 * GIB))
def test_more_memory_is_never_fewer_workers(of: Facts, more: int) -> None:
    """Nor ever a shorter life of as many."""
    of = roomy(of)
    before, after = advise(of), advise(replace(of, limit=of.limit + more))

    assert after.workers >= before.workers
    same = advise(replace(of, limit=of.limit + more), before.workers)
    assert (same.life is None) == (before.life is None)
    assert before.life is None or same.life is None or same.life >= before.life
    assert before.recycles is None or same.recycles is None or same.recycles <= before.recycles


@given(facts(), st.integers(0, 4 * GIB), st.sampled_from(["fresh", "supervisor", "balloon", "others"]))
def test_whatever_is_larger_never_makes_more_workers(of: Facts, more: int, what: str) -> None:
    """A worker, the supervisor, the largest work, what others use."""
    assume(what != "fresh" or not of.shared)

    assert holds(replace(of, **{what: (getattr(of, what) or 0) + more})) <= holds(of)


@given(facts(), st.integers(1, 64))
def test_the_memory_that_would_do_does(of: Facts, workers: int) -> None:
    """For so many, with a life as it should be; and it is said when they don't fit."""
    of = replace(of, limit=would_do(of, workers))
    advice = advise(of, workers)

    assert advice.by_memory >= workers
    assert advice.balloon_fits is not False
    assert not advice.short_lived


@given(facts(), st.integers(1, 64))
def test_too_small_names_memory_that_holds_them(of: Facts, workers: int) -> None:
    """Of the workers that were asked for."""
    try:
        advise(of, workers)
    except TooSmall as error:
        assert (error.workers, error.holds) == (workers, holds(of))
        assert error.holds < workers
        assert advise(replace(of, limit=error.needs), workers).workers == workers


@given(facts())
def test_what_is_not_known_is_not_made_up(of: Facts) -> None:
    """And without growth nothing is recycled."""
    of = roomy(of)
    advice = advise(of)

    assert (advice.recycles is None) == (of.pace is None)
    assert (advice.life is None) == (of.pace is None)
    assert (advice.by_cpu is None) == (of.cpus is None)
    assert (advice.balloon_fits is None) == (advice.hard is None)
    assert (advice.saved is None) == (not of.preloads)
    if of.pace == 0:
        assert (advice.recycles, advice.life, advice.min_lifetime) == (0, math.inf, None)


@given(facts())
def test_a_worker_may_leave_long_before_it_is_over_its_limit(of: Facts) -> None:
    """min_lifetime, the default or what is advised, is a third of its life at most, unless that is about as long as a boot."""
    of = roomy(of)
    advice = advise(of)
    young = 10 if advice.min_lifetime is None else advice.min_lifetime

    assert advice.life is None or young <= max(1.0, advice.life / 3 + 0.5)
    assert Policy(min_lifetime=young).min_lifetime == young


@given(facts(), st.floats(0, MIB), st.floats(0, 1000), st.floats(1, 4))
def test_more_growth_is_never_fewer_recycles(of: Facts, growth: float, rate: float, times: float) -> None:
    """Of as many workers."""
    faster = roomy(replace(of, growth=growth * times, rate=rate))
    after = advise(faster)
    before = advise(replace(faster, growth=growth), after.workers)

    assert (after.recycles or 0) >= (before.recycles or 0)


@given(facts(), st.integers(32 * MIB, GIB))
def test_what_is_preloaded_counts_once(of: Facts, size: int) -> None:
    """The supervisor holds it, each worker less; with the same workers, each gets a higher limit, and the saving is what they share."""
    of = roomy(replace(of, shared=None, fresh=max(of.fresh, size + MIB)))
    before = advise(of)
    after = advise(preloaded(of, size), before.workers)

    assert after.metric == "private"
    assert after.saved == (before.workers - 1) * size
    assert after.by_memory >= before.by_memory or before.by_memory == 1


def test_processors_and_how_they_are_used() -> None:
    """gunicorn's rule where a worker waits with its work, one each where it does not, and never none."""
    large = replace(SHOP, limit=64 * GIB)

    def workers(cpus: float, style: Style) -> int:
        return advise(replace(large, cpus=cpus, style=style)).workers

    assert [workers(cpus, Style.BLOCKING) for cpus in (0.1, 0.5, 1, 1.5, 2, 8)] == [1, 2, 3, 4, 5, 17]
    assert [workers(cpus, Style.LOOP) for cpus in (0.1, 0.5, 1, 1.5, 2, 8)] == [1, 1, 1, 2, 2, 8]


def test_a_single_worker_whose_largest_work_does_not_fit() -> None:
    """Is better than none; that is said."""
    advice = advise(replace(SHOP, limit=700 * MIB, balloon=2 * GIB))

    assert (advice.workers, advice.bound, advice.balloon_fits) == (1, Bound.MEMORY, False)
    assert advice.would_do > 2 * GIB


def test_it_would_not_advise_what_is_refused_after_boot() -> None:
    """The neighbour: a limit below what a worker needs, as the pool itself would refuse it."""
    refused = within_reach(Limits(soft=170 * MIB, early=170 * MIB), 180 * MIB, 180 * MIB)

    assert refused.soft is None
    with pytest.raises(TooSmall) as told:
        advise(replace(SHOP, limit=256 * MIB))
    assert told.value.needs == 768 * MIB
