"""What workers hold at this moment, read from the kernel, because what they have published may be as old as the work they are running."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

from oomsafe.kernel.process import is_alive, sizes_of
from oomsafe.policy.readers import COUNT_CLEAN

if TYPE_CHECKING:
    from oomsafe.scoreboard.view import PoolView, WorkerView


def live(pool: PoolView) -> PoolView:
    """`pool` with the present rss, anon and used of each worker. A worker whose memory can't be read (hidepid) keeps its last figures, and
    `measured` is their time. Takes 30 us for each worker."""
    return replace(pool, workers=[_live(worker, counts_clean=pool.metric in COUNT_CLEAN) for worker in pool.workers])


def _live(worker: WorkerView, *, counts_clean: bool) -> WorkerView:
    now = time.time()
    # the sizes are read first, so that a new process that got this pid meanwhile is not taken for the worker
    sizes = sizes_of(worker.pid)
    if sizes is None or not is_alive(worker.pid, worker.started):
        return worker
    figures = worker.figures
    rss, anon, used = brought_forward(sizes, (figures.rss, figures.anon, worker.used), figures.file_dirty or 0, counts_clean=counts_clean)
    return replace(worker, figures=replace(figures, rss=rss, anon=anon), used=used, measured=now)


def brought_forward(
    sizes: tuple[int, int], before: tuple[int | None, int | None, int | None], dirty: int, *, counts_clean: bool
) -> tuple[int, int, int | None]:
    """(rss, anon, what the soft limit is compared with) for a process that holds `sizes` (a result of sizes_of()) now; these were `before`.

    `dirty` is the part of anon that was file pages, which the kernel counts with all other file pages. `counts_clean`: the policy's metric
    counts clean file pages. Growth since `before` counts as the process's own memory. Bytes; None if it was not known before.
    """
    rss, without_files = sizes
    anon = without_files + min(dirty, rss - without_files)
    rss_before, anon_before, used = before
    was, now = (rss_before, rss) if counts_clean else (anon_before, anon)
    return rss, anon, None if used is None or was is None else max(0, used + now - was)
