"""A pool's metrics as data, each with its samples. prometheus.py and exposition.py turn them into text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Literal, NamedTuple

from oomsafe.errors import ScoreboardError
from oomsafe.policy.state import State
from oomsafe.scoreboard.board import Scoreboard
from oomsafe.scoreboard.layout import BOUNDS, REFUSABLE
from oomsafe.scoreboard.live import live
from oomsafe.scoreboard.margin import margin_of
from oomsafe.scoreboard.places import boards_beside
from oomsafe.scoreboard.view import PoolView


class Sample(NamedTuple):
    """One figure of a metric."""

    suffix: str
    """What follows the metric's name: ``_total`` for a counter; ``_bucket``, ``_count`` or ``_sum`` for a histogram."""
    labels: dict[str, str]
    value: float


class Family(NamedTuple):
    """One metric."""

    name: str
    """Without its samples' suffixes."""
    kind: Literal["gauge", "counter", "histogram"]
    text: str
    samples: list[Sample]


def families_of(pool: PoolView) -> Iterator[Family]:
    """Every metric of the pool, and of the pools beside it; their scoreboards, and the memory of all workers, are read now."""
    pool, beside = live(pool), _beside(pool)
    yield from _workers({"": pool, **beside})
    yield from _pool(pool)
    yield from _counters(pool, beside)
    yield _growth(pool)
    if pool.retired:
        yield from _retired(pool)


def _beside(pool: PoolView) -> dict[str, PoolView]:
    """The pools whose supervisors are children of this pool's supervisor, by the last word of their names: gunicorn's dirty workers."""
    found: dict[str, PoolView] = {}
    try:
        paths = boards_beside(pool.supervisor) if pool.supervisor else []
    except ImportError:  # the kernel does not list children, and the metrics process has no psutil on its path
        return found
    for path in paths:
        try:
            other = live(Scoreboard.snapshot(path))
        except ScoreboardError:  # that pool has ended in the meantime
            continue
        if other.is_single_process:
            continue
        found[other.server.rpartition(" ")[2]] = other
    return found


def _workers(pools: dict[str, PoolView]) -> Iterator[Family]:
    memory, limits = [], []
    for name, of, worker in ((name, pool, worker) for name, pool in pools.items() for worker in pool.workers):
        figures, slot = worker.figures, f"{name}-{worker.slot}" if name else str(worker.slot)
        sizes = {"rss": figures.rss, "anon": figures.anon, "private": figures.private, "pss": figures.pss, "uss": figures.uss}
        compared = {"used": worker.used, "held": of.held_by(worker)}
        memory += _kinds(slot, {**sizes, "peak_rss": figures.peak_rss, "baseline": figures.baseline, **compared})
        limits += _kinds(slot, {"soft": figures.soft, "hard": figures.hard})
    text = "Memory of one worker, by slot; used is what its soft limit is compared with, held what its hard limit is."
    yield Family("oomsafe_worker_memory_bytes", "gauge", text, memory)
    yield Family("oomsafe_worker_limit_bytes", "gauge", "Limits of one worker, jitter included.", limits)


def _kinds(slot: str, figures: dict[str, int | None]) -> list[Sample]:
    """A figure that is missing is no sample, never 0."""
    return [Sample("", {"worker": slot, "kind": kind}, figure) for kind, figure in figures.items() if figure is not None]


def _pool(pool: PoolView) -> Iterator[Family]:
    # a metric of its own that others are joined with, as build_info is: as their label, a new name would begin every series anew
    info = [Sample("", {"name": pool.name, "server": pool.server}, 1)]
    yield Family("oomsafe_pool_info", "gauge", "What the pool is called and what serves it; always 1.", info)
    states = {state.value: sum(worker.state is state for worker in pool.workers) for state in tuple(State)[1:]}
    yield Family("oomsafe_workers", "gauge", "Living workers by state.", [Sample("", {"state": s}, n) for s, n in states.items()])
    yield _gauge("oomsafe_workers_wanted", "How many workers the pool is meant to have.", pool.workers_wanted)
    refused = [Sample("", {"limit": limit}, int(limit in pool.refused)) for limit in REFUSABLE]
    yield Family("oomsafe_limit_refused", "gauge", "1: a worker has refused this limit, which is below what it needs.", refused)
    yield _gauge("oomsafe_inflight", "Requests in flight.", sum(worker.figures.in_flight for worker in pool.workers))
    sizes = {
        "oomsafe_pool_limit_bytes": (
            "The limit that leaves the pool least: of its cgroup, of an ancestor, or the machine's memory.",
            pool.limit,
        ),
        "oomsafe_pool_others_bytes": ("What others than the pool use below that limit.", pool.others),
        "oomsafe_pool_budget_bytes": ("What the pool itself may hold.", pool.budget),
        "oomsafe_pool_working_set_bytes": ("What the pool holds, as its budget counts it.", pool.held),
    }
    for name, (text, size) in sizes.items():
        if size is not None:
            yield _gauge(name, text, size)
    margin = margin_of(pool)
    if margin is not None:
        text = "By how many of the kernel's OOM points its lowest-ranked worker is above the supervisor; negative: it may die first."
        yield _gauge("oomsafe_supervisor_margin_bytes", text, margin)
    if pool.held is not None:
        text = "Page cache among what the pool holds, which the kernel drops before it kills."
        yield _gauge("oomsafe_pool_droppable_bytes", text, pool.droppable)


def _counters(pool: PoolView, beside: dict[str, PoolView]) -> Iterator[Family]:
    totals = pool.totals
    yield _counter("oomsafe_requests", "Requests that have ended.", totals.work)
    yield _counter("oomsafe_reclaims", "Times that gc.collect() and malloc_trim() were tried.", totals.reclaims)
    yield _counter("oomsafe_reclaimed_bytes", "Bytes that they gave back.", totals.reclaimed)
    yield _counter("oomsafe_unserved_seconds", "Seconds in which no worker served.", pool.unserved)
    recycles = [Sample("_total", {"reason": reason}, count) for reason, count in totals.by_reason.items()]
    yield Family("oomsafe_recycles", "counter", "Workers recycled, by the limit that they were over.", recycles)
    aborts = [Sample("_total", {"reason": reason}, count) for reason, count in totals.aborts_by_reason.items()]
    yield Family("oomsafe_aborts", "counter", "Requests that were aborted, by the limit that they would have passed.", aborts)
    ends = [Sample("_total", {"verdict": verdict}, count) for verdict, count in pool.ends.items()]
    yield Family("oomsafe_deaths", "counter", "Workers that have ended, by how; recycled and server are in order.", ends)
    culprits = [Sample("_total", {"route": route}, count) for route, count in pool.culprits.items()]
    yield Family("oomsafe_culprits", "counter", "Recycled workers whose growth was put down to this route with certainty.", culprits)
    if beside:
        done = [Sample("_total", {"pool": name}, other.totals.work) for name, other in beside.items()]
        yield Family("oomsafe_beside_work", "counter", "Work that has ended in a pool beside this one.", done)
        others = [
            Sample("_total", {"pool": name, "reason": reason}, count)
            for name, other in beside.items()
            for reason, count in other.totals.by_reason.items()
        ]
        yield Family("oomsafe_beside_recycles", "counter", "Workers recycled there.", others)
        ends = [
            Sample("_total", {"pool": name, "verdict": verdict}, count)
            for name, other in beside.items()
            for verdict, count in other.ends.items()
        ]
        yield Family("oomsafe_beside_deaths", "counter", "Workers that have ended there, by how.", ends)


def _growth(pool: PoolView) -> Family:
    samples = []
    for route, (total, *buckets) in pool.totals.routes.items():
        so_far = 0
        for bound, count in zip([*map(str, map(float, BOUNDS)), "+Inf"], buckets, strict=True):
            so_far += count
            samples.append(Sample("_bucket", {"route": route, "le": bound}, so_far))
        samples += [Sample("_count", {"route": route}, so_far), Sample("_sum", {"route": route}, total)]
    text = "What a request made its worker grow by; in the sum, shrinking counts as 0."
    return Family("oomsafe_request_memory_growth_bytes", "histogram", text, samples)


def _retired(pool: PoolView) -> Iterator[Family]:
    from oomsafe.policy.retention import judge  # imported here: only a pool that has recycled workers needs statistics

    last = pool.retired[0].parts
    parts = [Sample("", {"part": field.name}, size) for field in fields(last) if (size := getattr(last, field.name)) is not None]
    yield Family("oomsafe_retired_memory_bytes", "gauge", "What the memory of the worker was that was recycled last, at its end.", parts)
    found = judge(pool.retired)
    kinds = [Sample("", {"verdict": kind.value}, int(kind is found.kind)) for kind in type(found.kind)]
    yield Family("oomsafe_retention", "gauge", "1 for what recycled workers have grown by; a leak rises with the work done.", kinds)
    if found.each is not None:
        yield _gauge("oomsafe_leak_bytes_per_request", "What each request leaks, judged from recycled workers.", found.each)


def _gauge(name: str, text: str, value: float) -> Family:
    return Family(name, "gauge", text, [Sample("", {}, value)])


def _counter(name: str, text: str, value: float) -> Family:
    return Family(name, "counter", text, [Sample("_total", {}, value)])
