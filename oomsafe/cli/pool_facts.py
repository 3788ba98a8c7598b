"""What a live pool shows of itself, as facts to size it by: from its scoreboard, and from the kernel."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable

from oomsafe.errors import ScoreboardError
from oomsafe.kernel.cpus import cpus_of
from oomsafe.kernel.process import descendants_of, held_of, is_alive, shared_out
from oomsafe.policy.ends import End
from oomsafe.policy.sizing.facts import Facts, Style
from oomsafe.policy.text import printable
from oomsafe.scoreboard import layout
from oomsafe.scoreboard.view import PoolView, WorkerView

#: From fewer pieces of work the growth is not known: the first ones import modules and fill caches.
ENOUGH = 100

#: gunicorn's classes whose workers wait while their work waits.
BLOCKING = frozenset({"gunicorn sync", "gunicorn gthread"})

#: What a scoreboard calls gunicorn's dirty pool.
DIRTY = "gunicorn dirty"


def facts_of(pool: PoolView, limit: int | None = None, fresh: int | None = None, before: tuple[PoolView, float] | None = None) -> Facts:
    """The facts of this pool; `limit` and `fresh`, in bytes, where they are given and need not be known.

    `before` is the pool as it was so many seconds ago: growth and rate are then those of this time, else those since the start.

    Raises ScoreboardError if it has not what an advice needs: it is dead, or has no figures yet.
    """
    name = called(pool)
    if not is_alive(pool.supervisor, pool.supervisor_started):
        raise ScoreboardError(f"{name} is dead: its supervisor {pool.supervisor} is gone; start it, or give --worker 180MiB")
    if pool.server == DIRTY:
        raise ScoreboardError(f"{name} is gunicorn's dirty pool: it counts among what its HTTP workers' supervisor holds; advise that pool")
    limit = pool.limit if limit is None else limit
    if limit is None:
        raise ScoreboardError(f"{name} could read no memory limit: give one, such as --memory 2GiB")
    if fresh is None and not any(worker.figures.baseline for worker in pool.workers):
        raise ScoreboardError(f"{name} has no figures yet: no worker has served; try again in some seconds, or give --worker 180MiB")
    shared = _shared(pool.workers)
    fresh = _fresh(pool, shared or 0) if fresh is None else fresh
    return Facts(
        limit=limit,
        source=pool.source or "its limit",
        others=pool.others,
        cpus=cpus_of(pool.supervisor),
        style=Style.BLOCKING if pool.server in BLOCKING else Style.LOOP,
        fresh=fresh,
        shared=shared,
        supervisor=0 if pool.is_single_process else _supervisor(pool),
        growth=_growth(pool) if before is None else _growth_since(before[0], pool),
        balloon=_balloon(pool, fresh),
        rate=_rate(pool) if before is None else max(0, pool.totals.work - before[0].totals.work) / before[1],
        workers=pool.workers_wanted or len(pool.workers),
        unit=pool.unit or "requests",
    )


def called(pool: PoolView) -> str:
    """The pool in a message: ``pool shop:app (supervisor 4711)``."""
    return f"pool {printable(pool.name or pool.server)} (supervisor {pool.supervisor})"


def _fresh(pool: PoolView, shared: int) -> int:
    """What a typical worker held right after boot, with what it shares, in bytes; at least one has served."""
    found = [worker.figures.baseline for worker in pool.workers if worker.figures.baseline]
    without_shared = pool.metric in ("private", "uss")
    return int(statistics.median(found)) + (shared if without_shared else 0)


def _shared(workers: Iterable[WorkerView]) -> int | None:
    """What a typical worker shares with other processes, without mapped files, in bytes; None: it can't be read (ptrace access)."""
    found = []
    for worker in workers:
        shares, held = shared_out(worker.pid), held_of(worker.pid)
        if shares is not None and held is not None and is_alive(worker.pid, worker.started):
            found.append(max(0, held - shares.private))
    return int(statistics.median(found)) if found else None


def _supervisor(pool: PoolView) -> int | None:
    """What the supervisor holds, and what it has started beside its workers (metrics, dirty workers, a resource tracker), in bytes."""
    held = held_of(pool.supervisor)
    if held is None:
        return None
    workers = {worker.pid for worker in pool.workers}
    below = {pid for worker in workers for pid in descendants_of(worker)}
    for pid in set(descendants_of(pool.supervisor)) - workers - below:
        shares = shared_out(pid)
        held += (held_of(pid) or 0) if shares is None else shares.held
    return held


def _growth(pool: PoolView) -> float | None:
    """Bytes that workers have kept of each piece of work; None: too little has been done.

    The living ones tell what they have grown by since their boot. Those that are gone for their soft limit had grown up to that; of others
    it is not known, and then only the living ones count.
    """
    measured = [
        (worker.used - worker.figures.baseline, worker.counters.work)
        for worker in pool.workers
        if worker.used is not None and worker.figures.baseline is not None and worker.counters.work
    ]
    grown, work = max(0, sum(each for each, _ in measured)), sum(done for _, done in measured)
    up_to = [
        worker.figures.soft - worker.figures.baseline
        for worker in pool.workers
        if worker.figures.soft is not None and worker.figures.baseline is not None and worker.figures.soft > worker.figures.baseline
    ]
    over, ended = pool.totals.by_reason["soft_limit"], sum(pool.totals.recycles)
    died = sum(count for kind, count in pool.ends.items() if not End(kind).in_order)
    if over and ended == over and not died and up_to:
        grown, work = grown + over * int(statistics.mean(up_to)), pool.totals.work
    return grown / work if work >= ENOUGH else None


def _growth_since(before: PoolView, pool: PoolView) -> float | None:
    """Bytes that workers have kept of each piece of work since then, those that have lived all the while; None: too little was done."""
    then = {worker.generation: worker for worker in before.workers}
    grown = work = 0
    for worker in pool.workers:
        was = then.get(worker.generation)
        # a worker that had done nothing yet was to import modules and fill caches
        if was is not None and was.counters.work and worker.used is not None and was.used is not None:
            grown += worker.used - was.used
            work += max(0, worker.counters.work - was.counters.work)
    return max(0, grown) / work if work >= ENOUGH else None


def _rate(pool: PoolView) -> float | None:
    """Pieces of work a second since the pool was started; None: not known."""
    age = time.time() - pool.created
    return pool.totals.work / age if pool.created and age >= 1 and pool.totals.work else None


def _balloon(pool: PoolView, fresh: int) -> int | None:
    """The most that one piece of work has made a worker grow by, or a little more, in bytes; None: nothing has been done yet.

    The histogram knows the bounds of that. If no worker is gone, the living ones' peaks may know better.
    """
    buckets = [max((at for at, count in enumerate(row[1:]) if count), default=-1) for row in pool.totals.routes.values()]
    highest = max(buckets, default=-1)
    if highest < 0:
        return None
    least = layout.BOUNDS[highest - 1] if highest else 0
    most = layout.BOUNDS[highest] if highest < len(layout.BOUNDS) else least
    peaks = [worker.figures.peak_rss for worker in pool.workers if worker.figures.peak_rss is not None]
    if peaks and not any(pool.ends.values()) and not any(pool.totals.recycles):
        most = min(most, max(peaks) - fresh)
    return max(least, most)
