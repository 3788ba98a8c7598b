"""The header of a scoreboard: what the supervisor publishes about the pool, and what workers share among themselves."""

from __future__ import annotations

import dataclasses
import struct
import time
from typing import Generic, NamedTuple, TypeVar

from oomsafe.policy.ends import End
from oomsafe.policy.inspection import Inspection
from oomsafe.policy.limits import Capacity
from oomsafe.policy.probed import Probed, Stage
from oomsafe.policy.retirement import POINTS, Point, Retirement
from oomsafe.policy.stock import Parts
from oomsafe.policy.text import printable, shortened
from oomsafe.scoreboard import layout
from oomsafe.scoreboard.inspections import read_inspection, write_inspection
from oomsafe.scoreboard.layout import optional, stored
from oomsafe.scoreboard.lock import PoolLock

T = TypeVar("T", int, float)

#: How often a worker that has nothing else to do any more tries to get the lock, 5 ms apart.
PATIENCE = 40


class _Field(Generic[T]):
    """One number in the shared bytes, read and written in place."""

    def __init__(self, at: int, form: struct.Struct, place: int = 0) -> None:
        self._at, self._form, self._place = at, form, place

    def __get__(self, header: Header, kind: type[Header]) -> T:
        number: T = self._form.unpack_from(header.memory, self._at)[self._place]
        return number

    def __set__(self, header: Header, number: T) -> None:
        fields = [*self._form.unpack_from(header.memory, self._at)]
        fields[self._place] = number
        layout.write(header.memory, self._at, self._form, *fields)


class _Text:
    """Text in a field of its own, cut at its length."""

    def __init__(self, at: int, form: struct.Struct) -> None:
        self._at, self._form = at, form

    def __get__(self, header: Header, kind: type[Header]) -> str:
        return layout.as_text(self._form.unpack_from(header.memory, self._at)[0])

    def __set__(self, header: Header, text: str) -> None:
        layout.write(header.memory, self._at, self._form, shortened(text, self._form.size).encode("utf-8", "replace"))


class Allowed(NamedTuple):
    """What the kernel allows, as the supervisor measured it (see policy.limits.Capacity). Sizes in bytes; None: not known."""

    changes: int
    """How often it has changed; 0: the supervisor has not published it."""
    limit: int | None = None
    smallest: int | None = None
    others: int | None = None
    supervisor: int | None = None
    """What the supervisor holds."""


class Header:
    """The header of one scoreboard. `lock` protects fields that are read and then written."""

    generations: _Field[int] = _Field(layout.POOL_AT, layout.POOL, 0)
    """How many generations have been handed out. Written by the supervisor."""
    workers: _Field[int] = _Field(layout.POOL_AT, layout.POOL, 1)
    """How many workers the supervisor wants now."""
    turns: _Field[int] = _Field(layout.POOL_AT, layout.POOL, 2)
    """How many workers may be away at once."""
    decided_at: _Field[float] = _Field(layout.DECIDED_AT, layout.DECIDED)
    """When the supervisor last decided which workers may leave, on the monotonic clock; 0: it gives no orders."""
    metric = _Text(layout.METRIC_AT, layout.METRIC)
    """What soft limits are compared with. Written by the supervisor."""
    name = _Text(layout.NAME_AT, layout.NAME)
    """What the pool is called; empty: nothing. Written by the supervisor."""
    droppable: _Field[int] = _Field(layout.DROPPABLE_AT, layout.DROPPABLE)
    """The bytes of `held` that are page cache, which the kernel drops before it kills. Written by the supervisor."""
    ended: _Field[float] = _Field(layout.ENDED_AT, layout.ENDED)
    """When the supervisor ended in order, seconds since 1970; 0: it has not. A supervisor that is killed leaves 0."""
    unit = _Text(layout.UNIT_AT, layout.UNIT)
    """What the workers count, in the plural; empty: none has said it. Written by each of them."""

    def __init__(self, memory: memoryview, lock: PoolLock) -> None:
        self.memory = memory
        self._lock = lock

    def describe(self, *, workers: int, turns: int, limit: int | None, budget: int | None, anew: bool = True) -> None:
        """The supervisor publishes the pool's size and limits; `limit` and `budget` are in bytes, None is not known.

        `anew`: the limits have changed, so what workers learnt under the old ones is discarded.
        """
        server = layout.POOL.unpack_from(self.memory, layout.POOL_AT)[-1]
        figures = (self.generations, workers, turns, stored(limit), stored(budget), server)
        layout.write(self.memory, layout.POOL_AT, layout.POOL, *figures)
        if anew:
            layout.write(self.memory, layout.REFUSED_AT, layout.REFUSED, 0)
            self.settled = 0

    def allow(self, capacity: Capacity) -> None:
        """The supervisor publishes the capacity from which running workers compute their limits."""
        figures = tuple(map(stored, (capacity.limit, capacity.smallest, capacity.others, capacity.supervisor)))
        changes, *before = layout.ALLOWED.unpack_from(self.memory, layout.ALLOWED_AT)
        layout.write(self.memory, layout.SOURCE_AT, layout.SOURCE, str(capacity.source).encode("utf-8", "replace"))
        if not changes or tuple(before) != figures:
            layout.write(self.memory, layout.ALLOWED_AT, layout.ALLOWED, layout.count(changes + 1) or 1, *figures)

    @property
    def allowed(self) -> Allowed | None:
        """What allow() has published; None while it is being written."""
        found = layout.ALLOWED.unpack_from(self.memory, layout.ALLOWED_AT)
        if found != layout.ALLOWED.unpack_from(self.memory, layout.ALLOWED_AT):
            return None
        return Allowed(found[0], *map(optional, found[1:]))

    @property
    def held(self) -> int | None:
        """What the pool held when the supervisor last measured it, in bytes, as the budget counts it; None: not known."""
        return optional(layout.HELD.unpack_from(self.memory, layout.HELD_AT)[0])

    @held.setter
    def held(self, held: int | None) -> None:
        layout.write(self.memory, layout.HELD_AT, layout.HELD, stored(held))

    @property
    def held_share(self) -> float:
        """What the pool held when the supervisor last measured it, as a share of its budget; 0: one of them is not known."""
        held, budget = self._held_of_budget
        return held / budget if held is not None and budget else 0.0

    @property
    def room(self) -> int | None:
        """What the supervisor last found left up to the budget, in bytes, negative above it; None: not known."""
        held, budget = self._held_of_budget
        return None if held is None or budget is None else budget - held

    @property
    def _held_of_budget(self) -> tuple[int | None, int | None]:
        return self.held, optional(layout.POOL.unpack_from(self.memory, layout.POOL_AT)[4])

    @property
    def settled(self) -> int:
        """How many recycled workers in a row had settled above their soft limit. Read and set with the lock held."""
        return int(layout.SETTLED.unpack_from(self.memory, layout.SETTLED_AT)[0])

    @settled.setter
    def settled(self, count: int) -> None:
        layout.write(self.memory, layout.SETTLED_AT, layout.SETTLED, min(count, 0xFFFF))

    @property
    def unserved(self) -> tuple[float, float]:
        """(since, before): since when no worker has served, on the monotonic clock, or 0 while one serves; seconds of earlier gaps."""
        since, before = layout.UNSERVED.unpack_from(self.memory, layout.UNSERVED_AT)
        return since, before

    @unserved.setter
    def unserved(self, unserved: tuple[float, float]) -> None:
        layout.write(self.memory, layout.UNSERVED_AT, layout.UNSERVED, *unserved)

    def note_recycle(self, line: str, culprit: str | None = None) -> None:
        """A worker has just logged this line about its end; `culprit` is the route that made it grow, None: not known.

        Without the lock, which another worker has, the older line stays, and the culprit is not counted.
        """
        if self._lock.try_acquire():
            try:
                text = shortened(line, layout.RECYCLED.size).encode("utf-8", "replace")  # what is too long is cut by the field
                layout.write(self.memory, layout.RECYCLED_AT, layout.RECYCLED, time.time(), text)
                if culprit is not None:
                    self._count_culprit(layout.route_name(culprit))
            finally:
                self._lock.release()

    def _count_culprit(self, route: str) -> None:
        known = self._names()
        counts = [*layout.CULPRITS.unpack_from(self.memory, layout.CULPRITS_AT)]
        place = known.index(route) if route in known else layout.ROUTES
        counts[place] = layout.count(counts[place] + 1)
        layout.write(self.memory, layout.CULPRITS_AT, layout.CULPRITS, *counts)

    def note_retirement(self, one: Retirement) -> None:
        """A recycled worker tells what its memory was. If others have the lock for long, or one was killed with it, it is left out."""
        from oomsafe.scoreboard.objects import packed  # imported here, because only a worker that was recycled needs it

        objects = packed(one.objects, one.generation, one.at)
        for _ in range(PATIENCE):
            if self._lock.try_acquire():
                break
            time.sleep(0.005)
        else:
            return
        try:
            (count,) = layout.RETIREMENTS.unpack_from(self.memory, layout.RETIREMENTS_AT)
            points = [*one.points[-POINTS:], *[Point(0, 0)] * (POINTS - len(one.points))]
            fields = (
                one.at, one.pid, one.slot, layout.REASONS.index(one.reason), one.generation, one.work, one.served, stored(one.fresh),
                *(stored(getattr(one.parts, part.name)) for part in dataclasses.fields(one.parts)),
                *(number for point in points for number in (point.work, point.held)),
            )  # fmt: skip
            number = count % layout.RETIRED_KEPT
            objects_at = layout.OBJECTS_AT + number * layout.OBJECTS_SIZE
            self.memory[objects_at : objects_at + layout.OBJECTS_SIZE] = objects
            layout.write(self.memory, layout.RETIRED_AT + number * layout.RETIRED.size, layout.RETIRED, *fields)
            layout.write(self.memory, layout.RETIREMENTS_AT, layout.RETIREMENTS, layout.count(count + 1))
        finally:
            self._lock.release()

    @property
    def retirements(self) -> int:
        """How many recycled workers have told what their memory was."""
        return int(layout.RETIREMENTS.unpack_from(self.memory, layout.RETIREMENTS_AT)[0])

    def note_probe(self, pid: int, generation: int, stage: Stage, text: str, path: str = "") -> None:
        """The worker that is probed tells how far it is; `path` is where its report lies."""
        raw = shortened(text, 256).encode("utf-8", "replace"), path.encode("utf-8", "surrogateescape")
        fits = len(raw[1]) < layout.PROBED.size - 28 - 256
        layout.write(self.memory, layout.PROBED_AT, layout.PROBED, time.time(), pid, generation, stage, raw[0], raw[1] if fits else b"")

    @property
    def probed(self) -> Probed | None:
        """The last probe; None: there was none."""
        return read_probed(self.memory)

    def note_inspection(self, one: Inspection) -> None:
        """The worker that is inspected tells, or a fork of it; the supervisor, if neither does."""
        write_inspection(self.memory, one)

    def note_stop(self, seconds: float) -> None:
        """The worker that is inspected tells for how long it stood still: its fork may have told the rest by then."""
        layout.write(self.memory, layout.STOPPED_AT, layout.MOMENT, seconds)

    @property
    def inspected(self) -> Inspection | None:
        """The last inspection; None: there was none."""
        return read_inspection(self.memory)

    def reclaims(self) -> tuple[int, int]:
        """How often workers that are gone have given memory back, and how many bytes of it."""
        gone = layout.Counters.unpack(bytes(self.memory[layout.TOTALS_AT : layout.TOTALS_AT + layout.COUNTERS_SIZE]), routes=False)
        return gone.reclaims, gone.reclaimed

    def trimmed(self) -> list[int]:
        """What a trim gave back of each recycled worker that is remembered, at its end; in bytes, without those where it is not known."""
        place = layout.PARTS_PLACE + [part.name for part in dataclasses.fields(Parts)].index("malloc_kept")
        rows = (layout.RETIRED.unpack_from(self.memory, layout.RETIRED_AT + n * layout.RETIRED.size) for n in range(layout.RETIRED_KEPT))
        return [freed for row in rows if row[0] > 0 and (freed := optional(row[place])) is not None]

    def note_death(self, end: End, line: str | None, at: float) -> None:
        """The supervisor counts the end of a worker; `line` None: it was in order, and is not shown. `at` in seconds since 1970."""
        counts = [*layout.ENDS.unpack_from(self.memory, layout.ENDS_AT)]
        number = tuple(End).index(end)
        counts[number] = layout.count(counts[number] + 1)
        layout.write(self.memory, layout.ENDS_AT, layout.ENDS, *counts)
        if line is None:
            return
        (died,) = layout.DIED.unpack_from(self.memory, layout.DIED_AT)
        place = layout.DEATHS_AT + died % layout.DEATHS * layout.DEATH.size
        text = shortened(line, layout.DEATH.size - layout.DEATH_HEAD).encode("utf-8", "replace")
        layout.write(self.memory, place, layout.DEATH, at, number, text)
        layout.write(self.memory, layout.DIED_AT, layout.DIED, layout.count(died + 1))

    def first_to_refuse(self, which: int) -> bool:
        """Whether this worker is the pool's first to refuse this limit (layout.REFUSES_SOFT and so on), and should log it."""
        locked = self._lock.try_acquire()  # without it two workers may log it, which is better than waiting for a stopped process
        (said,) = layout.REFUSED.unpack_from(self.memory, layout.REFUSED_AT)
        layout.write(self.memory, layout.REFUSED_AT, layout.REFUSED, said | which)
        if locked:
            self._lock.release()
        return not said & which

    def has_said(self, which: int) -> bool:
        """Whether a worker has logged this for all: see first_to_refuse()."""
        return bool(layout.REFUSED.unpack_from(self.memory, layout.REFUSED_AT)[0] & which)

    def take_back(self, which: int) -> None:
        """What was logged no longer holds: the next worker that finds it so logs it again."""
        locked = self._lock.try_acquire()
        (said,) = layout.REFUSED.unpack_from(self.memory, layout.REFUSED_AT)
        layout.write(self.memory, layout.REFUSED_AT, layout.REFUSED, said & ~which)
        if locked:
            self._lock.release()

    def admit(self, route: str) -> str | None:
        """The name under which every worker of the pool counts `route`; None: ask again later.

        The pool has one list of names, first come, first served, and OTHER for the rest. So all workers count a route
        under the same name, also after a worker is gone.
        """
        name = layout.route_name(route)
        known = self._names()
        if name in known or len(known) >= layout.ROUTES - 1:
            return name if name in known else layout.OTHER
        if not self._lock.try_acquire():
            return layout.OTHER if self._lock.lost else None
        try:
            known = self._names()
            if name not in known and len(known) < layout.ROUTES - 1:
                at = layout.NAMES_AT + len(known) * layout.ROUTE_NAME
                self.memory[at : at + layout.ROUTE_NAME] = name.encode().ljust(layout.ROUTE_NAME, b"\0")
                known.append(name)
        finally:
            self._lock.release()
        return name if name in known else layout.OTHER

    def _names(self) -> list[str]:
        rows = range(layout.NAMES_AT, layout.NAMES_AT + layout.ROUTES * layout.ROUTE_NAME, layout.ROUTE_NAME)
        names = [layout.as_text(self.memory[at : at + layout.ROUTE_NAME].tobytes()) for at in rows]
        return [name for name in names if name]


def read_probed(header: bytes | memoryview) -> Probed | None:
    """The last probe; None: there was none, or what is there is impossible."""
    when, pid, generation, stage, text, path = layout.PROBED.unpack_from(header, layout.PROBED_AT)
    at = layout.seconds(when)
    if not at or stage not in frozenset(Stage):
        return None
    where = path.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
    return Probed(at, pid, generation, Stage(stage), printable(layout.as_text(text), 256), where)
