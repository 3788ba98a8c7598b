"""Prometheus: one collector over the scoreboard. Any worker answers for the whole pool.

No multiprocess files: those of dead workers stay for ever, and a pool that recycles makes many.
Counts of workers that are gone are kept by the supervisor, so counters never go backwards.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Any

from oomsafe.metrics.families import families_of
from oomsafe.scoreboard.board import Scoreboard
from oomsafe.scoreboard.view import PoolView
from oomsafe.worker.current import get_guard

try:
    from prometheus_client import CollectorRegistry, make_asgi_app, make_wsgi_app
    from prometheus_client.metrics_core import Metric
    from prometheus_client.registry import Collector
except ImportError as error:
    raise ImportError("oomsafe.metrics.prometheus needs prometheus-client: pip install 'oomsafe[prometheus]'") from error

Read = Callable[[], PoolView | None]


def this_pool() -> PoolView | None:
    """The pool of this process's guard, else the pool of $OOMSAFE_SCOREBOARD; None if there is neither."""
    guard = get_guard()
    if guard is not None:
        return guard.pool()
    path = os.environ.get("OOMSAFE_SCOREBOARD")
    return Scoreboard.snapshot(path) if path else None


class MemoryCollector(Collector):
    """Register it where your metrics are: ``REGISTRY.register(MemoryCollector())``. In each worker, or in none."""

    def __init__(self, read: Read = this_pool) -> None:
        self._read = read

    def describe(self) -> Iterable[Metric]:
        """Empty, because there may be no pool yet when the collector is registered."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Every metric of the pool, from one consistent copy."""
        pool = self._read()
        if pool is None:
            return
        for family in families_of(pool):
            metric = Metric(family.name, family.text, family.kind)
            for sample in family.samples:
                metric.add_sample(family.name + sample.suffix, sample.labels, sample.value)
            yield metric


class MetricsApp:
    """An app that answers with the pool's metrics: a WSGI app when called with two arguments, ASGI with three."""

    def __init__(self, read: Read = this_pool) -> None:
        registry = CollectorRegistry()
        registry.register(MemoryCollector(read))
        self._wsgi = make_wsgi_app(registry)
        self._asgi = make_asgi_app(registry)

    def __call__(self, *arguments: Any) -> Iterable[bytes] | Awaitable[None]:
        answer: Iterable[bytes] | Awaitable[None] = (self._wsgi if len(arguments) == 2 else self._asgi)(*arguments)
        return answer


metrics_app = MetricsApp()
