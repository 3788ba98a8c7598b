"""Who is replaced, and who may go: the schedule of a pool that a supervisor keeps. One small record, pure.

A worker over its limit asks, and serves on. While the budget has room, its replacement comes first: the supervisor
brings up one more worker than it wants to have, and when that one serves, the worst of those who ask drains. Where the
budget does not hold one more, a worker drains first, as long as enough others serve. Over the budget the worst drains at
once, one at a time, and the last that serves stays until another does; unless the kernel is about to kill.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import NamedTuple

from oomsafe.policy.recycle import Order
from oomsafe.policy.state import State

#: Seconds before the next try after the first replacement that died at boot; doubled each time, up to the last.
BACKOFF, LONGEST_BACKOFF = 1.0, 60.0


class Seen(NamedTuple):
    """One worker at this moment."""

    generation: int
    state: State
    excess: int | None = 0
    """Bytes that it has above its soft limit, by that limit's metric; negative below it. None: not known."""
    order: Order = Order.NONE
    """What it has been ordered, and has not done yet."""
    urgent: bool = False
    """It is above its hard limit."""

    @property
    def serves(self) -> bool:
        """Whether new work may count on it."""
        return self.state.serves and self.order is Order.NONE


class Room(NamedTuple):
    """What the pool may do now."""

    may_surge: bool = True
    """Whether the budget holds one more worker."""
    short: bool = False
    """Whether the pool is over its budget, or will be before a replacement could help."""
    out: bool = False
    """Whether that can't wait for a worker that is on its way: the kernel's limit is near, or they grow too fast."""
    least: int = 0
    """How many workers must serve whatever happens, unless memory is short."""
    wanted: int = 0
    """How many workers are wanted: while fewer stay, who drains is replaced. One who drains for a reload or SIGTTOU is not."""
    boots: int = 1
    """How many workers may boot at once."""


class Handover(NamedTuple):
    """One worker takes another's place; until that is gone, there is one more than wanted."""

    replacement: int
    victim: int
    """The worker that it was brought up for; once that is ordered, the one that goes."""
    ordered: bool = False
    """Whether the victim is on its way."""


@dataclass(frozen=True)
class Ledger:
    """What is under way. Workers are named by their generation; times in seconds, on the clock of `now`."""

    handovers: tuple[Handover, ...] = ()
    failures: int = 0
    """How many workers in a row have died at boot."""
    failed: int = 0
    """The last of them."""
    not_before: float = 0.0
    """When the next may be tried."""

    @property
    def extra(self) -> int:
        """How many more workers there are than wanted."""
        return len(self.handovers)

    @property
    def pending(self) -> frozenset[int]:
        """The replacements whose victims are not on their way yet."""
        return frozenset(handover.replacement for handover in self.handovers if not handover.ordered)

    @property
    def victims(self) -> frozenset[int]:
        """The workers that are on their way, and whose replacements are there."""
        return frozenset(handover.victim for handover in self.handovers if handover.ordered)


class Do(Enum):
    """What the supervisor does."""

    SPAWN = "spawn"
    """Bring up one more worker than wanted, then note it by spawned() or failed()."""
    GO = "go"
    """Order this worker to drain now: its replacement serves."""
    PERMIT = "permit"
    """Order this worker to drain as soon as it is over its limit: nobody takes its place yet."""
    SHRINK = "shrink"
    """One less again: the pool has as many as wanted."""


class Step(NamedTuple):
    """One thing to do."""

    do: Do
    generation: int = 0


def plan(ledger: Ledger, workers: Sequence[Seen], room: Room, now: float) -> tuple[Ledger, list[Step]]:
    """What to do now that these workers are seen. Steps are done in their order."""
    present = {worker.generation for worker in workers}
    steps: list[Step] = []
    for handover in ledger.handovers:
        for generation in (handover.victim, handover.replacement):
            if generation not in present:  # gone() has not been told: its slot was given to another
                ledger, more = gone(ledger, generation, True, now)
                steps += more
    by_generation = {worker.generation: worker for worker in workers}
    for handover in ledger.handovers:
        if not handover.ordered:
            ledger, more = _hand_over(ledger, handover.replacement, by_generation, room)
            steps += more
            by_generation |= {s.generation: by_generation[s.generation]._replace(order=Order.GO) for s in more if s.do is Do.GO}
    seen = list(by_generation.values())
    steps += _permit(ledger, seen, room, now) or _begin(ledger, seen, room, now)
    return ledger, steps


def spawned(ledger: Ledger, replacement: int, victim: int) -> Ledger:
    """The worker `replacement` has been brought up, to take the place of `victim`."""
    return replace(ledger, handovers=(*ledger.handovers, Handover(replacement, victim)))


def failed(ledger: Ledger, generation: int, now: float) -> Ledger:
    """A worker has died before it served, or could not be started at all: the next is not tried at once."""
    pause = min(LONGEST_BACKOFF, BACKOFF * 2.0 ** min(ledger.failures, 30))
    return replace(ledger, failures=ledger.failures + 1, failed=max(generation, ledger.failed), not_before=now + pause)


def gone(ledger: Ledger, generation: int, served: bool, now: float) -> tuple[Ledger, list[Step]]:
    """A worker is gone; `served` is whether it had ever come to serve. To be called as soon as that is known.

    At once, for until the pool is told to be one less, the server brings up another in its place.
    """
    if not served:
        ledger = failed(ledger, generation, now)
    kept = tuple(
        handover
        for handover in ledger.handovers
        # once the victim is on its way, the replacement is a worker like any other: the server itself replaces it
        if handover.victim != generation and (handover.replacement != generation or handover.ordered)
    )
    return replace(ledger, handovers=kept), [Step(Do.SHRINK)] * (len(ledger.handovers) - len(kept))


def recovered(ledger: Ledger, workers: Sequence[Seen]) -> Ledger:
    """Forget the failures once a later worker has come to serve."""
    if ledger.failures and any(w.generation > ledger.failed and w.state.serves for w in workers):
        return replace(ledger, failures=0, not_before=0.0)
    return ledger


def _hand_over(ledger: Ledger, replacement: int, workers: dict[int, Seen], room: Room) -> tuple[Ledger, list[Step]]:
    """One whose replacement serves may go: the worst of those who ask."""
    (handover,) = (handover for handover in ledger.handovers if handover.replacement == replacement)
    asker = workers[handover.victim]
    if asker.state.leaves:
        return _with(ledger, handover._replace(ordered=True)), []
    serving = sum(worker.serves for worker in workers.values())
    if not workers[replacement].serves or serving <= room.least:
        return ledger, []  # it boots, or leaves already; or others have died meanwhile
    fresh = ledger.pending
    asking = [w for w in workers.values() if w.state is State.WAITING and w.order is Order.NONE and w.generation not in fresh]
    victim = (_worst(asking) or asker).generation
    swapped = [
        # the one that another was brought up for has gone instead: that other is this one's now
        other._replace(victim=handover.victim) if other.victim == victim and not other.ordered else other
        for other in ledger.handovers
        if other is not handover
    ]
    ledger = replace(ledger, handovers=(*swapped, handover._replace(victim=victim, ordered=True)))
    return ledger, [Step(Do.GO, victim)]


def _with(ledger: Ledger, handover: Handover) -> Ledger:
    handovers = tuple(handover if each.replacement == handover.replacement else each for each in ledger.handovers)
    return replace(ledger, handovers=handovers)


def _permit(ledger: Ledger, workers: Sequence[Seen], room: Room, now: float) -> list[Step]:
    """Who may go before a replacement is there. Never two at once: one who may go and has not gone yet comes first."""
    if any(worker.state is State.WAITING and worker.order is Order.PERMIT for worker in workers):
        return []
    asking = [worker for worker in workers if worker.state is State.WAITING and worker.order is Order.NONE]
    serving = sum(worker.serves for worker in workers)
    nobody_comes = now < ledger.not_before
    if room.short:
        leave = any(worker.state.leaves or worker.order is Order.GO for worker in workers)
        another_comes = any(worker.state is State.STARTING for worker in workers)
        enough = room.out or (not leave and (serving > 1 or not another_comes))
        # while no worker can be had, the last one is worth more than its memory
        enough = enough and (serving > 1 or not nobody_comes)
    else:
        asking = [worker for worker in asking if worker.urgent or (not room.may_surge and (worker.excess or 0) > 0)]
        enough = serving > room.least and not nobody_comes
    worst = _worst(asking)
    return [Step(Do.PERMIT, worst.generation)] if worst is not None and enough else []


def _begin(ledger: Ledger, workers: Sequence[Seen], room: Room, now: float) -> list[Step]:
    """Whose replacement is brought up."""
    booting = sum(worker.state is State.STARTING for worker in workers)
    if room.short or not room.may_surge or now < ledger.not_before or booting >= room.boots or ledger.extra >= max(1, room.wanted):
        return []
    replaced = {handover.victim for handover in ledger.handovers}
    alone = [worker for worker in workers if worker.generation not in replaced]
    stay = sum(worker.state in (State.STARTING, State.SERVING, State.WAITING) for worker in workers)
    # who drains first: those who ask serve meanwhile
    drains = _worst([worker for worker in alone if worker.state is State.DRAINING]) if stay < room.wanted else None
    worst = drains or _worst([worker for worker in alone if worker.state is State.WAITING])
    return [] if worst is None else [Step(Do.SPAWN, worst.generation)]


def _worst(of: list[Seen]) -> Seen | None:
    """The one furthest above its limit; of those that are about as far, the oldest, so that nobody waits for ever."""

    def badness(worker: Seen) -> tuple[bool, int, int]:
        # by powers of two; what is not known is no more than what is below its limit
        return worker.urgent, max(0, worker.excess or 0).bit_length(), -worker.generation

    return max(of, key=badness, default=None)
