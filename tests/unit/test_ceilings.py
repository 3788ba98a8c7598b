"""Limits of one piece of work: when it is told, when it is stopped, when it is looked at next; and whose deaths are the kernel's."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from oomsafe.policy.ceilings import OFTEN, SELDOM, SUDDEN, Act, Ceiling, in_order, judge, lowered, next_check
from oomsafe.policy.units import GIB, MIB
from oomsafe.policy.verdicts import Verdict, verdict

sizes = st.integers(min_value=0, max_value=64 * GIB)
limits = st.one_of(st.none(), st.integers(min_value=MIB, max_value=64 * GIB))
speeds = st.floats(min_value=-4 * GIB, max_value=64 * GIB)
ceilings = st.builds(Ceiling, limits, limits, st.booleans(), st.sampled_from((0, 4 * MIB))).map(in_order)


@given(ceilings, sizes, sizes, speeds, st.booleans())
def test_a_look(ceiling: Ceiling, before: int, rss: int, speed: float, told: bool) -> None:
    """Stopped above the hard limit and only there; told above the soft one, once; always looked at again in time."""
    look = judge(ceiling, before, rss, speed, told)

    used = rss if ceiling.absolute else max(0, rss - before)
    over_hard = ceiling.hard is not None and used > ceiling.hard + ceiling.spare
    over_soft = ceiling.soft is not None and used > ceiling.soft
    assert look.used == used
    assert (look.act is Act.STOP) == over_hard
    assert (look.act is Act.TELL) == (over_soft and not told and not over_hard)
    assert look.limit == {Act.STOP: ceiling.hard, Act.TELL: ceiling.soft, Act.LEAVE: None}[look.act]
    assert OFTEN <= look.again <= SELDOM


@given(st.integers(min_value=MIB, max_value=8 * GIB), st.floats(min_value=0, max_value=4 * GIB), st.booleans())
def test_nothing_gets_far_over_its_limit_between_two_looks(limit: int, speed: float, jumps: bool) -> None:
    """Whatever the pace up to 4 GiB/s, even from standing still: by no more than what fits between the two soonest looks."""
    ceiling, used, last = Ceiling(hard=limit), 0.0, 0.0 if jumps else speed
    for _ in range(100_000):
        look = judge(ceiling, 0, int(used), last, False)
        if look.act is Act.STOP:
            break
        assert look.again * speed <= max(limit - used, OFTEN * speed) + 1
        used, last = used + look.again * speed, speed
        if speed < MIB:
            break
    assert used <= limit + OFTEN * speed + 1


@given(sizes, sizes, speeds, speeds)
def test_the_less_is_left_the_sooner(headroom: int, less: int, speed: float, faster: float) -> None:
    """Monotonous in both."""
    assert next_check(min(headroom, less), speed) <= next_check(headroom, speed)
    assert next_check(headroom, max(speed, faster)) <= next_check(headroom, speed)
    assert next_check(0, SUDDEN) == OFTEN


@given(ceilings, ceilings)
def test_who_asks_can_only_lower(own: Ceiling, asked: Ceiling) -> None:
    """Neither a limit above the app's, nor none, nor another way to count."""
    got = lowered(own, asked)

    assert got.absolute == own.absolute
    for had, wanted, has in zip(own[:2], asked[:2], got[:2], strict=True):
        assert has in (had, wanted)
        assert had is None or (has is not None and has <= had)
        assert wanted is None or (has is not None and has <= wanted)


def test_verdicts() -> None:
    """The counter must cover every death before it is sure."""
    table = {
        (1, 1, True): Verdict.CONFIRMED, (2, 3, True): Verdict.CONFIRMED, (2, 1, True): Verdict.LIKELY, (1, 1, False): Verdict.LIKELY,
        (1, 0, True): Verdict.NOT_THE_KERNEL, (1, 0, False): Verdict.NOT_THE_KERNEL, (1, None, False): Verdict.UNKNOWN,
    }  # fmt: skip
    assert {case: verdict(*case) for case in table} == table


def test_what_the_kernel_refuses_is_stopped_a_little_later() -> None:
    """While the work handles its MemoryError, it is at its limit; the figure of the limit is the same, and it is looked at in time."""
    ceiling = Ceiling(hard=200 * MIB, spare=4 * MIB)

    at, over = judge(ceiling, 0, 203 * MIB, 0, False), judge(ceiling, 0, 205 * MIB, 0, False)

    assert (at.act, at.again) == (Act.LEAVE, OFTEN)
    assert (over.act, over.limit) == (Act.STOP, 200 * MIB)
