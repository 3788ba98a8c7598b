"""The workers of a pool, in short form: for the supervisor's schedule, and for workers that take turns."""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator
from typing import NamedTuple

from oomsafe.policy.recycle import Order
from oomsafe.policy.state import State
from oomsafe.policy.trend import Growth
from oomsafe.scoreboard import layout
from oomsafe.scoreboard.header import Header
from oomsafe.scoreboard.layout import optional, stored
from oomsafe.scoreboard.live import brought_forward
from oomsafe.scoreboard.slot import Cap, Slot, order_of
from oomsafe.scoreboard.tenants import Tenants

#: From ORDER_AT on: the order, then of the figures baseline, soft and hard limit and when they were published, and the two paces.
_PLAN = struct.Struct("<I56x3q32xd48x2q")

#: From FIGURES_AT on: rss, when the figures were published, and what the soft limit is compared with.
_PUBLISHED = struct.Struct("<q64xd40xq")

assert layout.FIGURES_AT + _PUBLISHED.size == layout.NEED_AT + 8
assert _PLAN.size == layout.NEED_AT + layout.NEED.size - layout.ORDER_AT


class Entry(NamedTuple):
    """One worker. Sizes in bytes; None is a figure that is not known."""

    number: int
    generation: int
    state: State
    rss: int | None
    anon: int | None
    baseline: int | None
    soft: int | None
    hard: int | None
    used: int | None
    """What the soft limit is compared with."""
    growth: Growth
    order: Order
    aged: bool = False
    """Whether it has served for its lifetime, or an operator has ordered it to be recycled, as the worker has published it."""


class Others(NamedTuple):
    """How many other workers are in which state."""

    starting: int = 0
    serving: int = 0
    leaving: int = 0
    """They drain or leave."""
    turns: int = 1
    """How many workers may be away at once."""


class Roll:
    """The workers on one scoreboard; `tenants` knows which worker has which slot."""

    def __init__(self, memory: memoryview, header: Header, tenants: Tenants) -> None:
        self._memory = memory
        self._header = header
        self._tenants = tenants
        self._states = self._times = _column(layout.STATE, 0, 0)
        """Each reads one field of all slots."""

    def call(self) -> list[Entry]:
        """In the supervisor: every worker that has a slot, with what the schedule needs. A dead one is listed until it is released."""
        return [self._entry(number, generation, state) for number, generation, state in sorted(self._present())]

    def marks(self) -> tuple[int, ...]:
        """In the supervisor: numbers that are others if a worker's state has changed, or a worker has come or gone.

        One read for all of them, because a supervisor may do this ten times a second.
        """
        slots = self._slots_in_use()
        if self._states.size != slots * layout.SLOT_SIZE:
            self._states = _column(layout.STATE, 0, slots)
        return (self._tenants.generations, len(self._tenants.by_number), *self._states.unpack_from(self._memory, layout.HEADER_SIZE))

    def all_serve(self, marks: tuple[int, ...]) -> bool:
        """In the supervisor: whether there are workers, and by these marks each of them serves and asks for nothing."""
        _, workers, *states = marks
        return workers > 0 and all(states[number] == layout.SERVING for number in self._tenants.by_number)

    def _present(self) -> Iterator[tuple[int, int, State]]:
        """(slot, generation, state) of each of them."""
        for number, tenant in self._tenants.by_number.items():
            state = layout.read_state(self._memory, layout.slot_at(number), unknown=State.STARTING)
            if state is not State.FREE and not self._tenants.was_never_born(number):
                yield number, tenant.generation, state

    def others(self, slot: Slot) -> Others:
        """The living workers beside `slot`."""
        self._tenants.learn()
        starting = serving = leaving = 0
        for number in range(self._tenants.slots):
            state = layout.read_state(self._memory, layout.slot_at(number))
            if state is not State.FREE and number != slot.number and not self._tenants.is_abandoned(number):
                starting += state is State.STARTING
                serving += state.serves
                leaving += state.leaves
        return Others(starting, serving, leaving, self._header.turns)

    def silent(self, before: float) -> list[tuple[int, int, int]]:
        """In the supervisor: (slot, pid, start time) of the workers that have published nothing since `before`, seconds since 1970."""
        slots = self._slots_in_use()
        if self._times.size != slots * layout.SLOT_SIZE:
            self._times = _column(layout.PUBLISHED, layout.PUBLISHED_AT, slots)
        published = self._times.unpack_from(self._memory, layout.HEADER_SIZE)
        found = []
        for number in self._tenants.by_number:
            who = None if published[number] >= before else self._tenants.identity(number)
            if who is not None and who[0]:
                found.append((number, who[0], who[1]))
        return found

    def _slots_in_use(self) -> int:
        """The number of slots up to the last one that has a worker."""
        return 1 + max(self._tenants.by_number, default=-1)

    def saw(self, number: int, sizes: tuple[int, int], *, counts_clean: bool) -> None:
        """In the supervisor: record what a slot's worker holds, as sizes_of() has measured it from outside.

        `counts_clean`: the policy's metric counts clean file pages.
        """
        at = layout.slot_at(number)
        before, dirty = self._published(at)
        rss, anon, used = brought_forward(sizes, before, dirty or 0, counts_clean=counts_clean)
        layout.write(self._memory, at + layout.MEASURED_AT, layout.MEASURED, time.time(), rss, anon, stored(used))

    def quiet_for(self, number: int, now: float) -> float | None:
        """Seconds since work last began in this slot's worker, by its own record, at `now` on the monotonic clock.

        inf: none ever has; None: some is in flight.
        """
        first = layout.slot_at(number) + layout.CELLS_AT
        began = float("-inf")
        for at in range(first, first + layout.CELLS * layout.CELL_SIZE, layout.CELL_SIZE):
            if self._memory[at + layout.IN_USE]:
                return None
            # what has ended leaves the time of its begin behind
            when = layout.seconds(layout.CELL.unpack_from(self._memory, at)[1])
            began = max(began, when) if when else began
        return max(0.0, now - began)

    def began_with(self, number: int) -> list[int | None]:
        """For each piece of work that this slot's worker has in flight, by its own record: the rss that it had when that began, and what it
        has grown by since for other work, in bytes; None: not known."""
        first, memory = layout.slot_at(number) + layout.CELLS_AT, self._memory
        cells = range(first, first + layout.CELLS * layout.CELL_SIZE, layout.CELL_SIZE)
        return [optional(layout.CELL_RSS.unpack_from(memory, at + layout.CELL_RSS_AT)[0]) for at in cells if memory[at + layout.IN_USE]]

    def give_order(self, number: int, generation: int, order: Order) -> None:
        """In the supervisor: order this worker to drain, now or once it is over its limit."""
        if self._tenants.is_of(number, generation):
            layout.write(self._memory, layout.slot_at(number) + layout.ORDER_AT, layout.ORDER, order)

    def pass_on(self, number: int, generation: int) -> None:
        """In the supervisor: tell this worker that an operator has ordered it to be recycled."""
        if self._tenants.is_of(number, generation):
            layout.write(self._memory, layout.slot_at(number) + layout.OPERATOR_AT, layout.OPERATOR, 1)

    def order_probe(self, number: int, generation: int, work: int, seconds: float) -> None:
        """In the supervisor: tell this worker to trace its allocations for so many pieces of work and so many seconds at most."""
        if self._tenants.is_of(number, generation):
            layout.write(self._memory, layout.slot_at(number) + layout.PROBE_AT, layout.PROBE, work, seconds)

    def order_inspection(self, number: int, generation: int, ordered: bool = True) -> None:
        """In the supervisor: tell this worker to tell what its memory is, while it serves; `ordered` False: not any more."""
        if self._tenants.is_of(number, generation):
            layout.write(self._memory, layout.slot_at(number) + layout.INSPECT_AT, layout.INSPECT, ordered)

    def is_ordered_to_be_inspected(self, number: int, generation: int) -> bool:
        """In the supervisor: whether this worker has that order, and has not taken it yet."""
        at = layout.slot_at(number) + layout.INSPECT_AT
        return self._tenants.is_of(number, generation) and bool(layout.INSPECT.unpack_from(self._memory, at)[0])

    def cap(self, number: int, generation: int, cap: Cap) -> None:
        """In the supervisor: tell this worker what it may have mapped at most for now."""
        if self._tenants.is_of(number, generation):
            layout.write(self._memory, layout.slot_at(number) + layout.CAP_AT, layout.CAP, *cap)

    def _entry(self, number: int, generation: int, state: State) -> Entry:
        at = layout.slot_at(number)
        # one read for all of these: a supervisor may do this ten times a second for each worker
        order, baseline, soft, hard, published, steady, burst = _PLAN.unpack_from(self._memory, at + layout.ORDER_AT)
        rss, anon, used = layout.measured_since(self._memory, published, at) or self._published(at)[0]
        return Entry(
            number=number, generation=generation, state=state, rss=rss, anon=anon, baseline=optional(baseline), soft=optional(soft),
            hard=optional(hard), used=used, growth=Growth(float(max(0, steady)), float(max(0, burst))), order=order_of(order),
            aged=bool(layout.AGED.unpack_from(self._memory, at + layout.AGED_AT)[0]),
        )  # fmt: skip

    def _published(self, at: int) -> tuple[tuple[int | None, int | None, int | None], int | None]:
        """(rss, anon, what the soft limit is compared with), as the worker itself published them; and the dirty file pages in anon."""
        rss, published, used = _PUBLISHED.unpack_from(self._memory, at + layout.FIGURES_AT)
        if not published:  # until then, the zeros are not figures
            return (None, None, None), None
        anon, _, dirty = layout.MORE.unpack_from(self._memory, at + layout.MORE_AT)
        return (optional(rss), optional(anon), optional(used)), optional(dirty)


def _column(form: struct.Struct, at: int, slots: int) -> struct.Struct:
    """Reads the one field that lies at `at` in each of the first `slots` slots."""
    rest = layout.SLOT_SIZE - at - form.size
    return struct.Struct("<" + f"{at}x{form.format[1:]}{rest}x" * slots)
