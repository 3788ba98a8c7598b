"""What workers hold at this moment, as the kernel tells it: what they have said may be as old as the work they are inside of."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

from oomsafe.kernel.process import is_alive, sizes_of
from oomsafe.policy.readers import COUNT_CLEAN

if TYPE_CHECKING:
    from oomsafe.scoreboard.view import PoolView, WorkerView


def live(pool: PoolView) -> PoolView:
    """`pool` with each worker's rss, anon and used of now. One whose memory can't be read (hidepid) keeps its last figures: `measured` says
    of when they are. 30 us a worker."""
    return replace(pool, workers=[_live(worker, counts_clean=pool.metric in COUNT_CLEAN) for worker in pool.workers])


def _live(worker: WorkerView, *, counts_clean: bool) -> WorkerView:
    now = time.time()
    # the sizes first: what has come to life with this pid since is not taken for the worker
    sizes = sizes_of(worker.pid)
    if sizes is None or not is_alive(worker.pid, worker.started):
        return worker
    figures = worker.figures
    rss, anon, used = brought_forward(sizes, (figures.rss, figures.anon, worker.used), figures.file_dirty or 0, counts_clean=counts_clean)
    return replace(worker, figures=replace(figures, rss=rss, anon=anon), used=used, measured=now)


def brought_forward(
    sizes: tuple[int, int], before: tuple[int | None, int | None, int | None], dirty: int, *, counts_clean: bool
) -> tuple[int, int, int | None]:
    """(rss, anon, what the soft limit is compared with) where the kernel says `sizes`, as sizes_of() does, and these three were `before`.

    `dirty` is the part of anon that was pages of files: the kernel counts those with all other file pages. `counts_clean` is the policy's
    metric's. What a process has grown by is taken to be its own. Bytes; None where it was not known before.
    """
    rss, without_files = sizes
    anon = without_files + min(dirty, rss - without_files)
    rss_before, anon_before, used = before
    was, now = (rss_before, rss) if counts_clean else (anon_before, anon)
    return rss, anon, None if used is None or was is None else max(0, used + now - was)
