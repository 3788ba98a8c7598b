"""In the supervisor: at each tick, reads the pool's state and carries out the schedule (policy/replace.py). Nothing here waits."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import reduce
from typing import NamedTuple, Protocol

from oomsafe.log import log
from oomsafe.policy.limits import Capacity, turns
from oomsafe.policy.readers import COUNT_CLEAN
from oomsafe.policy.recycle import Order, is_out, is_short, outruns
from oomsafe.policy.replace import Do, Ledger, Member, Room, Step, failed, gone, plan, recovered, spawned
from oomsafe.policy.settings import Policy
from oomsafe.policy.state import State
from oomsafe.policy.trend import LATELY, Growth
from oomsafe.policy.units import format_size
from oomsafe.scoreboard.board import Entry, Scoreboard

#: Why a worker leaves before its replacement serves, if the user has configured that. It is not logged.
NO_SURGE = "surge is off"

#: Seconds after which it is logged that no worker serves.
UNSERVED_FOR = 0.5

#: Seconds after which a permit to drain without a replacement lapses, if its worker is below its limit again and has not used it.
PERMITTED_FOR = 10.0

#: The assumed seconds of a boot, until one has been measured.
BOOT = 1.0


class Reading(NamedTuple):
    """What a pool may hold and what it holds, read once for all decisions of a tick. Bytes; None is a figure that is not known."""

    capacity: Capacity
    budget: int | None
    used: int | None
    """What the pool holds, as its budget counts it."""


class Fleet(Protocol):
    """What a server must do for Replacements."""

    def spawn(self) -> int | None:
        """Start one worker more than wanted. Returns its generation; None if that can't be done, and then nothing has changed."""

    def shrink(self) -> None:
        """Want one worker less again, because the one that is gone must not be replaced."""

    def may_surge(self) -> bool:
        """Whether the number of workers may be changed now. False while the server itself replaces them all."""


class Replacements:
    """Starts replacements before the workers that they replace leave. Created and used only by the supervisor."""

    def __init__(self, board: Scoreboard, fleet: Fleet) -> None:
        self.ledger = Ledger()
        self._board = board
        self._fleet = fleet
        self._said = ""
        self._boots: dict[int, float] = {}
        """When each booting worker was first found on the scoreboard, by generation."""
        self._boot = BOOT
        """Seconds that the last boot took."""
        self._unused: dict[int, float] = {}
        """Since when a worker has had a permit that it does not use, by generation: it is below its limit again."""
        self._has_served = self._said_unserved = False
        self._quiet: tuple[Ledger, tuple[int, ...]] | None = None
        """The ledger and the scoreboard's marks() with which nothing needed to be done at the last tick; None: something did."""
        self._paces: list[tuple[float, Growth]] = []

    def forget(self) -> None:
        """The server has replaced its workers itself, so no replacement is under way any more."""
        self.ledger = Ledger()
        self._has_served = False

    def gone(self, generation: int, served: bool, now: float) -> None:
        """A worker is gone; `served`: it had served. Call this at once, because until shrink() the server would replace it."""
        before = self.ledger
        self.ledger, steps = gone(before, generation, served, now)
        for _ in steps:
            self._fleet.shrink()
        if not served and generation in before.pending:
            victim = next(handover.victim for handover in before.handovers if handover.replacement == generation)
            of = next((entry for entry in self._board.roll() if entry.generation == victim), None)
            log.error(
                "a replacement died before it served: the worker over its limit %s; next try in %.0f s "
                "(it was for slot %s; its own error is above: mend what keeps the app from booting)",
                "drains" if of and of.state is State.DRAINING else "stays", self.ledger.not_before - now, of.number if of else "unknown",
            )  # fmt: skip

    def not_started(self, generation: int, error: Exception, now: float) -> None:
        """A worker, a replacement or another, could not be started at all."""
        first, self.ledger = not self.ledger.failures, failed(self.ledger, generation, now)
        if first:
            log.error("a worker can't be started (%r): those that serve stay; next try in %.0f s", error, self.ledger.not_before - now)

    def tick(self, policy: Policy, read: Callable[[], Reading], now: float) -> None:
        """Read the pool's state, and do what is due. `read` is called only if a worker waits to be replaced, drains or is being replaced,
        because there may be ten ticks a second."""
        marks = self._board.marks()
        if self._quiet != (self.ledger, marks):
            self._decide(policy, read, now)
            quiet = self._board.all_serve(marks) and not self.ledger.handovers and not self._unused
            self._quiet = (self.ledger, marks) if quiet else None
        # in a dry run, each worker decides by itself and logs what it would do
        self._board.header.decided_at = 0.0 if policy.dry_run else now

    def _decide(self, policy: Policy, read: Callable[[], Reading], now: float) -> None:
        entries = self._board.roll()
        self._note_boots(entries, now)
        self._note_unserved(entries, now)
        self._withdraw(entries, now)
        if not policy.dry_run:
            workers = [_member(entry, policy) for entry in entries]
            self.ledger = recovered(self.ledger, workers)
            if self.ledger.handovers or any(worker.state in (State.WAITING, State.DRAINING) for worker in workers):
                room, why = self._room(policy, read(), entries, now)
                self.ledger, steps = plan(self.ledger, workers, room, now)
                for step in steps:
                    self._do(step, entries, policy, why)

    def _withdraw(self, entries: Sequence[Entry], now: float) -> None:
        """Take back unused permits: by the time that such a worker is over its limit or has aged, other workers may be away."""
        unused = [entry for entry in entries if entry.state is State.SERVING and entry.order is Order.PERMIT]
        self._unused = {entry.generation: self._unused.get(entry.generation, now) for entry in unused}
        for entry in unused:
            if now - self._unused[entry.generation] >= PERMITTED_FOR:
                self._board.give_order(entry.number, entry.generation, Order.NONE)

    def _do(self, step: Step, entries: Sequence[Entry], policy: Policy, why: str) -> None:
        if step.do is Do.SPAWN:
            replacement = self._fleet.spawn()
            if replacement is not None:
                self.ledger = spawned(self.ledger, replacement, step.generation)
        elif step.do is Do.SHRINK:
            self._fleet.shrink()
        else:
            self._order(step, entries, policy, why)

    def _order(self, step: Step, entries: Sequence[Entry], policy: Policy, why: str) -> None:
        for entry in entries:
            if entry.generation == step.generation:
                self._board.give_order(entry.number, entry.generation, Order.GO if step.do is Do.GO else Order.PERMIT)
                if step.do is Do.PERMIT and why != NO_SURGE:
                    others = sum(_member(other, policy).serves for other in entries if other is not entry)
                    log.warning(
                        "the worker in slot %d (%s) may go before its replacement is there: %s; %s",
                        entry.number, format_size(entry.used), why or "it is over its hard limit",
                        f"{others} others serve" if others > 1 else "1 other serves" if others else "no other serves meanwhile",
                    )  # fmt: skip

    def _room(self, policy: Policy, reading: Reading, entries: Sequence[Entry], now: float) -> tuple[Room, str]:
        """What the pool may do now, and why it can't start a replacement first, with figures; empty if it can."""
        capacity, budget, used = reading
        at_once = turns(policy, capacity.workers)
        # with surge off, the user accepts that in a very small pool no worker serves for a moment
        least = max(1 if policy.surge else 0, capacity.workers - at_once)
        size = fresh_of(entries)
        serving = [entry for entry in entries if entry.state.serves]
        growth = sum((entry.growth for entry in serving), Growth())
        lately = self._lately(growth, now)
        # what a leaving worker holds will be free in a moment
        away = [entry for entry in entries if entry.state.leaves]
        leaving = sum(max(0, (entry.used or 0) - (entry.baseline or 0)) for entry in away)
        short = is_short(None if used is None else used - leaving, budget, growth, self._boot)
        held = capacity.undroppable
        share = None if budget is None else budget // max(1, capacity.workers)
        fast = short and any(outruns(entry.soft or share, entry.growth.burst) for entry in entries)
        out = fast or (short and not away and is_out(held, capacity.limit, growth))
        # if no worker's memory can be read, workers only ask because of their age, and no figure speaks against one more worker
        known = any(entry.used is not None for entry in entries)
        if known and (size is None or budget is None or used is None):
            why = "what the pool or a fresh worker has is not known"
        elif short:
            why = (
                f"of a budget of {format_size(budget)}, {format_size(used)} are used, and {format_size(int(max(growth)))} more each second"
            )
        elif used is not None and size is not None and is_short(used + size, budget, lately if serving else Growth(), self._boot):
            # here the leaving workers count, because they may take long, and the new worker gets the work that made the old one grow.
            # The pool's growth only counts while a worker serves: if none does, a new one must not be delayed for it
            free, pace = format_size(max(0, (budget or 0) - used)), format_size(int(max(lately)))
            why = f"a fresh worker has {format_size(size)}, {free} of the budget are free, and {pace} more are used each second"
        elif not self._fleet.may_surge() or not self._board.has_room:
            why = "the server replaces its workers itself, or has as many as the scoreboard can hold"
        else:
            why = "" if policy.surge else NO_SURGE
        if why and not self._said and policy.surge:
            log.warning("no room for a replacement beside the worker that it replaces (%s): workers drain first", why)
        self._said = why
        room = Room(may_surge=not why, short=short, out=out, least=least, wanted=capacity.workers, boots=at_once)
        return room, why

    def _lately(self, growth: Growth, now: float) -> Growth:
        """The pool's fastest growth within the last LATELY seconds: a draining worker grows no more, but its replacement will."""
        self._paces = [(at, pace) for at, pace in self._paces if now - at < LATELY] + [(now, growth)]
        return reduce(Growth.at_least, (pace for _, pace in self._paces))

    def _note_boots(self, entries: Sequence[Entry], now: float) -> None:
        booting = {entry.generation for entry in entries if entry.state is State.STARTING}
        for entry in entries:
            began = self._boots.get(entry.generation)
            if began is not None and entry.state.serves:
                self._boot = now - began
        self._boots = {generation: self._boots.get(generation, now) for generation in booting}

    def _note_unserved(self, entries: Sequence[Entry], now: float) -> None:
        """Count the time in which no worker serves, once one has served. If it lasts, log it, and log how long it was when it is over."""
        serving = sum(entry.state.serves for entry in entries)
        since, before = self._board.header.unserved
        if serving:
            self._has_served = True
            if since:
                self._board.header.unserved = (0.0, before + now - since)
            if self._said_unserved:
                self._said_unserved = False
                log.warning("a worker serves again: for %.1f s none did", now - since)
        elif self._has_served and not since and self._board.header.workers:
            self._board.header.unserved = (now, before)
        elif since and now - since >= UNSERVED_FOR and not self._said_unserved:
            self._said_unserved = True
            starting = sum(entry.state is State.STARTING for entry in entries)
            log.warning("no worker serves, for %.1f s now: %d start, %d drain or leave", now - since, starting, len(entries) - starting)


def fresh_of(entries: Sequence[Entry]) -> int | None:
    """What a typical worker holds right after boot, in bytes: the median of these. None: not known."""
    fresh = [entry.baseline for entry in entries if entry.baseline]
    return int(statistics.median(fresh)) if fresh else None


def _member(entry: Entry, policy: Policy) -> Member:
    excess = None if entry.used is None or entry.soft is None else entry.used - entry.soft
    held = entry.rss if policy.metric in COUNT_CLEAN else entry.anon
    urgent = held is not None and entry.hard is not None and held > entry.hard
    order = Order.GO if entry.order is Order.BUDGET else entry.order
    return Member(entry.generation, entry.state, excess, order, urgent, entry.aged)
