"""By how much the kernel prefers a pool's workers to its supervisor, read from the kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

from oomsafe.kernel.capacity import read_levels
from oomsafe.kernel.oom_candidates import candidate_of, candidates_of, total_of
from oomsafe.kernel.process import PAGE, is_alive
from oomsafe.policy.victims import supervisor_margin

if TYPE_CHECKING:
    from oomsafe.scoreboard.view import PoolView


def margin_of(pool: PoolView, proc: str = "/proc") -> float | None:
    """By how many of the kernel's points, in bytes, the lowest-ranked worker is above the supervisor, at the level where that is least.

    Negative: the kernel may take the supervisor first. Infinite: it never takes it. None: there is no worker or no supervisor, or the
    kernel hides what it counts (hidepid). Takes 60 us for each worker.
    """
    if pool.is_single_process or not pool.supervisor:
        return None
    supervisor = candidate_of(pool.supervisor, proc)
    # read first, so that a new process that got this pid meanwhile is not taken for the supervisor
    if supervisor is None or not is_alive(pool.supervisor, pool.supervisor_started, proc):
        return None
    workers = list(candidates_of((worker.pid for worker in pool.workers), proc))
    totals = {total for level in read_levels(proc, pool.supervisor) if (total := total_of(level, proc))}
    margins = [supervisor_margin(supervisor, workers, total, PAGE) for total in totals]
    return min((margin for margin in margins if margin is not None), default=None)
