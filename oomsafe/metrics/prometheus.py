"""Prometheus: one collector over the scoreboard. Any worker answers for the whole pool.

There are no multiprocess files: those of dead workers would stay forever, and a pool that recycles makes many.
The supervisor keeps the counts of workers that are gone, so counters never go backwards.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Any

from oomsafe.errors import ScoreboardError
from oomsafe.policy.state import State
from oomsafe.scoreboard.board import Scoreboard
from oomsafe.scoreboard.layout import BOUNDS
from oomsafe.scoreboard.places import boards_beside
from oomsafe.scoreboard.view import PoolView
from oomsafe.worker.current import get_guard

try:
    from prometheus_client import CollectorRegistry, make_asgi_app, make_wsgi_app
    from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
    from prometheus_client.registry import Collector
except ImportError as error:
    raise ImportError("oomsafe.metrics.prometheus needs prometheus-client: pip install 'oomsafe[prometheus]'") from error

ReadPool = Callable[[], PoolView | None]


def this_pool() -> PoolView | None:
    """The pool of this process's guard, else that of $OOMSAFE_SCOREBOARD; None if there is neither."""
    guard = get_guard()
    if guard is not None:
        return guard.pool()
    path = os.environ.get("OOMSAFE_SCOREBOARD")
    if not path:
        return None
    board = Scoreboard.open(path)
    try:
        return board.read()
    finally:
        board.close()


class MemoryCollector(Collector):
    """Register it with your own registry: ``REGISTRY.register(MemoryCollector())``. Do so in every worker, or in none.

    `look` returns the pool to report; None: there is none.
    """

    def __init__(self, look: ReadPool = this_pool) -> None:
        self._read = look

    def describe(self) -> Iterable[Metric]:
        """Return nothing, because there may be no pool when the collector is registered."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Every metric of the pool, from one consistent copy."""
        pool = self._read()
        if pool is None:
            return
        beside = _beside(pool)
        yield from _workers({"": pool, **beside})
        yield from _pool(pool)
        yield from _counters(pool, beside)
        yield _growth(pool)


class MetricsApp:
    """An app that answers with the pool's metrics: a WSGI app when called with two arguments, ASGI with three."""

    def __init__(self, look: ReadPool = this_pool) -> None:
        registry = CollectorRegistry()
        registry.register(MemoryCollector(look))
        self._wsgi = make_wsgi_app(registry)
        self._asgi = make_asgi_app(registry)

    def __call__(self, *arguments: Any) -> Iterable[bytes] | Awaitable[None]:
        answer: Iterable[bytes] | Awaitable[None] = (self._wsgi if len(arguments) == 2 else self._asgi)(*arguments)
        return answer


metrics_app = MetricsApp()


def _beside(pool: PoolView) -> dict[str, PoolView]:
    """The pools whose supervisors are children of this pool's supervisor (gunicorn's dirty workers), by the last word of their names."""
    found = {}
    for path in boards_beside(pool.supervisor) if pool.supervisor else ():
        try:
            other = Scoreboard.look(path)
        except ScoreboardError:  # it has ended meanwhile
            continue
        found[other.server.rpartition(" ")[2]] = other
    return found


def _workers(pools: dict[str, PoolView]) -> Iterator[Metric]:
    memory = GaugeMetricFamily(
        "oomsafe_worker_memory_bytes",
        "Memory of one worker, by slot; used is what its soft limit is compared with.",
        labels=["worker", "kind"],
    )
    limits = GaugeMetricFamily("oomsafe_worker_limit_bytes", "Limits of one worker, jitter included.", labels=["worker", "kind"])
    for name, worker in ((name, worker) for name, pool in pools.items() for worker in pool.workers):
        figures, slot = worker.figures, f"{name}-{worker.slot}" if name else str(worker.slot)
        sizes = {"rss": figures.rss, "anon": figures.anon, "private": figures.private, "pss": figures.pss, "uss": figures.uss}
        _add(memory, slot, {**sizes, "peak_rss": figures.peak_rss, "baseline": figures.baseline, "used": worker.used})
        _add(limits, slot, {"soft": figures.soft, "hard": figures.hard})
    yield memory
    yield limits


def _add(family: GaugeMetricFamily, slot: str, kinds: dict[str, int | None]) -> None:
    for kind, figure in kinds.items():
        if figure is not None:  # a missing figure is no sample, never 0
            family.add_metric([slot, kind], figure)


def _pool(pool: PoolView) -> Iterator[Metric]:
    states = GaugeMetricFamily("oomsafe_workers", "Living workers by state.", labels=["state"])
    for state in tuple(State)[1:]:
        states.add_metric([state.value], sum(worker.state is state for worker in pool.workers))
    yield states
    yield GaugeMetricFamily("oomsafe_inflight", "Requests in flight.", value=sum(w.figures.in_flight for w in pool.workers))
    sizes = {
        "oomsafe_pool_limit_bytes": (
            "The limit that leaves the pool least: of its cgroup, of an ancestor, or the machine's memory.",
            pool.limit,
        ),
        "oomsafe_pool_others_bytes": ("What processes outside the pool use below that limit.", pool.others),
        "oomsafe_pool_budget_bytes": ("What the pool itself may hold.", pool.budget),
        "oomsafe_pool_working_set_bytes": ("What the pool holds, as its budget counts it.", pool.held),
    }
    for name, (text, size) in sizes.items():
        if size is not None:
            yield GaugeMetricFamily(name, text, value=size)


def _counters(pool: PoolView, beside: dict[str, PoolView]) -> Iterator[Metric]:
    totals = pool.totals
    yield CounterMetricFamily("oomsafe_requests", "Requests that have ended.", value=totals.work)
    yield CounterMetricFamily("oomsafe_reclaims", "Times that gc.collect() and malloc_trim() were tried.", value=totals.reclaims)
    yield CounterMetricFamily("oomsafe_reclaimed_bytes", "Bytes given back by gc.collect() and malloc_trim().", value=totals.reclaimed)
    yield CounterMetricFamily("oomsafe_unserved_seconds", "Seconds in which no worker served.", value=pool.unserved)
    recycles = CounterMetricFamily("oomsafe_recycles", "Workers recycled, by reason.", labels=["reason"])
    for reason, count in totals.by_reason.items():
        recycles.add_metric([reason], count)
    yield recycles
    if beside:
        done = CounterMetricFamily("oomsafe_beside_work", "Work that has ended in a pool beside this one.", labels=["pool"])
        others = CounterMetricFamily("oomsafe_beside_recycles", "Workers recycled in a pool beside this one.", labels=["pool", "reason"])
        for name, other in beside.items():
            done.add_metric([name], other.totals.work)
            for reason, count in other.totals.by_reason.items():
                others.add_metric([name, reason], count)
        yield done
        yield others


def _growth(pool: PoolView) -> Metric:
    growth = HistogramMetricFamily(
        "oomsafe_request_memory_growth_bytes",
        "What a request made its worker grow by; in the sum, shrinking counts as 0.",
        labels=["route"],
    )
    for route, (total, *buckets) in pool.totals.routes.items():
        cumulated, so_far = [], 0
        for bound, count in zip([*map(str, map(float, BOUNDS)), "+Inf"], buckets, strict=True):
            so_far += count
            cumulated.append((bound, float(so_far)))
        growth.add_metric([route], cumulated, sum_value=total)
    return growth
