"""Which workers are replaced, and which may leave: the schedule of a supervised pool, in one small record. Pure.

A worker over its limit asks to be replaced, and keeps serving. While the budget has room, the replacement comes first: the
supervisor spawns one extra worker, and once that serves, the worst of the workers that ask drains. If the budget does not
hold one more, a worker drains first, as long as enough others serve. Over the budget the worst drains at
once, one at a time, and the last worker that serves stays until another does, unless the kernel is about to kill.

A worker that has served for its lifetime asks as well. Workers over a limit come before it, and it never costs service: even if memory is
short, no more than `max_unavailable` are away for it, and the last worker that serves stays until another does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import NamedTuple

from oomsafe.policy.recycle import Order
from oomsafe.policy.state import State

#: Seconds before the next attempt after a replacement died at boot; doubled with each failure in a row, up to the second figure.
BACKOFF, LONGEST_BACKOFF = 1.0, 60.0


class Member(NamedTuple):
    """One worker now, as the scoreboard shows it."""

    generation: int
    state: State
    excess: int | None = 0
    """Bytes above its soft limit, in that limit's metric; negative below it. None: not known."""
    order: Order = Order.NONE
    """The order that it was given and has not carried out yet."""
    urgent: bool = False
    """It is above its hard limit."""
    aged: bool = False
    """It has served for its lifetime."""

    @property
    def serves(self) -> bool:
        """Whether the worker serves and will keep serving."""
        return self.state.serves and self.order is Order.NONE

    @property
    def presses(self) -> bool:
        """Whether it asks for its memory, and not for its age alone: it is over a limit, or soon will be."""
        return self.urgent or not self.aged or (self.excess or 0) > 0


class Room(NamedTuple):
    """What the pool may do now."""

    may_surge: bool = True
    """Whether the budget holds one more worker."""
    short: bool = False
    """Whether the pool is over its budget, or will be before a replacement could help."""
    out: bool = False
    """Whether waiting for a worker that already drains would be too late: the kernel's limit is near, or the workers grow too fast."""
    least: int = 0
    """How many workers must keep serving, unless memory is short."""
    wanted: int = 0
    """How many workers the pool should have. While fewer stay, a draining worker is replaced; one that drains for a reload or SIGTTOU
    is not."""
    boots: int = 1
    """How many workers may boot at once."""


class Handover(NamedTuple):
    """One worker takes another's place. Until the other is gone, the pool has one worker more than wanted."""

    replacement: int
    victim: int
    """The worker that the replacement was spawned for; once `ordered`, the worker that leaves."""
    ordered: bool = False
    """Whether the victim was ordered to go, or leaves already."""


@dataclass(frozen=True)
class Ledger:
    """The replacements under way. Workers are named by their generation; times in seconds, on the clock of `now`."""

    handovers: tuple[Handover, ...] = ()
    failures: int = 0
    """How many workers in a row have died at boot."""
    failed: int = 0
    """The newest worker that did."""
    not_before: float = 0.0
    """When the next attempt may be made."""

    @property
    def extra(self) -> int:
        """How many more workers there are than wanted."""
        return len(self.handovers)

    @property
    def pending(self) -> frozenset[int]:
        """The replacements whose victims have not been ordered to go yet."""
        return frozenset(handover.replacement for handover in self.handovers if not handover.ordered)

    @property
    def victims(self) -> frozenset[int]:
        """The workers that were ordered to go, or leave already."""
        return frozenset(handover.victim for handover in self.handovers if handover.ordered)


class Do(Enum):
    """An action of the supervisor."""

    SPAWN = "spawn"
    """Start one worker more than wanted, then record it with spawned() or failed()."""
    GO = "go"
    """Order this worker to drain now: its replacement serves."""
    PERMIT = "permit"
    """Order this worker to drain as soon as it is over its limit: it has no replacement yet."""
    SHRINK = "shrink"
    """Want one worker less again: the extra one is accounted for."""


class Step(NamedTuple):
    """One action, and for GO, PERMIT and SPAWN the worker that it is about."""

    do: Do
    generation: int = 0


def plan(ledger: Ledger, workers: Sequence[Member], room: Room, now: float) -> tuple[Ledger, list[Step]]:
    """The actions that are due, given the present `workers`, to be carried out in this order."""
    present = {worker.generation for worker in workers}
    steps: list[Step] = []
    for handover in ledger.handovers:
        for generation in (handover.victim, handover.replacement):
            if generation not in present:  # gone() was not called: its slot went to another worker
                ledger, more = gone(ledger, generation, True, now)
                steps += more
    by_generation = {worker.generation: worker for worker in workers}
    for handover in ledger.handovers:
        if not handover.ordered:
            ledger, more = _hand_over(ledger, handover.replacement, by_generation, room)
            steps += more
            by_generation |= {s.generation: by_generation[s.generation]._replace(order=Order.GO) for s in more if s.do is Do.GO}
    members = list(by_generation.values())
    steps += _permit(ledger, members, room, now) or _begin(ledger, members, room, now)
    return ledger, steps


def spawned(ledger: Ledger, replacement: int, victim: int) -> Ledger:
    """Record that the worker `replacement` was started to take the place of `victim`."""
    return replace(ledger, handovers=(*ledger.handovers, Handover(replacement, victim)))


def failed(ledger: Ledger, generation: int, now: float) -> Ledger:
    """Record that a worker died before it served, or could not be started at all: the next attempt has to wait."""
    pause = min(LONGEST_BACKOFF, BACKOFF * 2.0 ** min(ledger.failures, 30))
    return replace(ledger, failures=ledger.failures + 1, failed=max(generation, ledger.failed), not_before=now + pause)


def gone(ledger: Ledger, generation: int, served: bool, now: float) -> tuple[Ledger, list[Step]]:
    """Record that a worker is gone; `served` is whether it ever served.

    Call it as soon as that is known: until the pool's size is reduced by one, the server starts another worker in its place.
    """
    if not served:
        ledger = failed(ledger, generation, now)
    kept = tuple(
        handover
        for handover in ledger.handovers
        # once the victim was ordered to go, the replacement is a worker like any other: the server itself replaces it
        if handover.victim != generation and (handover.replacement != generation or handover.ordered)
    )
    return replace(ledger, handovers=kept), [Step(Do.SHRINK)] * (len(ledger.handovers) - len(kept))


def recovered(ledger: Ledger, workers: Sequence[Member]) -> Ledger:
    """Forget the failures once a newer worker serves."""
    if ledger.failures and any(w.generation > ledger.failed and w.state.serves for w in workers):
        return replace(ledger, failures=0, not_before=0.0)
    return ledger


def _hand_over(ledger: Ledger, replacement: int, workers: dict[int, Member], room: Room) -> tuple[Ledger, list[Step]]:
    """If this replacement serves, the worst of the workers that ask may leave."""
    (handover,) = (handover for handover in ledger.handovers if handover.replacement == replacement)
    asker = workers[handover.victim]
    if asker.state.leaves:
        return _with(ledger, handover._replace(ordered=True)), []
    serving = sum(worker.serves for worker in workers.values())
    if not workers[replacement].serves or serving <= room.least:
        return ledger, []  # it still boots, or leaves already; or too many others have died
    fresh = ledger.pending
    asking = [w for w in workers.values() if w.state is State.WAITING and w.order is Order.NONE and w.generation not in fresh]
    victim = (_worst(asking) or asker).generation
    swapped = [
        # another replacement was spawned for the worker that leaves now: it takes this handover's worker instead
        other._replace(victim=handover.victim) if other.victim == victim and not other.ordered else other
        for other in ledger.handovers
        if other is not handover
    ]
    ledger = replace(ledger, handovers=(*swapped, handover._replace(victim=victim, ordered=True)))
    return ledger, [Step(Do.GO, victim)]


def _with(ledger: Ledger, handover: Handover) -> Ledger:
    handovers = tuple(handover if each.replacement == handover.replacement else each for each in ledger.handovers)
    return replace(ledger, handovers=handovers)


def _permit(ledger: Ledger, workers: Sequence[Member], room: Room, now: float) -> list[Step]:
    """Which worker may leave before its replacement serves. One at a time: the last permitted worker must have begun to leave."""
    if any(worker.state is State.WAITING and worker.order is Order.PERMIT for worker in workers):
        return []
    asking = [worker for worker in workers if worker.state is State.WAITING and worker.order is Order.NONE]
    pressing = [worker for worker in asking if worker.presses]
    serving = sum(worker.serves for worker in workers)
    nobody_comes = now < ledger.not_before
    if room.short and pressing:
        asking = pressing
        leave = any(worker.state.leaves or worker.order is Order.GO for worker in workers)
        another_comes = any(worker.state is State.STARTING for worker in workers)
        enough = room.out or (not leave and (serving > 1 or not another_comes))
        # while no worker can be started, the last one is worth more than its memory
        enough = enough and (serving > 1 or not nobody_comes)
    else:
        asking = [worker for worker in asking if worker.urgent or (not room.may_surge and ((worker.excess or 0) > 0 or worker.aged))]
        enough = serving > room.least and not nobody_comes
    worst = _worst(asking)
    return [Step(Do.PERMIT, worst.generation)] if worst is not None and enough else []


def _begin(ledger: Ledger, workers: Sequence[Member], room: Room, now: float) -> list[Step]:
    """For which worker a replacement is spawned."""
    booting = sum(worker.state is State.STARTING for worker in workers)
    if room.short or not room.may_surge or now < ledger.not_before or booting >= room.boots or ledger.extra >= max(1, room.wanted):
        return []
    replaced = {handover.victim for handover in ledger.handovers}
    unreplaced = [worker for worker in workers if worker.generation not in replaced]
    stay = sum(worker.state in (State.STARTING, State.SERVING, State.WAITING) for worker in workers)
    # draining workers first, because those that ask still serve
    drains = _worst([worker for worker in unreplaced if worker.state is State.DRAINING]) if stay < room.wanted else None
    worst = drains or _worst([worker for worker in unreplaced if worker.state is State.WAITING])
    return [] if worst is None else [Step(Do.SPAWN, worst.generation)]


def _worst(of: list[Member]) -> Member | None:
    """The worker furthest above its limit; of those that are about as far, the oldest, so that none waits forever. None of none."""

    def badness(worker: Member) -> tuple[bool, int, int]:
        # by powers of two; an unknown excess ranks like none
        return worker.urgent, max(0, worker.excess or 0).bit_length(), -worker.generation

    return max(of, key=badness, default=None)
