"""Leak, kept, cache or needed: judged from the last retirements of a pool."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.retiring import FRESH, MIB, several, worker

from oomsafe.policy.objects import Cache, Container, Objects
from oomsafe.policy.retention import Kind, judge
from oomsafe.policy.retirement import Point, Retirement


@pytest.mark.parametrize(
    ("retired", "kind"),
    [
        pytest.param([], Kind.UNKNOWN, id="nobody-yet"),
        pytest.param(several(8, 5), Kind.UNKNOWN, id="nobody-has-grown"),
        pytest.param(several(3), Kind.LEAK, id="rises-with-the-work"),
        pytest.param(several(2), Kind.UNKNOWN, id="two-are-too-few-for-a-leak"),
        pytest.param(several(2, kept=80), Kind.KEPT, id="kept-by-python"),
        pytest.param(several(2, kept=80, by_malloc=True), Kind.KEPT, id="kept-by-malloc"),
        pytest.param(several(1, kept=80), Kind.UNKNOWN, id="one-is-too-few"),
        pytest.param(several(3, shape="levels"), Kind.CACHE, id="levels-off"),
        pytest.param(several(3, shape="at once"), Kind.NEEDED, id="needed-at-once"),
        pytest.param(several(3, shape="late"), Kind.UNKNOWN, id="no-shape-that-tells"),
        pytest.param([worker(100, 1000), worker(100, 20), worker(100, 60000)], Kind.UNKNOWN, id="goes-on-and-is-not-alike"),
        pytest.param(several(8, work=3), Kind.UNKNOWN, id="too-little-work-to-tell-a-leak-from-a-model"),
        pytest.param([*several(5), worker(100, kept=90)], Kind.LEAK, id="most-of-them-decide"),
    ],
)
def test_kinds(retired: list[Retirement], kind: Kind) -> None:
    """What they have in common; and why is said in figures."""
    found = judge(retired, "requests")

    assert found.kind is kind
    assert any(character.isdigit() for character in found.why)
    assert bool(found.help) is (kind is not Kind.UNKNOWN)


def test_a_leak_has_its_figure() -> None:
    """Bytes for each request, with a band that the truth is in."""
    found = judge([worker(100, 1000), worker(110, 1050, number=1), worker(90, 950, number=2)], "requests")

    assert found.kind is Kind.LEAK and found.each is not None and found.give_or_take is not None
    assert abs(found.each - 100 * MIB / 1000) <= found.give_or_take
    assert "a request" in found.why


def test_in_a_few_words() -> None:
    """For where there is little room; nothing where nothing is known."""
    assert judge(several(3)).brief == "leaks 102 KiB each"
    assert judge(several(3, kept=80)).brief == "no leak: free memory is kept"
    assert judge([]).brief == ""


def test_which_allocator_keeps_it() -> None:
    """And what would help there."""
    assert "Python's allocator" in judge(several(3, kept=80)).why
    assert "MALLOC_ARENA_MAX" in judge(several(3, kept=80, by_malloc=True)).help


@given(
    st.lists(st.builds(worker, st.integers(0, 2000), st.integers(1, 100_000), shape=st.sampled_from(["levels", "at once"])), max_size=16)
)
def test_what_levels_off_is_never_called_a_leak(retired: list[Retirement]) -> None:
    """Law: whatever the sizes, and however the workers are mixed."""
    assert judge(retired).kind is not Kind.LEAK


@given(st.lists(st.builds(worker, st.integers(20, 2000), st.integers(10, 100_000)), min_size=1, max_size=16), st.floats(0.6, 1.0))
def test_what_is_kept_is_never_called_a_leak(retired: list[Retirement], share: float) -> None:
    """Law: where most of each worker's growth is free memory."""
    kept = [
        replace(
            one,
            parts=replace(
                one.parts, python_kept=int((one.grown or 0) * share), python_live=one.parts.total - int((one.grown or 0) * share)
            ),
        )
        for one in retired
    ]

    assert judge(kept).kind in (Kind.KEPT, Kind.UNKNOWN)


@given(
    st.lists(
        st.builds(
            worker,
            st.integers(0, 2000),
            st.integers(0, 100_000),
            kept=st.integers(0, 2000),
            shape=st.sampled_from(["line", "late", "levels", "at once"]),
        ),
        max_size=16,
    )
)
def test_any_figures(retired: list[Retirement]) -> None:
    """Law: there is always a judgement, from no more workers than there are, and figures only for a leak."""
    found = judge(retired)

    assert 0 <= found.workers <= len(retired)
    assert (found.each is None) == (found.kind is not Kind.LEAK)


def test_without_a_life_nothing_is_claimed() -> None:
    """The end alone does not tell a leak from a cache that fills; nor does a size without the one that it began with."""
    bare = [replace(one, points=()) for one in several(4)]

    assert judge(bare).kind is Kind.UNKNOWN
    assert judge([replace(one, fresh=None) for one in several(4)]).kind is Kind.UNKNOWN


def _ended_by_the_clock(sizes: list[tuple[int, int]], shape: str = "line") -> list[Retirement]:
    return [replace(worker(grown, work, shape=shape, number=number), reason="max_lifetime") for number, (grown, work) in enumerate(sizes)]


ALIKE = [(46, 131), (47, 504), (46, 300), (47, 280)]


def test_what_is_in_use_does_not_rise_with_the_work() -> None:
    """Whatever the shape, which what is free but kept may blur."""
    blurred = [
        replace(one, points=tuple(Point(at * one.work // 10, FRESH + (held * MIB)) for at, held in enumerate((0, 5, 20, 46, 60, 70), 1)))
        for one in (replace(worker(86, work, kept=40, number=number), reason="max_lifetime") for number, (_, work) in enumerate(ALIKE))
    ]

    found = judge(blurred, "requests")

    assert found.kind is Kind.CACHE and "after 131 requests as after 504" in found.why, found


@pytest.mark.parametrize("reason", ["soft_limit", "hard_limit", "budget", "soon_over_limit"])
def test_at_a_limit_all_hold_as_much(reason: str) -> None:
    """Which does not tell a leak, whose requests differ, from what levels off."""
    assert "levels off" not in judge([replace(one, reason=reason) for one in _ended_by_the_clock(ALIKE)]).why


def test_what_grows_with_the_time_is_not_said_to_level_off() -> None:
    """A timer leaks: as much in each worker, however much work it has done."""
    found = judge(_ended_by_the_clock(ALIKE), "requests")

    assert found.kind is Kind.UNKNOWN and "time rather than with requests" in found.why, found


def _with_cache(size: int, bound: int | None = 1000, entries: int = 600, before: int | None = 0) -> Objects:
    cache = Cache(name="apps.f", entries=entries, bound=bound, size=size * MIB, before=before)
    return Objects(caches=(cache,), containers=(Container(name="apps.t", kind="dict", entries=5, before=None if before is None else 5),))


@pytest.mark.parametrize(
    ("objects", "kind"),
    [
        pytest.param(_with_cache(90), Kind.CACHE, id="it-holds-most"),
        pytest.param(_with_cache(90, entries=1000), Kind.CACHE, id="it-is-full"),
        pytest.param(_with_cache(40), Kind.LEAK, id="it-holds-less-than-half"),
        pytest.param(_with_cache(90, bound=None), Kind.LEAK, id="it-has-no-bound"),
        pytest.param(_with_cache(90, before=590), Kind.LEAK, id="it-has-hardly-grown"),
        pytest.param(None, Kind.LEAK, id="nobody-has-looked"),
    ],
)
def test_a_cache_with_a_bound_is_no_leak_while_it_fills(objects: Objects | None, kind: Kind) -> None:
    """Although what is in use rises with the work until the end; if it is what has grown."""
    found = judge([replace(one, objects=objects) for one in several(4)])

    assert found.kind is kind
    if kind is Kind.CACHE:
        assert "apps.f (lru_cache of 1 000) holds 90% of what is in use" in found.why
        assert "when it is full" in found.help


def test_a_cache_that_is_full_at_once_was_not_needed_at_once() -> None:
    """Although nothing is known about when these workers were ready: it is no leak either way."""
    unknown = [replace(one, objects=_with_cache(90, before=None)) for one in several(3, shape="at once")]

    assert judge(unknown).kind is Kind.CACHE


def test_before_it_is_known_whether_a_cache_has_grown_no_leak_is_said() -> None:
    """The first workers of a pool do not count their objects when they are ready, and may hold a cache that fills."""
    first = [replace(one, objects=_with_cache(90, before=None)) for one in several(4)]
    (later,) = [replace(one, objects=_with_cache(90)) for one in several(1)]
    (leaks,) = [replace(one, objects=_with_cache(90, before=600)) for one in several(1)]

    assert judge(first).kind is judge([later, *first]).kind is judge([leaks, *first]).kind is Kind.UNKNOWN
    assert "may be a cache that fills" in judge(first).why
    assert judge([later, later, *first]).kind is Kind.CACHE
    assert judge([leaks, leaks, *first]).kind is Kind.LEAK
