"""Which process the OOM killer takes first: the kernel's badness formula, and the oom_score_adj that makes it take a worker."""

from __future__ import annotations

from oomsafe.policy.readers import SCORE_MAX, SCORE_MIN

#: A worker's score is raised by at least this.
LEAST_STEP = 300

#: How far above its supervisor a fresh worker must rank, in thousandths of the limit (mm/oom_kill.c counts in those).
MARGIN = 100


def badness(rss: int, oom_score_adj: int, total: int) -> float:
    """The kernel's points for a process, in bytes: the process with the most is killed (mm/oom_kill.c, oom_badness, since 4.17).

    `rss` stands for resident memory, swap and page tables together; `total` is the limit of the
    cgroup that ran out, or the machine's memory. -1000 exempts.
    """
    if oom_score_adj <= SCORE_MIN:
        return float("-inf")
    return rss + oom_score_adj * (total / 1000)


def clamp_score(score: int) -> int:
    """`score`, limited to the range that the kernel accepts."""
    return max(SCORE_MIN, min(SCORE_MAX, score))


def auto_step(supervisor_rss: int | None, limit: int | None) -> int:
    """How far above its supervisor's a worker's oom_score_adj must be for the kernel to kill the worker first.

    A fresh worker may hold next to nothing while a preloading supervisor is the biggest process of
    the pool, so the step makes up for all of the supervisor's memory, plus a tenth of the limit.
    The smallest limit needs the biggest step, so a step that suffices in the pool's own cgroup also suffices
    in its ancestors and machine-wide. If a figure is None it is +300.
    """
    if not supervisor_rss or not limit:
        return LEAST_STEP
    # -(-a // b) rounds up: a step that is too small by one may cost the supervisor
    return max(LEAST_STEP, -(-supervisor_rss * 1000 // limit) + MARGIN)
