"""Leak, kept, cache or needed: judged from the last retirements of a pool."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.retiring import MIB, several, worker

from oomsafe.policy.retention import Kind, judge
from oomsafe.policy.retirement import Retirement


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
