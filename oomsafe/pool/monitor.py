"""In the supervisor: one look at the pool, one step of the schedule (policy/surge.py). Nothing here waits."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Protocol

from oomsafe.policy.limits import Capacity, resolve_limits, turns
from oomsafe.policy.settings import Policy
from oomsafe.policy.surge import Do, Ledger, Room, Seen, Stage, Step, failed, plan, recovered, spawned
from oomsafe.policy.units import format_size
from oomsafe.pool import layout
from oomsafe.pool.log import log
from oomsafe.pool.scoreboard import Entry, Scoreboard
from oomsafe.pool.usage import Usage

_STAGES = {
    layout.STARTING: Stage.STARTING,
    layout.SERVING: Stage.SERVING,
    layout.WAITING: Stage.WAITING,
    layout.DRAINING: Stage.DRAINING,
    layout.LEAVING: Stage.LEAVING,
}


class Fleet(Protocol):
    """What a server does for its Monitor."""

    def spawn(self) -> int | None:
        """Bring up one more worker than wanted; its generation, or None when that can't be done."""

    def shrink(self) -> None:
        """Want one less again: the worker that is gone is not to be replaced."""

    def may_surge(self) -> bool:
        """Whether the number of workers may be touched now: not while the server itself replaces them all."""


class Monitor:
    """Brings replacements first. Made by the supervisor, and used by it alone."""

    def __init__(self, board: Scoreboard, fleet: Fleet) -> None:
        self.ledger = Ledger()
        self._board = board
        self._fleet = fleet
        self._usage = Usage()
        self._said = ""

    def forget(self) -> None:
        """The server has replaced its workers itself: nothing is under way any more."""
        self.ledger = Ledger()

    def boot_failed(self, generation: int, now: float) -> None:
        """A worker has died before it served. A replacement whose worker still serves is found missing at the next tick."""
        if generation != self.ledger.replacement or self.ledger.victim is not None:
            self.ledger = failed(self.ledger, generation, now)

    def tick(self, policy: Policy, measure: Callable[[], Capacity], now: float) -> None:
        """Look, and do what is due. The kernel is asked only when somebody waits: a supervisor may look ten times a second."""
        surges = policy.surge and not policy.dry_run and self._fleet.may_surge()
        if surges or self.ledger != Ledger():
            entries = self._board.roll()
            workers = [_seen(entry) for entry in entries]
            self.ledger = recovered(self.ledger, workers)
            asked = any(worker.stage in (Stage.WAITING, Stage.DRAINING) for worker in workers)
            if self.ledger.replacement is not None or (surges and asked):
                capacity = measure()
                least = capacity.workers - turns(policy, capacity.workers)
                room = Room(self._holds_one_more(policy, capacity, entries, now), least, capacity.workers)
                asker = self.ledger.asker
                self.ledger, steps = plan(self.ledger, workers, room, now)
                for step in steps:
                    self._do(step, entries, now)
                    if step.do is Do.FAILED:
                        self._say_failed(asker, entries, now)
        self._board.schedule = (now if surges else 0.0, self.ledger.failures)

    def _do(self, step: Step, entries: Sequence[Entry], now: float) -> None:
        if step.do is Do.SPAWN:
            replacement = self._fleet.spawn()
            if replacement is None:
                self._grant(step.generation, entries)
            else:
                self.ledger = spawned(self.ledger, replacement, step.generation)
        elif step.do is Do.GRANT:
            self._grant(step.generation, entries)
        else:
            self._fleet.shrink()

    def _say_failed(self, asker: int | None, entries: Sequence[Entry], now: float) -> None:
        of = next((entry for entry in entries if entry.generation == asker), None)
        log.error(
            "a replacement died before it served: the worker over its limit %s; next try in %.0f s "
            "(it was for slot %s; its own error is above: mend what keeps the app from booting)",
            "drains" if of and of.state == layout.DRAINING else "stays", self.ledger.not_before - now, of.number if of else "unknown",
        )  # fmt: skip

    def _grant(self, generation: int, entries: Sequence[Entry]) -> None:
        for entry in entries:
            if entry.generation == generation:
                self._board.tell_to_drain(entry.number, generation)

    def _holds_one_more(self, policy: Policy, capacity: Capacity, entries: Sequence[Entry], now: float) -> bool:
        """Whether the budget holds one more worker, of the size that they have right after boot. Said when it does not."""
        fresh = [entry.baseline for entry in entries if entry.baseline]
        size = int(statistics.median(fresh)) if fresh else 0
        budget = resolve_limits(policy, capacity)[0].budget
        # up to where there is room, it need not be told to the byte
        used = self._usage.of(policy, capacity, None if budget is None else max(0, budget - size), self._board.read, now)
        if not fresh or budget is None or used is None:
            why = "what the pool or a fresh worker has is not known"
        else:
            free = max(0, budget - used)
            why = "" if free >= size else f"a fresh worker has {format_size(size)}, {format_size(free)} of the budget are free"
        if why and not self._said:
            log.warning("no room for a replacement beside the worker that it replaces (%s): workers drain first", why)
        self._said = why
        return not why


def _seen(entry: Entry) -> Seen:
    return Seen(entry.generation, _STAGES.get(entry.state, Stage.STARTING), (entry.rss or 0) - (entry.soft or 0))
