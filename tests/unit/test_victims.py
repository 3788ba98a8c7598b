"""Who the kernel kills first."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oomsafe.policy.victims import LEAST_STEP, auto_step, badness, clamp_score

GIB = 1 << 30


@given(
    supervisor=st.integers(1, 1 << 42),
    limit=st.integers(1 << 20, 1 << 42),
    bigger=st.integers(0, 1 << 44),
    own=st.integers(-999, 1000),
    worker=st.integers(0, 1 << 42),
)
def test_a_worker_dies_before_its_supervisor(supervisor: int, limit: int, bigger: int, own: int, worker: int) -> None:
    """Law: whatever the worker holds, it outranks the supervisor by a tenth of the limit, in the pool's cgroup and above it."""
    score = own + auto_step(supervisor, limit)
    if score > 1000:
        return  # nothing is above 1000: the supervisor is warned of it

    for total in (limit, limit + bigger):
        margin = badness(worker, score, total) - badness(supervisor, own, total)

        assert margin >= limit / 10 * (1 - 1e-9) - 1


@given(st.none() | st.integers(0, 1 << 42), st.none() | st.integers(0, 1 << 42))
def test_a_step_is_never_small(supervisor: int | None, limit: int | None) -> None:
    """Law: at least 300, also without figures."""
    assert auto_step(supervisor, limit) >= LEAST_STEP
    if not supervisor or not limit:
        assert auto_step(supervisor, limit) == LEAST_STEP


@given(st.integers(-5000, 5000))
def test_scores_are_what_the_kernel_takes(score: int) -> None:
    """Law: from -1000 to 1000, and never lower for a higher step."""
    assert -1000 <= clamp_score(score) <= 1000
    assert clamp_score(clamp_score(score)) == clamp_score(score)
    assert clamp_score(score) <= clamp_score(score + 1)
    assert (clamp_score(score) == score) == (-1000 <= score <= 1000)


@pytest.mark.parametrize(
    ("rss", "score", "total", "expected"),
    [
        pytest.param(GIB, 0, 4 * GIB, GIB, id="memory-alone"),
        pytest.param(0, 1000, 4 * GIB, 4 * GIB, id="the-highest-score-is-all-there-is"),
        pytest.param(GIB, -250, 4 * GIB, 0, id="a-quarter-forgiven"),
        pytest.param(GIB, -1000, 4 * GIB, float("-inf"), id="exempt"),
    ],
)
def test_badness(rss: int, score: int, total: int, expected: float) -> None:
    """The kernel's formula (mm/oom_kill.c)."""
    assert expected == badness(rss, score, total)


def test_what_the_facts_measured() -> None:
    """In a 200 MB cgroup a 20 MB process at +800 died before a growing hog."""
    total = 200 << 20
    assert badness(20 << 20, 800, total) > badness(170 << 20, 0, total)
