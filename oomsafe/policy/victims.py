"""Which process the OOM killer takes first: the kernel's badness formula, and the oom_score_adj that makes it take a worker."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from oomsafe.policy.readers import SCORE_MAX, SCORE_MIN

#: A worker's score is raised by at least this.
LEAST_RAISE = 300

#: How far above its supervisor a fresh worker must rank, in thousandths of the limit (mm/oom_kill.c counts in those).
MARGIN = 100

#: The unit in which the kernel counts, on x86 and nearly every arm64 system.
PAGE_SIZE = 4096


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A process that the kernel may kill. Sizes in bytes."""

    pid: int
    name: str
    """As ps shows it: at most 15 bytes, printable."""
    held: int
    """Resident memory, swap and page tables together: what the kernel counts."""
    oom_score_adj: int
    swapped: int = 0
    """The part of it that is in swap."""
    protected: bool = False
    """The kernel never takes it whatever its score: the first process of the machine."""

    def points(self, total: int, page: int = PAGE_SIZE) -> float:
        """badness() of it."""
        return float("-inf") if self.protected else badness(self.held, self.oom_score_adj, total, page)


def badness(held: int, oom_score_adj: int, total: int, page: int = PAGE_SIZE) -> float:
    """The kernel's points for a process, in bytes: the process with the most is killed (mm/oom_kill.c, oom_badness, since 4.17).

    `held` is resident memory, swap and page tables together; `total` is the limit of the cgroup that ran out, with the swap that it
    may use, or the machine's memory and swap. A thousandth of it is cut to whole pages, as the kernel's integers do. -1000 exempts.
    """
    if oom_score_adj <= SCORE_MIN:
        return float("-inf")
    return held + oom_score_adj * thousandth(total, page)


def thousandth(total: int, page: int = PAGE_SIZE) -> int:
    """What one point of a score is worth, in bytes."""
    return total // page // 1000 * page


def ranked(candidates: Iterable[Candidate], total: int, page: int = PAGE_SIZE) -> list[Candidate]:
    """Those that the kernel may kill, first the one that it takes first. `total` as for badness()."""
    scored = [(each.points(total, page), each) for each in candidates]
    return [each for points, each in sorted(scored, key=lambda pair: (-pair[0], pair[1].pid)) if points > float("-inf")]


def supervisor_margin(supervisor: Candidate, workers: Iterable[Candidate], total: int, page: int = PAGE_SIZE) -> float | None:
    """By how many points, in bytes, the worker that ranks lowest is above the supervisor; None without a worker.

    Positive: the kernel kills every worker before the supervisor. Not positive: it may take the supervisor while a worker is left.
    Infinite if the kernel never takes the supervisor.
    """
    lowest = min((worker.points(total, page) for worker in workers), default=None)
    if lowest is None:
        return None
    own = supervisor.points(total, page)
    return float("inf") if own == float("-inf") else lowest - own


def clamp_score(score: int) -> int:
    """`score`, limited to the range that the kernel accepts."""
    return max(SCORE_MIN, min(SCORE_MAX, score))


def auto_raise(supervisor_rss: int | None, limit: int | None) -> int:
    """How far above its supervisor's a worker's oom_score_adj must be for the kernel to kill the worker first.

    A fresh worker may hold next to nothing while a preloading supervisor is the biggest process of
    the pool, so the raise makes up for all of the supervisor's memory, plus a tenth of the limit.
    The smallest limit needs the biggest raise, so one that suffices in the pool's own cgroup also suffices
    in its ancestors and machine-wide. If a figure is None it is +300.
    """
    point = thousandth(limit or 0)
    if not supervisor_rss or not point:
        return LEAST_RAISE
    # -(-a // b) rounds up: a raise that is too small by one may cost the supervisor
    return max(LEAST_RAISE, -(-supervisor_rss // point) + MARGIN)
