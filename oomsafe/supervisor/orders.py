"""In the supervisor: takes an operator's order from the scoreboard, and passes it on to the worker that it is for.

A worker that is to be recycled then asks to be replaced, as it does when it has served for its lifetime, and leaves by the same schedule.
"""

from __future__ import annotations

import time

from oomsafe.log import log
from oomsafe.policy.settings import Policy
from oomsafe.scoreboard.board import Scoreboard
from oomsafe.scoreboard.mailbox import GOOD_FOR, Answer, Mailbox, OperatorOrder, What
from oomsafe.supervisor.inspections import Inspections
from oomsafe.supervisor.probes import Probes


class Orders:
    """The operator's orders to one pool. Created and used only by the supervisor."""

    def __init__(self, board: Scoreboard, probes: Probes, inspections: Inspections) -> None:
        self._board = board
        self._probes = probes
        self._inspections = inspections
        self._mailbox = Mailbox(board.header.memory)
        self._last = 0
        """The sequence of the last order that was answered."""
        self._passed_on: set[int] = set()
        """The generations of living workers that have been ordered; in a dry run, for which that was logged."""

    def tick(self, policy: Policy, now: float | None = None) -> None:
        """Answer the order that has come since the last tick, if any; `now` in seconds since 1970."""
        order = self._mailbox.order()
        if order is None or order.sequence == self._last:
            return
        self._last = order.sequence
        self._mailbox.answer(order, self._heed(order, policy, time.time() if now is None else now))

    def _heed(self, order: OperatorOrder, policy: Policy, now: float) -> Answer:
        if not abs(now - order.at) <= GOOD_FOR:  # nor if it is not a number
            return Answer.STALE
        if order.what == What.PROBE:
            return self._probes.heed(order, policy)
        if order.what == What.INSPECT:  # in a dry run, too: it changes nothing
            return self._inspections.heed(order)
        if order.what != What.RECYCLE:
            return Answer.STRANGE
        # some servers do not say which process they have started for a slot: then what counts is who of its children has claimed it
        if not order.pid or self._board.identity(order.slot) != (order.pid, order.started, order.generation):
            return Answer.UNKNOWN
        entries = self._board.roll()
        self._passed_on &= {entry.generation for entry in entries}
        worker = next((entry for entry in entries if entry.generation == order.generation), None)
        if worker is None:
            return Answer.UNKNOWN
        if worker.state.leaves or (order.generation in self._passed_on and not policy.dry_run):
            return Answer.LEAVES
        if order.generation not in self._passed_on:  # one line for each worker, however often it is ordered
            self._passed_on.add(order.generation)
            log.info(
                "worker %d (slot %d) %s by an operator's order", order.pid, order.slot,
                "would be recycled (dry run)" if policy.dry_run else "is to be recycled",
            )  # fmt: skip
        if policy.dry_run:
            return Answer.DRY_RUN
        self._board.pass_on(order.slot, order.generation)
        return Answer.ORDERED
