"""In the supervisor: has one worker of the pool trace its allocations, by an operator's order, or when its recycled workers show a leak."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec

from oomsafe.log import log
from oomsafe.policy.probe import MOST_SECONDS, MOST_WORK, OWN_ROOM, ROOM, SECONDS, WORK
from oomsafe.policy.probed import Stage
from oomsafe.policy.settings import Policy
from oomsafe.policy.state import State
from oomsafe.scoreboard.board import Scoreboard
from oomsafe.scoreboard.mailbox import Answer, OperatorOrder
from oomsafe.scoreboard.roll import Entry
from oomsafe.supervisor.replacements import Reading

#: How often it is tried without an order, in one load of the app: a worker that leaks fast may be recycled before it has begun.
TRIES = 5

#: Seconds until a worker that is ordered to trace has begun.
BEGINS_WITHIN = 2.0

#: Workers that must serve for a probe that nobody has ordered: one alone would slow down everything.
LEAST_WORKERS = 2


class Probes:
    """The probes of one pool, never two at a time. `reading()` says what the pool holds."""

    def __init__(self, board: Scoreboard, reading: Callable[[], Reading]) -> None:
        self._board = board
        self._reading = reading
        self._generation: int | None = None
        """The worker that was ordered last; None: it is gone, or there is none."""
        self._pid = 0
        """Its pid; 0: not known."""
        self._before = 0.0
        """When what the scoreboard says of a probe was written, before that order."""
        self._told = 0
        """How many retirements had been told when they were last judged."""
        self._tries = 0
        """How often a worker was probed without an order, in this load of the app."""
        self._by_itself: int | None = None
        """The worker that was ordered last by nobody."""

    def reloaded(self) -> None:
        """The app was loaded anew: it may leak elsewhere."""
        self._tries, self._by_itself = 0, None

    def heed(self, order: OperatorOrder, policy: Policy) -> Answer:
        """An operator's order."""
        if not 0 < order.work <= MOST_WORK or not math.isfinite(order.seconds) or not 0 < order.seconds <= MOST_SECONDS:
            return Answer.STRANGE
        if policy.dry_run:
            return Answer.DRY_RUN
        entries = self._board.roll()
        if self._is_busy(entries):
            return Answer.BUSY
        if order.pid:
            if self._board.identity(order.slot) != (order.pid, order.started, order.generation):
                return Answer.UNKNOWN
            entries = [entry for entry in entries if entry.generation == order.generation]
            if not entries:
                return Answer.UNKNOWN
            if entries[0].state is not State.SERVING:
                return Answer.LEAVES
        worker = None if self._room() < ROOM else self._best(entries)
        if worker is None:
            return Answer.SHORT
        self._order(worker, order.work, order.seconds)
        return Answer.ORDERED

    def tick(self, policy: Policy) -> None:
        """See that a probe ends with its worker, and begin one by itself if the pool's recycled workers show a leak."""
        told = self._board.header.retirements
        if told == self._told and self._generation is None:
            return
        entries = self._board.roll()
        if self._is_busy(entries) or told == self._told:
            return
        self._told = told
        if self._tries >= TRIES or self._knows() or not _by_itself(policy) or sum(entry.state.serves for entry in entries) < LEAST_WORKERS:
            return
        from oomsafe.policy.retention import Kind, judge  # imported here: a pool that has recycled nobody does without

        view = self._board.read()
        verdict = judge(view.retired, view.unit or "requests")
        if verdict.kind is not Kind.LEAK:
            return
        if policy.dry_run:
            self._tries = TRIES
            log.info("a worker would trace its allocations, because %s (dry run)", verdict.why)
            return
        worker = None if self._room() < ROOM else self._best(entries)
        if worker is not None:  # else after the next retirement
            self._tries += 1
            self._by_itself = worker.generation
            log.info("%s: one worker is to trace where", verdict.why)
            self._order(worker, WORK, SECONDS)

    def _knows(self) -> bool:
        """Whether a worker that nobody has ordered to be probed has told what it found."""
        probed = self._board.header.probed
        return probed is not None and probed.generation == self._by_itself and probed.stage in (Stage.DONE, Stage.NOTHING)

    def _order(self, worker: Entry, work: int, seconds: float) -> None:
        probed = self._board.header.probed
        identity = self._board.identity(worker.number)
        self._pid = 0 if identity is None else identity[0]
        self._generation, self._before = worker.generation, 0.0 if probed is None else probed.at
        self._board.order_probe(worker.number, worker.generation, work, seconds)

    def _is_busy(self, entries: Sequence[Entry]) -> bool:
        """Whether a worker is being probed. One that has died before it could tell its findings is told of."""
        if self._generation is None:
            return False
        probed = self._board.header.probed
        mine = probed is not None and probed.generation == self._generation and probed.at != self._before
        is_over = mine and probed is not None and probed.stage.is_over
        if any(entry.generation == self._generation for entry in entries):
            # it is over, too, if nothing came of it: then its worker stays
            return not is_over
        if not is_over:
            self._say_it_is_gone(self._generation)
        self._generation = None
        return False

    def _say_it_is_gone(self, generation: int) -> None:
        what = "its worker ended before it could tell what it had found"
        log.warning("the probe of worker %d failed: %s", self._pid, what)
        self._board.header.note_probe(self._pid, generation, Stage.FAILED, what)

    def _best(self, entries: Sequence[Entry]) -> Entry | None:
        """Of the serving workers that have room for a tracer, and do at least half as much as the busiest one, the one with most room.

        With clients that keep their connections, one worker may get all requests, and the one with most room none. None: none has room.
        """
        serving = [entry for entry in entries if entry.state is State.SERVING]
        room = {entry.generation: room for entry in serving if (room := _room_of(entry)) >= OWN_ROOM}
        now = time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK")
        view = self._board.read()
        pace = {each.generation: each.counters.work / max(1.0, now - each.started) for each in view.workers if each.generation in room}
        busy = max(pace.values(), default=0.0) / 2
        fits = [entry for entry in entries if entry.generation in room and pace.get(entry.generation, 0.0) >= busy]
        return max(fits, key=lambda entry: room[entry.generation], default=None)

    def _room(self) -> int:
        """What the budget has left, in bytes."""
        _, budget, held = self._reading()
        return ROOM if budget is None or held is None else budget - held


def _room_of(entry: Entry) -> float:
    """What it will have up to its soft limit when it begins to trace, in bytes."""
    return math.inf if entry.soft is None or entry.used is None else entry.soft - entry.used - BEGINS_WITHIN * entry.growth.steady


def _by_itself(policy: Policy) -> bool:
    return find_spec("memray") is not None if policy.probe == "auto" else bool(policy.probe)
