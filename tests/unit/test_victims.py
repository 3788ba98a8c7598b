"""Who the kernel kills first."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oomsafe.policy.victims import LEAST_RAISE, MARGIN, Candidate, auto_raise, badness, clamp_score, ranked, supervisor_margin, thousandth

GIB = 1 << 30


@given(
    supervisor=st.integers(1, 1 << 42),
    limit=st.integers(8 << 20, 1 << 42),
    bigger=st.integers(0, 1 << 44),
    own=st.integers(-999, 1000),
    worker=st.integers(0, 1 << 42),
)
def test_a_worker_dies_before_its_supervisor(supervisor: int, limit: int, bigger: int, own: int, worker: int) -> None:
    """Law: whatever the worker holds, it outranks the supervisor by a tenth of the limit, in the pool's cgroup and above it."""
    score = own + auto_raise(supervisor, limit)
    if score > 1000:
        return  # nothing is above 1000: the supervisor is warned of it

    for total in (limit, limit + bigger):
        margin = badness(worker, score, total) - badness(supervisor, own, total)

        assert margin >= MARGIN * thousandth(limit)


@given(st.none() | st.integers(0, 1 << 42), st.none() | st.integers(0, 1 << 42))
def test_a_step_is_never_small(supervisor: int | None, limit: int | None) -> None:
    """Law: at least 300, also without figures."""
    assert auto_raise(supervisor, limit) >= LEAST_RAISE
    if not supervisor or not limit:
        assert auto_raise(supervisor, limit) == LEAST_RAISE


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
        pytest.param(0, 1000, 4_096_000_000, 4_096_000_000, id="the-highest-score-is-all-there-is"),
        pytest.param(1_024_000_000, -250, 4_096_000_000, 0, id="a-quarter-forgiven"),
        pytest.param(0, 1000, 4 * GIB, 1000 * 1048 * 4096, id="thousandths-are-whole-pages"),
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


def candidate(pid: int, held: int, score: int = 0, *, protected: bool = False) -> Candidate:
    """A process."""
    return Candidate(pid=pid, name=f"p{pid}", held=held, oom_score_adj=score, protected=protected)


def test_ranked_as_the_kernel_takes_them() -> None:
    """The most points first; whoever is exempt, and the machine's first process, are not in the list."""
    small, big, exempt = candidate(2, 20 << 20, 800), candidate(3, 170 << 20), candidate(4, GIB, -1000)
    first = candidate(1, GIB, protected=True)

    assert ranked([first, exempt, big, small], 200 << 20) == [small, big]


sizes, scores = st.integers(0, 1 << 36), st.integers(-1000, 1000)
candidates = st.builds(candidate, st.integers(1, 1 << 22), sizes, scores, protected=st.booleans())


@given(st.lists(candidates, unique_by=lambda one: one.pid), st.integers(0, 1 << 42))
def test_nobody_is_ranked_below_one_with_fewer_points(found: list[Candidate], total: int) -> None:
    """Law: the points fall along the list, and who is left out has none."""
    order = ranked(found, total)
    points = [one.points(total) for one in order]

    assert points == sorted(points, reverse=True)
    assert all(one.points(total) == float("-inf") for one in found if one not in order)


@given(candidates, st.lists(candidates, min_size=1, max_size=8), st.integers(0, 1 << 42))
def test_with_a_margin_every_worker_ranks_above_its_supervisor(supervisor: Candidate, workers: list[Candidate], total: int) -> None:
    """Law: a positive margin, and only that, has the kernel take every worker first."""
    margin = supervisor_margin(supervisor, workers, total)
    assert margin is not None

    above = supervisor.points(total) == float("-inf") or all(one.points(total) > supervisor.points(total) for one in workers)
    assert (margin > 0) == above


def test_no_margin_without_a_worker() -> None:
    """None: there is nobody to compare the supervisor with."""
    assert supervisor_margin(candidate(2, GIB), [], GIB) is None
