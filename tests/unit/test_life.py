"""A worker's life in a few points, and what they still tell: laws over whole lives, measured as a worker measures itself."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st
from unit.retiring import FRESH, MIB, worker

from oomsafe.policy.curve import curve_of, shape_of
from oomsafe.policy.retention import Kind, judge
from oomsafe.policy.retirement import POINTS, Retirement
from oomsafe.worker.life import YOUNG, Life

measured = st.lists(st.tuples(st.integers(0, 500), st.integers(0, 1 << 40), st.integers(0, 1 << 40)), max_size=60)


@given(measured)
def test_points_are_what_was_never_fallen_below(measured: list[tuple[int, int, int]]) -> None:
    """Law: few, later and later, rising; and no more than any later measurement, whatever was measured, and with whatever jumps."""
    life, work, all_held = Life(), 0, []
    life.begin(FRESH)
    for more, held, leap in measured:
        work += more
        life.follow(work, held, leap)
        all_held.append((work, held))

    assert len(life.points) <= POINTS
    assert all(before.work < after.work and before.held <= after.held for before, after in pairwise(life.points))
    assert all(point.held <= held for point in life.points for at, held in all_held if at >= point.work)


def test_first_works_are_noted_one_by_one() -> None:
    """As long as it is young; and a model that came with the first stays on the record however long it lives."""
    life = Life()
    life.begin(FRESH)
    for work in range(1, YOUNG + 1):
        assert life.young
        life.follow(work, FRESH + 100 * MIB)
    assert not life.young

    for work in range(YOUNG + 1, 100_000, 37):
        life.follow(work, FRESH + 100 * MIB + work)

    assert life.points[0].work == 1 and life.points[0].held == FRESH + 100 * MIB


def lived(works: int, held: dict[int, int] | list[int], seconds: int, noise: int = 0, kept: int = 0) -> Retirement:
    """A worker that did `works` pieces of work in so many seconds; `held[n]`: bytes above FRESH after the nth. Balloons of `noise`."""
    life = Life()
    life.begin(FRESH)
    most = 0
    for work in range(1, works + 1):
        most = max(most, held[work] - held[work - 1])
        grown = held[work] + (noise if work % 3 == 1 else 0)
        if work <= YOUNG:
            life.follow(work, FRESH + grown, most)
            most = 0
        if work % max(1, works // seconds) == 0:
            life.follow(work, FRESH + grown, most)
            most = 0
    life.follow(works, FRESH + held[works], most)
    one = worker(1, works)
    parts = replace(one.parts, python_live=FRESH + held[works] - kept, python_kept=kept)
    return replace(one, work=works, parts=parts, points=life.points)


def alike(lives: list[Retirement]) -> list[Retirement]:
    """As several workers."""
    return [replace(one, pid=number) for number, one in enumerate(lives)]


works, seconds = st.integers(40, 3000), st.integers(5, 300)
sizes, noises = st.integers(20, 500).map(lambda size: size * MIB), st.integers(0, 20).map(lambda size: size * MIB)


@given(works, seconds, sizes, noises, st.lists(st.floats(0, 0.95), min_size=2, max_size=6))
def test_what_comes_in_one_jump_is_needed(works: int, seconds: int, size: int, noise: int, places: list[float]) -> None:
    """Law: whenever it comes in each worker's life, however seldom its memory is measured, and whatever comes and goes besides."""
    noise = min(noise, size // 8)  # what is there just before the jump, and just after it, can't be told from what stays
    lives = [lived(works, [size * (work > place * works) for work in range(works + 1)], seconds, noise) for place in places]

    found = judge(alike(lives))

    assert found.kind is Kind.NEEDED, found
    for one, place in zip(lives, places, strict=True):
        shape = shape_of(one)
        assert shape is not None and shape.stands_out and shape.jump >= 0.85 * size
        assert abs(shape.jumped_after - place * works) <= 0.05 * works + works / seconds + 3


@given(
    st.integers(100, 3000), st.integers(20, 300), sizes, st.integers(25, 500).map(lambda size: size * MIB), noises,
    st.lists(st.floats(0, 0.8), min_size=3, max_size=6),
)  # fmt: skip
def test_a_leak_is_told_beside_what_is_needed(works: int, seconds: int, size: int, leak: int, noise: int, places: list[float]) -> None:
    """Law: a model of any size, that is loaded at any time, hides no leak; and the leak's figure is right without it."""
    size = max(size, leak)  # a jump of much less than the leak does not stand out, and need not
    lives = [
        lived(works, [size * (work > place * works) + leak * work // works for work in range(works + 1)], seconds, noise)
        for place in places
    ]

    found = judge(alike(lives))

    assert found.kind is Kind.LEAK, found
    assert found.each is not None and abs(found.each - leak / works) <= 0.25 * leak / works


@given(works, seconds, sizes, noises, st.lists(st.floats(0.01, 0.85), min_size=1, max_size=8), st.floats(0.3, 1.0))
def test_a_cache_with_a_bound_is_no_leak(works: int, seconds: int, size: int, noise: int, full: list[float], bend: float) -> None:
    """Law: if it is full before the end of the worker's life, however it fills."""
    lives = [lived(works, [int(size * min(1.0, work / (at * works)) ** bend) for work in range(works + 1)], seconds, noise) for at in full]

    assert judge(alike(lives)).kind is not Kind.LEAK


@given(works, seconds, sizes, noises, st.integers(1, 3), st.data())
def test_a_few_jumps_are_no_leak(works: int, seconds: int, size: int, noise: int, jumps: int, data: st.DataObject) -> None:
    """Law: as many models as there may be, at any time of each worker's life; three retirements don't make a leak of them."""
    lives = []
    for _ in range(4):
        places = [data.draw(st.floats(0, 1)) for _ in range(jumps)]
        lives.append(lived(works, [sum(size * (work > place * works) for place in places) for work in range(works + 1)], seconds, noise))

    assert judge(alike(lives)).kind is not Kind.LEAK


@given(works, seconds, sizes, noises)
def test_curve_ends_where_the_worker_did(works: int, seconds: int, size: int, noise: int) -> None:
    """Law: it rises by all that the worker has grown by, from its first work to its last."""
    one = lived(works, [size * work // works for work in range(works + 1)], seconds, noise)
    curve = curve_of(one)

    assert curve is not None
    assert curve.rise == one.grown and curve.work == works
    assert all(before[1] <= after[1] for before, after in pairwise(curve.points))
    begin, most = curve.steepest(works / 4)
    assert most >= one.grown / 4 - 1
    assert abs(curve.without(begin, works / 4).rise - (curve.rise - most)) < 1
