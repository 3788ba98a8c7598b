"""A copy of a scoreboard to look at: the pool, its workers, what they have in flight, and the totals."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

from oomsafe.kernel.process import is_alive
from oomsafe.policy.text import printable
from oomsafe.pool import layout
from oomsafe.pool.layout import Counters, as_text, optional
from oomsafe.pool.slot import Figures

#: How often a copy is tried anew when a writer was met, before it is taken as it is.
TRIES = 500


@dataclass(frozen=True)
class InFlight:
    """One piece of work that has begun and not ended."""

    name: str
    """Printable; a request's method and path."""
    began: float
    """Seconds since 1970."""
    rss: int | None
    """The worker's, in bytes, when it began."""


@dataclass(frozen=True)
class WorkerView:
    """One living worker."""

    slot: int
    pid: int
    started: int
    """Clock ticks since boot: with the pid it names one process for ever."""
    generation: int
    state: str
    figures: Figures
    published: float | None
    """Seconds since 1970; None before the first time."""
    counters: Counters
    in_flight: list[InFlight]


@dataclass(frozen=True)
class PoolView:
    """A pool at one moment. Sizes in bytes; None is a figure that is not known."""

    server: str
    supervisor: int
    supervisor_started: int
    created: float
    workers_wanted: int
    turns: int
    limit: int | None
    budget: int | None
    workers: list[WorkerView] = field(default_factory=list)
    totals: Counters = field(default_factory=Counters)
    """Of all workers, those that are gone included: they only ever rise."""
    unserved: float = 0.0
    """Seconds in which no worker served, since the first one came to."""


def read_pool(memory: memoryview, slots: int) -> PoolView:
    """A consistent copy: read again while the supervisor folds a slot into the totals."""
    for _ in range(TRIES):
        (before,) = layout.SEQUENCE.unpack_from(memory, layout.SEQUENCE_AT)
        view = _read_once(memory, slots)
        (after,) = layout.SEQUENCE.unpack_from(memory, layout.SEQUENCE_AT)
        if before == after and not before % 2:
            break
        time.sleep(0.0002)
    return view


def view_alone(slot: bytes) -> PoolView:
    """A pool of one, which has no scoreboard: the worker whose slot has these bytes."""
    worker = _worker(slot, 0)
    counters = Counters()
    if worker is not None:
        counters.add(worker.counters)
    workers = [worker] if worker else []
    return PoolView("", 0, 0, time.time(), 1, 1, None, None, workers, counters)


def _read_once(memory: memoryview, slots: int) -> PoolView:
    pid, started, created = layout.SUPERVISOR.unpack_from(memory, layout.SUPERVISOR_AT)
    _, wanted, turns, limit, budget, server = layout.POOL.unpack_from(memory, layout.POOL_AT)
    totals = Counters.unpack(memory[layout.TOTALS_AT : layout.TOTALS_AT + layout.COUNTERS_SIZE].tobytes())
    workers = []
    for number in range(slots):
        copy = _copy_slot(memory, layout.HEADER_SIZE + number * layout.SLOT_SIZE)
        worker = _worker(copy, number) if copy else None
        if worker is None:
            continue
        totals.add(worker.counters)
        # the dead count until the supervisor has folded them, and are shown no more
        if is_alive(worker.pid, worker.started):
            workers.append(worker)
    return PoolView(
        as_text(server), pid, started, created, wanted, turns, optional(limit), optional(budget), workers, totals, _unserved(memory)
    )  # fmt: skip


def _unserved(memory: memoryview) -> float:
    since, before = layout.UNSERVED.unpack_from(memory, layout.UNSERVED_AT)
    seconds = before + (time.monotonic() - since if since else 0.0)
    return seconds if math.isfinite(seconds) and seconds > 0 else 0.0


def _copy_slot(memory: memoryview, at: int) -> bytes | None:
    """The bytes of a slot that is in use, not caught while its worker publishes."""
    copy = b""
    for tried in range(TRIES):
        # before and after, and not from the copy itself: memcpy has an order of its own
        (sequence,) = layout.SEQUENCE.unpack_from(memory, at + layout.SLOT_SEQUENCE_AT)
        copy = memory[at : at + layout.SLOT_SIZE].tobytes()
        (now,) = layout.SEQUENCE.unpack_from(memory, at + layout.SLOT_SEQUENCE_AT)
        if sequence == now and not sequence % 2:
            break
        # it may have been taken off its processor in the middle; or killed there, and stays so for ever
        time.sleep(0.0001)
        if tried % 20 == 0 and not is_alive(*layout.OWNER.unpack_from(copy, layout.OWNER_AT)[:2]):
            break
    (state,) = layout.STATE.unpack_from(copy)
    return None if state == layout.FREE else copy


def _worker(copy: bytes, number: int) -> WorkerView | None:
    (state,) = layout.STATE.unpack_from(copy)
    pid, started, generation, _ = layout.OWNER.unpack_from(copy, layout.OWNER_AT)
    if not pid or state >= len(layout.STATES):
        return None
    published = layout.FIGURES.unpack_from(copy, layout.FIGURES_AT)[-1]
    # before the first time it has published, the zeros are no figures
    figures = Figures.unpack(copy) if published else Figures()
    counters = Counters.unpack(copy[layout.COUNTERS_AT : layout.COUNTERS_AT + layout.COUNTERS_SIZE])
    state_name = layout.STATES[state]
    return WorkerView(number, pid, started, generation, state_name, figures, published or None, counters, _cells(copy))


def _cells(copy: bytes) -> list[InFlight]:
    found = []
    since_1970 = time.time() - time.monotonic()
    for at in range(layout.CELLS_AT, layout.CELLS_AT + layout.CELLS * layout.CELL_SIZE, layout.CELL_SIZE):
        length, began, rss, name, used = layout.CELL.unpack_from(copy, at)
        if used:
            found.append(InFlight(printable(name[:length]), since_1970 + began, optional(rss)))
    return found
