"""How fast a worker grows, and when it is at its limit."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oomsafe.policy.time_to_limit import LEAST, LONGEST, OVER, SAMPLE_EVERY, SAMPLES, kept, pace_of, time_to_limit
from oomsafe.policy.trend import Sample

MIB = 1 << 20
sizes = st.integers(0, 1 << 40)
paces = st.integers(-(1 << 30), 1 << 30)
counts = st.integers(8, SAMPLES)


def line(pace: int, count: int, start: int = 1 << 41, every: int = 1) -> list[Sample]:
    """`count` samples of a worker that grows evenly."""
    return [Sample(float(n * every), start + n * every * pace) for n in range(count)]


@given(paces, counts, st.integers(1, 10))
def test_even_growth_is_found_exactly(pace: int, count: int, every: int) -> None:
    """Law, whatever the pause between the samples."""
    assert pace_of(line(pace, count, every=every)) == pace


@given(paces, counts, st.data(), sizes)
def test_one_odd_sample_moves_nothing(pace: int, count: int, data: st.DataObject, odd: int) -> None:
    """Law: a balloon, or a collection that gave all back, in any one place."""
    samples = line(pace, count)
    at = data.draw(st.integers(0, count - 1))
    samples[at] = samples[at]._replace(used=odd)

    assert pace_of(samples) == pace


@given(st.lists(sizes, min_size=LEAST, max_size=SAMPLES), st.integers(-(1 << 30), 1 << 30))
def test_only_differences_count(used: list[int], shift: int) -> None:
    """Law: more of the same memory is no growth; the pace is between the smallest and the greatest step."""
    samples = [Sample(float(n), size) for n, size in enumerate(used)]

    pace = pace_of(samples)

    assert pace == pace_of([Sample(at, size + shift) for at, size in samples])
    steps = [later - earlier for earlier, later in pairwise(used)]
    assert pace is not None
    assert min(steps) <= pace <= max(steps)


@pytest.mark.parametrize(
    "samples",
    [[], line(1, LEAST - 1), [Sample(0.5 * n, n) for n in range(5)], [Sample(1.0, n) for n in range(9)]],
    ids=["none", "too few", f"over less than {OVER:.0f} s", "at one time"],
)
def test_too_little_to_tell(samples: list[Sample]) -> None:
    """None, and not 0."""
    assert pace_of(samples) is None


@given(st.lists(st.tuples(st.floats(0, 1e6), sizes), max_size=40))
def test_what_is_kept(given_: list[tuple[float, int]]) -> None:
    """Law: few, in order, far enough apart, and the first one that came."""
    samples: tuple[Sample, ...] = ()
    for at, used in sorted(given_):
        samples = kept(samples, Sample(at, used))

    assert len(samples) <= SAMPLES
    assert all(later.at - earlier.at >= SAMPLE_EVERY for earlier, later in pairwise(samples))
    assert bool(samples) == bool(given_)


@given(sizes, sizes, st.floats(1, 1e12))
def test_at_that_pace_it_is_there_then(used: int, limit: int, pace: float) -> None:
    """Law: what it holds, and what it grows by until then, is the limit; above it there is no time left."""
    seconds = time_to_limit(used, limit, pace)

    if used >= limit:
        assert seconds == 0
    elif seconds is None:
        assert (limit - used) / pace > LONGEST
    else:
        assert used + seconds * pace == pytest.approx(limit)


@pytest.mark.parametrize(
    ("used", "limit", "pace", "expected"),
    [
        (None, 100, 1.0, None), (100, None, 1.0, None), (50, 100, None, None), (50, 100, 0.0, None), (50, 100, -1.0, None),
        (50, 100, 5.0, 10.0), (100, 100, None, 0.0), (101, 100, -5.0, 0.0), (0, 100 * MIB, 1.0, None),
    ],
)  # fmt: skip
def test_what_is_not_known_is_none(used: int | None, limit: int | None, pace: float | None, expected: float | None) -> None:
    """Nor is there a time where it shrinks, or where it would be next year."""
    assert time_to_limit(used, limit, pace) == expected
