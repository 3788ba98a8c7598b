"""A copy of a scoreboard for reading: the pool, its workers, their work in flight, and the totals."""

from __future__ import annotations

import math
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from oomsafe.kernel.process import is_alive
from oomsafe.policy.ends import End
from oomsafe.policy.inspection import Inspection
from oomsafe.policy.probed import Probed
from oomsafe.policy.readers import COUNT_CLEAN
from oomsafe.policy.retirement import Point, Retirement
from oomsafe.policy.state import State
from oomsafe.policy.stock import Parts
from oomsafe.policy.text import printable, without_controls
from oomsafe.scoreboard import layout
from oomsafe.scoreboard.header import read_probed
from oomsafe.scoreboard.inspections import read_inspection
from oomsafe.scoreboard.layout import Counters, as_text, optional
from oomsafe.scoreboard.slot import Figures

if TYPE_CHECKING:
    from oomsafe.policy.objects import Objects

#: Seconds for which slots that are being written are copied again, all slots together, before they are used as they are.
PATIENCE = 0.1

#: One in this many attempts checks whether a process that seems to be writing is still alive.
ASK_AFTER = 20

#: The kinds of ends, each at the index of its number.
_ENDS = tuple(end.value for end in End)

Fetch = Callable[[int, int], bytes]
"""Returns bytes of a scoreboard, given their offset and their number."""

Known = Callable[[int], tuple[int, int, int] | None]
"""Returns the worker in a slot: pid (0: not known), start time, generation; None: the slot is free.

For a caller that knows this by itself, and need not trust the slot's own bytes."""


@dataclass(frozen=True)
class InFlight:
    """One piece of work that has begun and not ended."""

    name: str
    """Printable; a request's method and path."""
    began: float
    """Seconds since 1970."""
    rss: int | None
    """The worker's rss in bytes when it began, and what it has grown by since for other work; None: not known."""


@dataclass(frozen=True)
class WorkerView:
    """One living worker."""

    slot: int
    pid: int
    started: int
    """The start time in clock ticks since boot; with the pid it identifies one process."""
    generation: int
    state: State
    figures: Figures
    published: float | None
    """When the worker last published, seconds since 1970; None before the first time."""
    measured: float | None
    """When rss, anon and used were measured, seconds since 1970: by the worker, by its supervisor, or by the process that shows them."""
    used: int | None
    """What the soft limit is compared with, in bytes, in the policy's metric."""
    counters: Counters
    in_flight: list[InFlight]
    ordered: bool = False
    """Whether its supervisor has ordered it to drain, now or once it is over its limit."""

    def grown(self, work: InFlight) -> int | None:
        """Bytes that this worker has grown by since this work of its began; None where that is not known: its figure may be older."""
        rss = self.figures.rss
        if rss is None or work.rss is None or self.measured is None or self.measured < work.began:
            return None
        return rss - work.rss


@dataclass(frozen=True)
class Recycled:
    """The last recycle of a pool."""

    at: float
    """Seconds since 1970."""
    line: str
    """What its worker has logged; printable."""


@dataclass(frozen=True)
class DeathView:
    """The end of a worker that was not in order."""

    at: float
    """Seconds since 1970."""
    verdict: str
    """How it ended: a value of policy.ends.End."""
    line: str
    """What the supervisor has logged; printable."""


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
    """The counters of all workers, including those that are gone: they only ever rise."""
    unserved: float = 0.0
    """Seconds in which no worker served, since the first worker did."""
    held: int | None = None
    """What the pool holds, as its budget counts it."""
    others: int | None = None
    """What others use below the limit; the headroom is limit - others - held."""
    source: str = ""
    """Where the limit comes from; printable."""
    name: str = ""
    """What the pool is called; printable, empty where nobody has said it."""
    metric: str = ""
    """What soft limits are compared with; printable, empty where it is not known."""

    unit: str = ""
    """What the workers count, in the plural: requests, tasks; printable, empty where none has said it."""
    last_recycle: Recycled | None = None
    """None: there was none."""
    ends: dict[str, int] = field(default_factory=dict)
    """How many workers have ended, by kind: the values of policy.ends.End."""
    deaths: list[DeathView] = field(default_factory=list)
    """The last ends that were not in order, the latest first."""
    refused: list[str] = field(default_factory=list)
    """The limits that a worker has refused, by their settings' names (layout.REFUSABLE): workers do without them."""
    droppable: int = 0
    """The bytes of `held` that are page cache, which the kernel drops before it kills."""
    ended: float | None = None
    """When the supervisor ended in order, seconds since 1970; None: it lives, or was killed."""
    retired: list[Retirement] = field(default_factory=list)
    """The last recycled workers that have told what their memory was, the latest first."""
    probed: Probed | None = None
    """The last probe of one of its workers; None: there was none."""
    inspected: Inspection | None = None
    """The last inspection of one of its workers; None: there was none."""
    culprits: dict[str, int] = field(default_factory=dict)
    """How often each known route was found to have made a recycled worker grow; layout.OTHER: any route beside these. Printable."""

    def held_by(self, worker: WorkerView) -> int | None:
        """What this worker's hard limit is compared with, in bytes; None: not known."""
        return worker.figures.rss if self.metric in COUNT_CLEAN else worker.figures.anon

    @property
    def is_single_process(self) -> bool:
        """Whether it is one process that has no supervisor of ours, as oomsafe/scoreboard/own_board.py makes it."""
        return all(worker.pid == self.supervisor for worker in self.workers) and self.server == layout.SINGLE_PROCESS


def read_pool(fetch: Fetch, slots: int, known: Known | None = None, patience: float = PATIENCE, *, routes: bool = True) -> PoolView:
    """A consistent copy; after `patience` seconds, it is returned as it is. Raises only what `fetch` raises.

    `routes`: with the counters of each route, which take five times as long as all the rest.
    """
    until = time.monotonic() + patience
    while True:
        before = _sequence(fetch)
        view = _read_once(fetch, slots, known, until, routes)
        # read again if the supervisor was adding a slot to the totals
        if (before == _sequence(fetch) and not before % 2) or time.monotonic() >= until:
            return view
        time.sleep(0.0002)


def view_of_one(slot: bytes) -> PoolView:
    """A pool of one worker without a scoreboard, whose private slot has these bytes."""
    worker = _worker(slot, 0, layout.OWNER.unpack_from(slot, layout.OWNER_AT)[:3])
    counters = Counters()
    counters.add(worker.counters)
    return PoolView("", 0, 0, time.time(), 1, 1, None, None, [worker], counters)


def _sequence(fetch: Fetch) -> int:
    return int(layout.SEQUENCE.unpack(fetch(layout.SEQUENCE_AT, layout.SEQUENCE.size))[0])


def _read_once(fetch: Fetch, slots: int, known: Known | None, until: float, routes: bool) -> PoolView:
    header = fetch(0, layout.HEADER_SIZE)
    pid, started, created = layout.SUPERVISOR.unpack_from(header, layout.SUPERVISOR_AT)
    _, wanted, turns, limit, budget, server = layout.POOL.unpack_from(header, layout.POOL_AT)
    totals = Counters.unpack(header[layout.TOTALS_AT : layout.TOTALS_AT + layout.COUNTERS_SIZE], routes)
    workers = []
    for number, copy in _copies(fetch, slots, until):
        who = layout.OWNER.unpack_from(copy, layout.OWNER_AT)[:3] if known is None else known(number)
        if who is None:
            continue
        worker = _worker(copy, number, who, routes)
        # a dead worker's counters count until the supervisor has added them to the totals, but the worker is not listed
        totals.add(worker.counters)
        if worker.pid and worker.state is not State.FREE and is_alive(worker.pid, worker.started):
            workers.append(worker)
    return PoolView(
        printable(as_text(server)), pid, started, layout.seconds(created) or 0.0, max(0, wanted), max(0, turns),
        optional(limit), optional(budget), workers, totals, _unserved(header), *_allowed(header),
        name=without_controls(as_text(layout.NAME.unpack_from(header, layout.NAME_AT)[0])),
        metric=_text(header, layout.METRIC_AT, layout.METRIC),
        unit=_text(header, layout.UNIT_AT, layout.UNIT),
        last_recycle=_recycled(header),
        ends=dict(zip(_ENDS, layout.ENDS.unpack_from(header, layout.ENDS_AT), strict=False)),
        deaths=_deaths(header),
        refused=_refused(header),
        droppable=max(0, layout.DROPPABLE.unpack_from(header, layout.DROPPABLE_AT)[0]),
        ended=layout.seconds(layout.ENDED.unpack_from(header, layout.ENDED_AT)[0]) or None,
        culprits=_culprits(header),
        retired=_retired(header),
        probed=read_probed(header),
        inspected=read_inspection(header),
    )  # fmt: skip


def _allowed(header: bytes) -> tuple[int | None, int | None, str]:
    """(held, others, source); before the supervisor has published them, the zeros are not figures: None, None, ""."""
    changes, _, _, others, _ = layout.ALLOWED.unpack_from(header, layout.ALLOWED_AT)
    (held,) = layout.HELD.unpack_from(header, layout.HELD_AT)
    if not changes:
        return None, None, ""
    return optional(held), optional(others), _text(header, layout.SOURCE_AT, layout.SOURCE)


def _recycled(header: bytes) -> Recycled | None:
    at, line = layout.RECYCLED.unpack_from(header, layout.RECYCLED_AT)
    at = layout.seconds(at)
    return Recycled(at, printable(as_text(line), layout.RECYCLED.size)) if at else None


def _deaths(header: bytes) -> list[DeathView]:
    found = []
    for number in range(layout.DEATHS):
        at, end, line = layout.DEATH.unpack_from(header, layout.DEATHS_AT + number * layout.DEATH.size)
        at = layout.seconds(at)
        if at and end < len(_ENDS):
            found.append(DeathView(at, _ENDS[end], printable(as_text(line), layout.DEATH.size)))
    return sorted(found, key=lambda death: -death.at)


def _retired(header: bytes) -> list[Retirement]:
    found = []
    for number in range(layout.RETIRED_KEPT):
        fields = layout.RETIRED.unpack_from(header, layout.RETIRED_AT + number * layout.RETIRED.size)
        at, pid, slot, reason, generation, work, served, fresh = fields[: layout.PARTS_PLACE]
        at, served = layout.seconds(at), layout.seconds(served)
        if not at or served is None or reason >= len(layout.REASONS):
            continue
        python_live, python_kept, malloc_live, malloc_kept, malloc_stuck, files, shared, other = map(
            optional, fields[layout.PARTS_PLACE : layout.POINTS_PLACE]
        )
        parts = Parts(
            python_live=python_live, python_kept=python_kept, malloc_live=malloc_live, malloc_kept=malloc_kept, malloc_stuck=malloc_stuck,
            files=files or 0, shared=shared or 0, other=other or 0,
        )  # fmt: skip
        numbers = fields[layout.POINTS_PLACE :]
        points = [
            Point(work, held) for work, held in zip(numbers[::2], numbers[1::2], strict=True) if 0 < work <= layout.LARGEST and held >= 0
        ]
        found.append(
            Retirement(
                at=at,
                pid=pid,
                slot=slot,
                generation=generation,
                reason=layout.REASONS[reason],
                work=work,
                served=served,
                fresh=optional(fresh),
                parts=parts,
                points=tuple(sorted(points)),
                objects=_objects(header, number, generation, at),
            )
        )
    return sorted(found, key=lambda one: -one.at)


def _objects(header: bytes, number: int, generation: int, at: float) -> Objects | None:
    from oomsafe.scoreboard.objects import unpacked  # imported here: workers read the pool, too, mostly before one was recycled

    place = layout.OBJECTS_AT + number * layout.OBJECTS_SIZE
    return unpacked(header[place : place + layout.OBJECTS_SIZE], generation, at)


def _refused(header: bytes) -> list[str]:
    (bits,) = layout.REFUSED.unpack_from(header, layout.REFUSED_AT)
    return [name for name, bit in layout.REFUSABLE.items() if bits & bit]


def _culprits(header: bytes) -> dict[str, int]:
    *counts, others = layout.CULPRITS.unpack_from(header, layout.CULPRITS_AT)
    found = {layout.OTHER: others}
    for number, count in enumerate(counts):
        at = layout.NAMES_AT + number * layout.ROUTE_NAME
        name = without_controls(as_text(header[at : at + layout.ROUTE_NAME]))
        if name:  # a worker may have written one name twice
            found[name] = min(found.get(name, 0) + count, layout.COUNT_MAX)
    return found


def _text(header: bytes, at: int, form: struct.Struct) -> str:
    """The text of this field, printable."""
    return printable(as_text(form.unpack_from(header, at)[0]), form.size)


def _unserved(header: bytes) -> float:
    since, before = layout.UNSERVED.unpack_from(header, layout.UNSERVED_AT)
    seconds = before + (time.monotonic() - since if since else 0.0)
    return seconds if math.isfinite(seconds) and seconds > 0 else 0.0


def _copies(fetch: Fetch, slots: int, until: float) -> list[tuple[int, bytes]]:
    """The bytes of each used slot, copied while its worker was not publishing; after `until`, as they are."""
    copies: dict[int, bytes] = {}
    left, tried = list(range(slots)), 0
    while left:
        left = [number for number in left if not _take(fetch, number, copies, tried % ASK_AFTER == 1)]
        # a writer may have been preempted in the middle, or may never go on
        if not left or time.monotonic() >= until:
            break
        tried += 1
        time.sleep(0.0001)
    return sorted(copies.items())


def _take(fetch: Fetch, number: int, copies: dict[int, bytes], asks: bool) -> bool:
    """Copy a slot. False: its worker is publishing now, and the copy may be inconsistent.

    `asks`: check that the worker is alive, because one that was killed while it published never finishes.
    """
    at = layout.slot_at(number)
    # the sequence is read before and after, and not from the copy, because memcpy may copy in any order
    head = fetch(at, layout.SLOT_SEQUENCE_AT + layout.SEQUENCE.size)
    if layout.read_state(head) is State.FREE:
        copies.pop(number, None)
        return True
    copies[number] = copy = fetch(at, layout.SLOT_SIZE)
    (sequence,) = layout.SEQUENCE.unpack_from(head, layout.SLOT_SEQUENCE_AT)
    if fetch(at + layout.SLOT_SEQUENCE_AT, layout.SEQUENCE.size) == layout.SEQUENCE.pack(sequence) and not sequence % 2:
        return True
    return asks and not is_alive(*layout.OWNER.unpack_from(copy, layout.OWNER_AT)[:2])


def _worker(copy: bytes, number: int, who: tuple[int, int, int], routes: bool = True) -> WorkerView:
    published = layout.seconds(layout.FIGURES.unpack_from(copy, layout.FIGURES_AT)[-1])
    # before the worker has published for the first time, the zeros are not figures
    figures = Figures.unpack(copy) if published else Figures()
    counters = Counters.unpack(copy[layout.COUNTERS_AT : layout.COUNTERS_AT + layout.COUNTERS_SIZE], routes)
    ordered = layout.ORDER.unpack_from(copy, layout.ORDER_AT)[0] != 0
    used = optional(layout.NEED.unpack_from(copy, layout.NEED_AT)[0]) if published else None
    measured = published or None
    since = layout.measured_since(copy, published or 0.0)
    if since is not None:
        rss, anon, used = since
        figures = replace(figures, rss=rss, anon=anon)
        measured = layout.seconds(layout.MEASURED.unpack_from(copy, layout.MEASURED_AT)[0])
    return WorkerView(
        slot=number, pid=who[0], started=who[1], generation=who[2], state=layout.read_state(copy), figures=figures,
        published=published or None, measured=measured, used=used, counters=counters, in_flight=_cells(copy), ordered=ordered,
    )  # fmt: skip


def _cells(copy: bytes) -> list[InFlight]:
    found = []
    since_1970 = time.time() - time.monotonic()
    for at in range(layout.CELLS_AT, layout.CELLS_AT + layout.CELLS * layout.CELL_SIZE, layout.CELL_SIZE):
        if not copy[at + layout.IN_USE]:  # most are not
            continue
        length, began, rss, name, _ = layout.CELL.unpack_from(copy, at)
        began = layout.seconds(began)
        if began is not None:
            found.append(InFlight(printable(name[:length]), since_1970 + began, optional(rss)))
    return found
