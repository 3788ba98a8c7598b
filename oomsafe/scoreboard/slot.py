"""A worker's own slot: the one place that this worker, and nobody else, writes to."""

from __future__ import annotations

import binascii
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from oomsafe.kernel.process import COMM_LENGTH, start_time
from oomsafe.policy.readers import SCORE_MAX
from oomsafe.policy.recycle import Order
from oomsafe.policy.state import State
from oomsafe.policy.trend import Growth
from oomsafe.scoreboard import layout
from oomsafe.scoreboard.forks import own
from oomsafe.scoreboard.layout import Counters, optional, stored

#: -1 is a score like any other, so None is written as a number that is none.
_NO_SCORE = -32768

_pack_hand = layout.HAND.pack
_EMPTY_HAND = _pack_hand(0, 0)


@dataclass
class Figures:
    """What a worker says of itself, in bytes; None is a figure that is not known."""

    rss: int | None = None
    peak_rss: int | None = None
    baseline: int | None = None
    """What the soft limit is compared with, right after boot."""
    soft: int | None = None
    hard: int | None = None
    pss: int | None = None
    uss: int | None = None
    oom_score_adj: int | None = None
    in_flight: int = 0
    anon: int | None = None
    """rss without clean file pages, which the kernel drops by itself."""
    private: int | None = None
    """uss without them."""

    def stored(self) -> tuple[int, ...]:
        """As they stand in a slot, but for the time."""
        sizes = (self.rss, self.peak_rss, self.baseline, self.soft, self.hard, self.pss, self.uss)
        score = _NO_SCORE if self.oom_score_adj is None else self.oom_score_adj
        return (*map(stored, sizes), score, self.in_flight)

    @classmethod
    def unpack(cls, slot: bytes) -> Figures:
        """The figures in the bytes of a slot; what is out of its range is not known."""
        rss, peak, baseline, soft, hard, pss, uss, score, in_flight, _ = layout.FIGURES.unpack_from(slot, layout.FIGURES_AT)
        anon, private = layout.MORE.unpack_from(slot, layout.MORE_AT)
        return cls(
            rss=optional(rss), peak_rss=optional(peak), anon=optional(anon),
            pss=optional(pss), uss=optional(uss), private=optional(private),
            baseline=optional(baseline), soft=optional(soft), hard=optional(hard),
            oom_score_adj=score if abs(score) <= SCORE_MAX else None, in_flight=optional(in_flight) or 0,
        )  # fmt: skip


class Slot:
    """Writes one slot of a scoreboard, or of private memory where there is no scoreboard.

    It is the process's that claims it: in a fork of that, the same object writes to a copy, which nobody sees.
    """

    def __init__(self, memory: memoryview, offset: int = 0, number: int = 0, generation: int = 0) -> None:
        self.number = number
        self.generation = generation
        """Which worker of the pool this is, counted over the pool's life; the number is given again."""
        self._sequence = 0
        self._lie(memory, offset)

    def _lie(self, memory: memoryview, offset: int) -> None:
        self._memory = memory
        self._at = offset
        # written twice for each piece of work
        self._hand = slice(offset + layout.HAND_AT, offset + layout.HAND_AT + layout.HAND.size)

    @classmethod
    def private(cls) -> Slot:
        """A slot that only this process sees."""
        slot = cls(memoryview(bytearray(layout.SLOT_SIZE)))
        slot.claim()
        return slot

    def copy(self) -> bytes:
        """Its bytes."""
        return self._memory[self._at : self._at + layout.SLOT_SIZE].tobytes()

    def claim(self) -> None:
        """Put this process's pid and start time into a slot that was reserved for it; the rest stays."""
        # the pid last: who reads a pid finds its start time
        layout.write(self._memory, self._at + layout.STARTED_AT, layout.WORD, start_time() or 0)
        layout.write(self._memory, self._at + layout.PID_AT, layout.WORD, os.getpid())
        self.set_state(State.STARTING)
        own(self)

    def leave(self) -> None:
        """In a fork of the process that claimed it: all that is written from now on goes to a copy."""
        try:
            copy = self.copy()
        except ValueError:  # the scoreboard was closed
            copy = bytes(layout.SLOT_SIZE)
        self._lie(memoryview(bytearray(copy)), 0)

    @property
    def state(self) -> State:
        """What its worker does."""
        return layout.read_state(self._memory, self._at)

    def set_state(self, state: State) -> None:
        """Tell the pool at once: others wait for it."""
        layout.write_state(self._memory, self._at, state)

    @property
    def age(self) -> float:
        """Seconds since it was reserved, right before its worker's fork."""
        return time.time() - float(layout.OWNER.unpack_from(self._memory, self._at + layout.OWNER_AT)[3])

    @property
    def order(self) -> Order:
        """What the supervisor has ordered this worker to do."""
        return order_of(layout.ORDER.unpack_from(self._memory, self._at + layout.ORDER_AT)[0])

    def need(self, used: int | None, growth: Growth) -> None:
        """Say what this worker holds, as its soft limit counts it, and how fast it grows."""
        paces = (min(int(pace), layout.LARGEST) for pace in growth)
        layout.write(self._memory, self._at + layout.NEED_AT, layout.NEED, stored(used), *paces)

    def take_up(self, ticket: int, held: int) -> None:
        """This worker is inside the work with this ticket from now on, and held so many bytes before."""
        self._memory[self._hand] = _pack_hand(ticket, held)

    def put_down(self) -> None:
        """It is out of it."""
        self._memory[self._hand] = _EMPTY_HAND

    @property
    def told_of_limit(self) -> tuple[int, int, int]:
        """(ticket, used, limit): the work that the supervisor has found over its soft limit last, and the bytes; zeros once heeded."""
        ticket, used, limit = layout.TOLD.unpack_from(self._memory, self._at + layout.TOLD_AT)
        return ticket, used, limit

    def heed_limit(self, ticket: int) -> tuple[int, int] | None:
        """(used, limit) in bytes if the supervisor has found this work over its soft limit and nobody has heeded it: now it is heeded."""
        told, used, limit = self.told_of_limit
        if not ticket or told != ticket:
            return None
        # the supervisor writes no other ticket while this work is in hand
        layout.write(self._memory, self._at + layout.TOLD_AT, layout.TOLD, 0, 0, 0)
        return used, limit

    def publish(self, figures: Figures, counters: Counters) -> None:
        """Write the figures and the counters; readers that meet it half done read again."""
        at, memory = self._at, self._memory
        packed = counters.pack()
        self._sequence += 1
        layout.write(memory, at + layout.SLOT_SEQUENCE_AT, layout.SEQUENCE, self._sequence)
        layout.write(memory, at + layout.MORE_AT, layout.MORE, stored(figures.anon), stored(figures.private))
        layout.write(memory, at + layout.FIGURES_AT, layout.FIGURES, *figures.stored(), time.time())
        memory[at + layout.COUNTERS_AT : at + layout.COUNTERS_AT + len(packed)] = packed
        self._sequence += 1
        layout.write(memory, at + layout.SLOT_SEQUENCE_AT, layout.SEQUENCE, self._sequence)

    def cells(self) -> tuple[memoryview, Callable[..., None], list[int]]:
        """For who notes what is in flight, at once, since a SIGKILL must find it there: memory, write, offsets of the cells.

        ``write(offset, length, began, rss, name, 1)``, and ``memory[offset + IN_USE] = 0`` when it is in flight no more.
        """
        first = self._at + layout.CELLS_AT
        offsets = range(first, first + layout.CELLS * layout.CELL_SIZE, layout.CELL_SIZE)
        return self._memory, partial(layout.CELL.pack_into, self._memory), list(reversed(offsets))


def order_of(word: int) -> Order:
    """An order as it stands in a slot; what is none of them is none."""
    return Order(word) if word in (Order.GO, Order.PERMIT) else Order.NONE


def comm_of(supervisor: int, slot: Slot) -> str:
    """A worker's name, as the kernel's OOM report shows it: ``oomsafe-w3-a1b2``. At most 15 bytes, unlike any other's.

    The report names pids of the initial PID namespace, which a container can't match; the name it can.
    """
    mark = (binascii.crc32(b"%d" % supervisor) + slot.generation) & 0xFFFF
    return f"oomsafe-w{slot.number}-{mark:04x}"[:COMM_LENGTH]
