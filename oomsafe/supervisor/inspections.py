"""In the supervisor: has one worker tell what its memory is, while it serves, by an operator's order."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from oomsafe.log import log
from oomsafe.policy.inspection import Inspection, Phase
from oomsafe.policy.units import MIB
from oomsafe.scoreboard.board import Scoreboard
from oomsafe.scoreboard.mailbox import Answer, OperatorOrder
from oomsafe.scoreboard.roll import Entry
from oomsafe.supervisor.replacements import Reading

#: Seconds within which a worker must have taken its order, and within which it must have told what came of it.
TAKEN_WITHIN, OVER_WITHIN = 5.0, 15.0

#: The least that the budget must have left, in bytes. How much a worker takes, it knows itself.
ROOM = 16 * MIB


class Inspections:
    """The inspections of one pool, never two at a time. `reading()` says what the pool holds."""

    def __init__(self, board: Scoreboard, reading: Callable[[], Reading]) -> None:
        self._board = board
        self._reading = reading
        self._ordered: Entry | None = None
        """The worker that was ordered last; None: its inspection is over."""
        self._pid = 0
        self._at = 0.0
        """When it was ordered, on the monotonic clock."""
        self._before = 0.0
        """When what the scoreboard says of an inspection was written, before that order."""

    def heed(self, order: OperatorOrder, now: float | None = None) -> Answer:
        """An operator's order; `now` on the monotonic clock."""
        now = time.monotonic() if now is None else now
        entries = self._board.roll()
        self._follow(entries, now)
        if self._ordered is not None:
            return Answer.BUSY
        if not order.pid or self._board.identity(order.slot) != (order.pid, order.started, order.generation):
            return Answer.UNKNOWN
        worker = next((entry for entry in entries if entry.generation == order.generation), None)
        if worker is None:
            return Answer.UNKNOWN
        if not worker.state.serves:
            return Answer.LEAVES
        _, budget, held = self._reading()
        if budget is not None and held is not None and budget - held < ROOM:
            return Answer.SHORT
        last = self._board.header.inspected
        self._ordered, self._pid, self._at, self._before = worker, order.pid, now, 0.0 if last is None else last.at
        self._board.order_inspection(worker.number, worker.generation)
        return Answer.ORDERED

    def tick(self, now: float | None = None) -> None:
        """See that an inspection ends, if only with its worker."""
        if self._ordered is not None:
            self._follow(self._board.roll(), time.monotonic() if now is None else now)

    def _follow(self, entries: Sequence[Entry], now: float) -> None:
        worker = self._ordered
        if worker is None:
            return
        last = self._board.header.inspected
        if last is not None and last.generation == worker.generation and last.at != self._before and last.phase.is_over:
            self._ordered = None
        elif not any(entry.generation == worker.generation for entry in entries):
            self._give_up(worker, Phase.FAILED, "it ended before it could tell what its memory was")
        elif self._board.is_ordered_to_be_inspected(worker.number, worker.generation):
            if now - self._at > TAKEN_WITHIN:
                self._board.order_inspection(worker.number, worker.generation, ordered=False)
                what = f"it has not taken the order within {TAKEN_WITHIN:.0f} s, which is withdrawn: it is busy in one call"
                self._give_up(worker, Phase.UNTAKEN, what)
        elif now - self._at > OVER_WITHIN:
            self._give_up(worker, Phase.FAILED, f"it has not told what its memory is within {OVER_WITHIN:.0f} s")

    def _give_up(self, worker: Entry, phase: Phase, why: str) -> None:
        self._ordered = None
        log.info("worker %d (slot %d) is not inspected: %s", self._pid, worker.number, why)
        self._board.header.note_inspection(
            Inspection(at=time.time(), pid=self._pid, slot=worker.number, generation=worker.generation, phase=phase, text=why)
        )
