"""The bytes of a scoreboard: what goes in comes out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oomsafe.policy.state import State
from oomsafe.scoreboard import layout
from oomsafe.scoreboard.layout import BUCKETS, COUNTERS_SIZE, OTHER, ROUTES, Counters, as_text, optional, stored
from oomsafe.scoreboard.slot import Figures, Slot

counts = st.integers(0, 1 << 40)
rows = st.lists(counts, min_size=1 + BUCKETS, max_size=1 + BUCKETS)
names = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), min_size=1, max_size=layout.ROUTE_NAME)
counters = st.builds(
    Counters,
    counts,
    counts,
    counts,
    st.lists(counts, min_size=8, max_size=8),
    st.lists(counts, min_size=4, max_size=4),
    st.dictionaries(names, rows, max_size=ROUTES),
)


@given(counters)
def test_counters_round_trip(given_counters: Counters) -> None:
    """Law: packed and unpacked they are the same, and always of one size."""
    packed = given_counters.pack()

    assert len(packed) == COUNTERS_SIZE
    assert given_counters == Counters.unpack(packed)


@given(st.lists(st.text(max_size=80), max_size=8), st.integers(1, 5))
def test_no_name_loses_counts(routes: list[str], each: int) -> None:
    """Law: whatever a route is called, its counts and those of the routes after it are there when they are read."""
    given_counters = Counters()
    for name in routes:
        given_counters.route(name)[1] += each

    read = Counters.unpack(given_counters.pack())

    assert len(routes) * each == sum(row[1] for row in read.routes.values())


@given(st.lists(counters, max_size=4))
def test_adding_loses_nothing(several: list[Counters]) -> None:
    """Law: a total has as much as its parts, in work, in recycles and over all routes."""
    total = Counters()
    for one in several:
        total.add(one)

    assert total.work == sum(one.work for one in several)
    assert total.reclaimed == sum(one.reclaimed for one in several)
    assert sum(total.aborts) == sum(sum(one.aborts) for one in several)
    assert sum(total.recycles) == sum(sum(one.recycles) for one in several)
    assert sum(map(sum, total.routes.values())) == sum(sum(map(sum, one.routes.values())) for one in several)
    assert len(total.routes) <= ROUTES


@given(st.lists(st.integers(0, layout.COUNT_MAX), min_size=2, max_size=4))
def test_a_sum_can_always_be_written(several: list[int]) -> None:
    """Law: whatever its parts are, a total stays within its field: at its end it stays."""
    total = Counters()
    for one in several:
        total.add(Counters(one, one, one, [one] * 8, [one] * 4, {"a": [one] * (1 + BUCKETS)}))

    expected = min(sum(several), layout.COUNT_MAX)
    assert Counters.unpack(total.pack()) == total
    assert {expected} == {total.work, total.reclaims, total.reclaimed, *total.recycles, *total.aborts, *total.routes["a"]}


@pytest.mark.parametrize("figure", [float("nan"), float("inf"), float("-inf"), -1.0, 1e300])
def test_what_no_clock_shows(figure: float) -> None:
    """It is not known."""
    assert layout.seconds(figure) is None
    assert layout.seconds(0.0) == 0.0


@given(st.lists(names, max_size=100))
def test_the_table_of_routes_is_bounded(asked: list[str]) -> None:
    """Law: no client makes it grow, and what found no room is counted as OTHER."""
    given_counters = Counters()
    for name in asked:
        given_counters.route(name)[1] += 1

    assert len(given_counters.routes) <= ROUTES
    assert len(asked) == sum(row[1] for row in given_counters.routes.values())
    if len(set(asked)) >= ROUTES:
        assert OTHER in given_counters.routes


def test_one_route_too_many() -> None:
    """Twenty-three by name; all others are OTHER."""
    given_counters = Counters()

    for number in range(ROUTES + 10):
        given_counters.route(f"/{number}")[1] += 1

    assert list(given_counters.routes) == [f"/{number}" for number in range(ROUTES - 1)] + [OTHER]
    assert given_counters.routes[OTHER][1] == 11


sizes = st.none() | st.integers(0, (1 << 63) - 1)
figures = st.builds(Figures, sizes, sizes, sizes, sizes, sizes, sizes, sizes, st.none() | st.integers(-1000, 1000), st.integers(0, 1 << 20))


@given(figures, counters)
def test_a_slot_round_trips(given_figures: Figures, given_counters: Counters) -> None:
    """Law: what a worker publishes is what is read; None comes back as None, and a score of -1 as -1."""
    slot = Slot.private()

    slot.publish(given_figures, given_counters)

    copy = slot.copy()
    assert given_figures == Figures.unpack(copy)
    assert given_counters == Counters.unpack(copy[layout.COUNTERS_AT : layout.COUNTERS_AT + COUNTERS_SIZE])
    assert slot.state == State.STARTING


@given(st.none() | st.integers(0, (1 << 63) - 1))
def test_missing_is_not_zero(figure: int | None) -> None:
    """Law: None is stored as a number that is no size."""
    assert figure == optional(stored(figure))


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=40))
def test_text_of_a_field(text: str) -> None:
    """Law: text ends at its first zero byte."""
    assert text == as_text(text.encode().ljust(200, b"\0"))


@pytest.mark.parametrize(("growth", "bucket"), [(1, 1), (64 << 10, 1), ((64 << 10) + 1, 2), (1 << 30, 8), ((1 << 30) + 1, 9)])
def test_bounds_are_upper_ends(growth: int, bucket: int) -> None:
    """A bucket holds growth up to its bound, as Prometheus's le says."""
    from bisect import bisect_left

    assert bucket == bisect_left(layout.BOUNDS, growth)


def test_a_long_name_keeps_its_ends() -> None:
    """Its method and its mounts, and its last part."""
    long = "PATCH /api/v1/organisations/{organisation_id}/projects/{project_id}/items/{item_id}"

    assert layout.route_name(long) == "PATCH /api/v1/organisations/..." + long[-33:]
    assert len(layout.route_name(long)) == layout.ROUTE_NAME
    assert layout.route_name("é" * 99) == 14 * "é" + "..." + 16 * "é"  # no half of a letter
    assert layout.route_name(long[:64]) == long[:64]
