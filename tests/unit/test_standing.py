"""What a pool reckons with while the kernel's limits move."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.scripted import CGROUP

from oomsafe.policy.limits import Capacity, Kind, Source, resolve_limits
from oomsafe.policy.settings import Policy
from oomsafe.policy.standing import LASTS, STILL, Standing, follow, in_force, is_another_limit, reckons_as

MIB = 1 << 20


def cap(limit: int | None, others: int = 0, source: Source = CGROUP) -> Capacity:
    """In MiB."""
    total = None if limit is None else limit * MIB
    return Capacity(total, source, working_set=(others + 50) * MIB, others=others * MIB)


def after(*seen: tuple[float, Capacity]) -> Standing:
    """What stands after all these were seen, each at its time; the first is what the pool began with."""
    standing = Standing(seen[0][1])
    for at, capacity in seen[1:]:
        standing = follow(standing, capacity, at)
    return standing


def test_less_holds_at_once() -> None:
    """The kernel does not wait either."""
    assert after((0, cap(600)), (1, cap(300))).capacity.limit == 300 * MIB
    assert after((0, cap(600)), (1, cap(600, others=200))).capacity.room == 400 * MIB


def test_more_holds_when_it_has_lasted() -> None:
    """Not before, and no more than there was all the time."""
    looks = [(at, cap(450 if at == 5 else 600)) for at in range(1, int(LASTS) + 1)]

    assert after((0, cap(300)), *looks).capacity.limit == 300 * MIB
    assert after((0, cap(300)), *looks, (LASTS + 1, cap(600))).capacity.limit == 450 * MIB


def test_a_limit_that_flickers_is_the_lower_one() -> None:
    """Every second another: nothing changes after the first time."""
    looks = [(at, cap(300 if at % 2 else 600)) for at in range(1, 60)]

    assert after((0, cap(600)), *looks).capacity.limit == 300 * MIB


def test_what_others_use_may_breathe() -> None:
    """By little, nothing is reckoned anew; the very least that is left counts where it is decided."""
    standing, now = after((0, cap(600, others=100)), (1, cap(600, others=105))), cap(600, others=105)

    assert standing.capacity == cap(600, others=100)
    assert in_force(standing, now) == now
    assert in_force(standing, cap(600, others=95)).room == 500 * MIB


def test_what_is_in_force_is_held_by_the_pool_now() -> None:
    """The limit is the one of before, and what the pool holds is what it holds."""
    capacity = in_force(after((0, cap(300)), (1, cap(600))), replace(cap(600), working_set=120 * MIB))

    assert (capacity.limit, capacity.held) == (300 * MIB, 120 * MIB)


@pytest.mark.parametrize(
    ("before", "now", "another"),
    [
        pytest.param(cap(600), cap(300), True, id="set anew"),
        pytest.param(cap(600), cap(600, others=300), False, id="others use more"),
        pytest.param(cap(600), cap(900, source=Source(Kind.CGROUP, "/", 2)), False, id="an ancestor's leaves less"),
        pytest.param(cap(600), cap(None), True, id="gone"),
    ],
)
def test_what_another_limit_is(before: Capacity, now: Capacity, another: bool) -> None:
    """What workers have learnt under one limit holds while it is the same."""
    assert is_another_limit(before, now) is another
    assert is_another_limit(before, before) is False


def test_a_supervisor_that_grows_is_reckoned_with() -> None:
    """Its own memory is not its workers'."""
    before, little, much = (replace(cap(600), supervisor_rss=size * MIB) for size in (30, 35, 90))

    assert reckons_as(before, little)
    assert not reckons_as(before, much)


capacities = st.builds(cap, st.none() | st.integers(1, 1 << 20), st.integers(0, 1 << 20), st.sampled_from("ab"))


@given(st.lists(capacities, min_size=1, max_size=30))
def test_no_pool_reckons_with_more_than_it_has(seen: list[Capacity]) -> None:
    """Law: whatever was seen, the room that is in force is never above that of now; a breath aside where others use it."""
    standing = after(*((float(at), capacity) for at, capacity in enumerate(seen)))

    force, room = in_force(standing, seen[-1]).room, seen[-1].room
    if room is not None:
        assert force is not None
        assert force <= room
    if standing.capacity.room is not None and room is not None:
        assert standing.capacity.room <= room / (1 - STILL) + 1
    assert resolve_limits(Policy(), standing.capacity)[0] is not None
