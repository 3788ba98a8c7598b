"""A worker's own slot: the one place on the scoreboard that this worker writes to, and no other worker."""

from __future__ import annotations

import binascii
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from oomsafe.kernel.process import COMM_LENGTH, start_time
from oomsafe.policy.readers import SCORE_MAX
from oomsafe.policy.recycle import Order
from oomsafe.policy.state import State
from oomsafe.policy.trend import Growth
from oomsafe.scoreboard import layout
from oomsafe.scoreboard.forks import own
from oomsafe.scoreboard.layout import Counters, optional, stored

#: -1 is a valid score, so None is written as a number that is not.
_NO_SCORE = -32768

_ORDERS = frozenset(Order)

#: The most seconds for which a cap holds, unless it is put again: a supervisor that has ended lifts none.
CAPPED_FOR = 0.5

_pack_hand = layout.HAND.pack
_EMPTY_HAND = _pack_hand(0, 0)


@dataclass
class Figures:
    """The figures that a worker publishes, in bytes; None is a figure that is not known."""

    rss: int | None = None
    peak_rss: int | None = None
    baseline: int | None = None
    """What it held right after boot, in the metric of the soft limit."""
    soft: int | None = None
    hard: int | None = None
    pss: int | None = None
    uss: int | None = None
    oom_score_adj: int | None = None
    in_flight: int = 0
    anon: int | None = None
    """rss without clean file pages, which the kernel drops by itself."""
    private: int | None = None
    """uss without clean file pages."""
    file_dirty: int | None = None
    """File pages that the kernel can't drop yet, as far as known: a part of anon."""

    def stored(self) -> tuple[int, ...]:
        """The numbers for the slot's field of figures, except the time."""
        sizes = (self.rss, self.peak_rss, self.baseline, self.soft, self.hard, self.pss, self.uss)
        score = _NO_SCORE if self.oom_score_adj is None else self.oom_score_adj
        return (*map(stored, sizes), score, self.in_flight)

    @classmethod
    def unpack(cls, slot: bytes) -> Figures:
        """The figures in the bytes of a slot; a figure out of its range is None (in_flight: 0)."""
        rss, peak, baseline, soft, hard, pss, uss, score, in_flight, _ = layout.FIGURES.unpack_from(slot, layout.FIGURES_AT)
        anon, private, dirty = layout.MORE.unpack_from(slot, layout.MORE_AT)
        return cls(
            rss=optional(rss), peak_rss=optional(peak), anon=optional(anon),
            pss=optional(pss), uss=optional(uss), private=optional(private),
            baseline=optional(baseline), soft=optional(soft), hard=optional(hard),
            oom_score_adj=score if abs(score) <= SCORE_MAX else None, in_flight=optional(in_flight) or 0, file_dirty=optional(dirty),
        )  # fmt: skip


class Cap(NamedTuple):
    """What the supervisor allows a worker at most for now, because its pool's memory is about to run out. Bytes."""

    most: int
    """What it may have mapped, as RLIMIT_DATA counts it."""
    before: int
    """The soft value of RLIMIT_DATA that the supervisor found, and puts back."""
    room: int
    """What was left up to the pool's limit."""
    until: float = 0.0
    """When it ends, on the machine's monotonic clock."""

    def holds(self, now: float, after: float = 0.0) -> bool:
        """Whether it is in force, or ended no more than `after` seconds ago."""
        return self.most > 0 and now < self.until + after and self.until <= now + CAPPED_FOR


class Slot:
    """Writes one slot of a scoreboard, or of private memory if there is no scoreboard.

    It belongs to the process that claims it: in a fork of that process, the same object writes to a private copy.
    """

    def __init__(self, memory: memoryview, offset: int = 0, number: int = 0, generation: int = 0) -> None:
        self.number = number
        self.generation = generation
        """Identifies the worker, counted over the pool's life; slot numbers are reused."""
        self._sequence = 0
        self._lie(memory, offset)

    def _lie(self, memory: memoryview, offset: int) -> None:
        self._memory = memory
        self._at = offset
        # written twice for each piece of work
        self._hand = slice(offset + layout.HAND_AT, offset + layout.HAND_AT + layout.HAND.size)

    @classmethod
    def private(cls) -> Slot:
        """A slot in private memory, which no other process can read."""
        slot = cls(memoryview(bytearray(layout.SLOT_SIZE)))
        slot.claim()
        return slot

    def copy(self) -> bytes:
        """Its bytes."""
        return self._memory[self._at : self._at + layout.SLOT_SIZE].tobytes()

    def claim(self) -> None:
        """Write this process's pid and start time to a slot that was reserved for it; the rest stays."""
        # the pid last, so that a reader that finds a pid also finds its start time
        layout.write(self._memory, self._at + layout.STARTED_AT, layout.WORD, start_time() or 0)
        layout.write(self._memory, self._at + layout.PID_AT, layout.WORD, os.getpid())
        self.set_state(State.STARTING)
        own(self)

    def leave(self) -> None:
        """In a fork of the process that claimed it: write to a private copy from now on."""
        try:
            copy = self.copy()
        except ValueError:  # the scoreboard was closed
            copy = bytes(layout.SLOT_SIZE)
        self._lie(memoryview(bytearray(copy)), 0)

    @property
    def state(self) -> State:
        """The worker's state."""
        return layout.read_state(self._memory, self._at)

    def set_state(self, state: State) -> None:
        """Publish the worker's state at once, because other processes wait for it."""
        layout.write_state(self._memory, self._at, state)

    @property
    def age(self) -> float:
        """Seconds since the slot was reserved, right before its worker was started."""
        return time.time() - float(layout.OWNER.unpack_from(self._memory, self._at + layout.OWNER_AT)[3])

    @property
    def order(self) -> Order:
        """The supervisor's order to this worker."""
        return order_of(layout.ORDER.unpack_from(self._memory, self._at + layout.ORDER_AT)[0])

    @property
    def operator_orders(self) -> bool:
        """Whether an operator has ordered this worker to be recycled; its supervisor passes that on here."""
        return bool(layout.OPERATOR.unpack_from(self._memory, self._at + layout.OPERATOR_AT)[0])

    @property
    def probe_order(self) -> tuple[int, float] | None:
        """(pieces of work, seconds): the window in which this worker is to trace its allocations; None: it has no such order."""
        work, seconds = layout.PROBE.unpack_from(self._memory, self._at + layout.PROBE_AT)
        return (work, seconds) if work else None

    def take_probe_order(self) -> tuple[int, float] | None:
        """The same, once: it is gone then, so that another one can be told from it."""
        order = self.probe_order
        if order is not None:
            layout.write(self._memory, self._at + layout.PROBE_AT, layout.PROBE, 0, 0.0)
        return order

    @property
    def is_to_be_inspected(self) -> bool:
        """Whether this worker is to tell what its memory is, while it serves."""
        return bool(layout.INSPECT.unpack_from(self._memory, self._at + layout.INSPECT_AT)[0])

    def take_inspection_order(self) -> bool:
        """The same, once."""
        ordered = self.is_to_be_inspected
        if ordered:
            layout.write(self._memory, self._at + layout.INSPECT_AT, layout.INSPECT, 0)
        return ordered

    @property
    def cap(self) -> Cap:
        """The last cap that the supervisor has put on this worker, whether or not it is in force."""
        return Cap(*layout.CAP.unpack_from(self._memory, self._at + layout.CAP_AT))

    def need(self, used: int | None, growth: Growth, aged: bool = False) -> None:
        """Publish what this worker holds, as its soft limit counts it, and how fast it grows.

        `aged`: it has served for its lifetime, or an operator has ordered it to be recycled.
        """
        layout.write(self._memory, self._at + layout.AGED_AT, layout.AGED, aged)
        paces = (min(int(pace), layout.LARGEST) for pace in growth)
        layout.write(self._memory, self._at + layout.NEED_AT, layout.NEED, stored(used), *paces)

    def take_up(self, ticket: int, held: int) -> None:
        """This worker begins the work with this ticket, and held `held` bytes before."""
        self._memory[self._hand] = _pack_hand(ticket, held)

    def put_down(self) -> None:
        """This worker has ended the current work."""
        self._memory[self._hand] = _EMPTY_HAND

    @property
    def warned_of_limit(self) -> tuple[int, int, int]:
        """(ticket, used, limit): the work that the supervisor last found over its soft limit, and bytes; zeros once it was warned."""
        ticket, used, limit = layout.WARNED.unpack_from(self._memory, self._at + layout.WARNED_AT)
        return ticket, used, limit

    def heed_limit(self, ticket: int) -> tuple[int, int] | None:
        """(used, limit) in bytes if this work is over its soft limit and was not warned yet, and mark it as warned; else None."""
        warned, used, limit = self.warned_of_limit
        if not ticket or warned != ticket:
            return None
        # the supervisor writes no other ticket while this work is current
        layout.write(self._memory, self._at + layout.WARNED_AT, layout.WARNED, 0, 0, 0)
        return used, limit

    def publish(self, figures: Figures, counters: Counters) -> None:
        """Write the figures and the counters; a reader that finds them half written reads again."""
        at, memory = self._at, self._memory
        packed = counters.pack()
        self._sequence += 1
        layout.write(memory, at + layout.SLOT_SEQUENCE_AT, layout.SEQUENCE, self._sequence)
        layout.write(memory, at + layout.MORE_AT, layout.MORE, *map(stored, (figures.anon, figures.private, figures.file_dirty)))
        layout.write(memory, at + layout.FIGURES_AT, layout.FIGURES, *figures.stored(), time.time())
        memory[at + layout.COUNTERS_AT : at + layout.COUNTERS_AT + len(packed)] = packed
        self._sequence += 1
        layout.write(memory, at + layout.SLOT_SEQUENCE_AT, layout.SEQUENCE, self._sequence)

    def cells(self) -> tuple[memoryview, Callable[..., None], list[int]]:
        """Direct access for recording work in flight, at once, so that it survives a SIGKILL: memory, write, offsets of the cells.

        Call ``write(offset, length, began, rss, name, 1)``, and set ``memory[offset + IN_USE] = 0`` when the work has ended.
        """
        first = self._at + layout.CELLS_AT
        offsets = range(first, first + layout.CELLS * layout.CELL_SIZE, layout.CELL_SIZE)
        return self._memory, partial(layout.CELL.pack_into, self._memory), list(reversed(offsets))


def order_of(word: int) -> Order:
    """The order that a slot's number stands for; Order.NONE for an unknown number."""
    return Order(word) if word in _ORDERS else Order.NONE


def comm_of(supervisor: int, slot: Slot) -> str:
    """A worker's process name, as the kernel's OOM report shows it: ``oomsafe-w3-a1b2``. At most 15 bytes, and practically unique.

    The report gives pids of the initial PID namespace, which a container can't match, but it can match the name.
    """
    mark = (binascii.crc32(b"%d" % supervisor) + slot.generation) & 0xFFFF
    return f"oomsafe-w{slot.number}-{mark:04x}"[:COMM_LENGTH]
