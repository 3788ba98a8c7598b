"""Replacement first: who is brought up, who may then go. A state machine of one small record, pure.

A worker over its limit waits. The supervisor brings up one more than it wants to have; when that one
serves, the worst of those who wait is told to drain; when it is gone, the pool is as many as before.
Where memory does not hold one more, the worst drains first. One that could not wait, for it grew too fast, and
drains by itself gets its replacement meanwhile. Never is more than one on its way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import NamedTuple

#: Seconds before the next try after the first replacement that died at boot; doubled each time, up to the last.
BACKOFF, LONGEST_BACKOFF = 1.0, 60.0


class Stage(Enum):
    """Of a worker, as the pool sees it."""

    STARTING = "starting"
    SERVING = "serving"
    WAITING = "waiting"
    """It serves, is over its limit, and waits for its replacement."""
    DRAINING = "draining"
    """It takes nothing new, and has work to finish: that may take long."""
    LEAVING = "leaving"
    """It has no work any more: it is gone in a moment."""


class Seen(NamedTuple):
    """One worker at this moment."""

    generation: int
    stage: Stage
    excess: int = 0
    """Bytes that it has above its soft limit; negative below it."""


class Room(NamedTuple):
    """Whether one more worker can be had now."""

    may_surge: bool = True
    """False: drain first."""
    least: int = 0
    """How many workers must serve at any time: those that are wanted, less those that may be away at once."""
    wanted: int = 0
    """How many workers are wanted: while fewer stay, who drains is replaced. One who drains for a reload or SIGTTOU is not."""


@dataclass(frozen=True)
class Ledger:
    """What is under way. Times in seconds, on the clock of `now`."""

    replacement: int | None = None
    """The generation of the worker that is one more than wanted; None: nothing is under way."""
    asker: int | None = None
    """The worker that it was brought up for."""
    victim: int | None = None
    """The worker that goes in its place."""
    failures: int = 0
    """How many workers in a row have died at boot."""
    failed: int = 0
    """The generation of the last of them."""
    not_before: float = 0.0
    """When the next may be tried."""

    @property
    def extra(self) -> int:
        """How many more workers there are than wanted: 0 or 1."""
        return 0 if self.replacement is None else 1


class Do(Enum):
    """What the supervisor does."""

    SPAWN = "spawn"
    """Bring up one more worker than wanted, then say so by spawned()."""
    GRANT = "grant"
    """Tell this worker to drain."""
    SHRINK = "shrink"
    """One less again: the pool has as many as wanted."""
    FAILED = "failed"
    """One less again: the replacement died before it served."""


class Step(NamedTuple):
    """One thing to do."""

    do: Do
    generation: int = 0


def plan(ledger: Ledger, workers: Sequence[Seen], room: Room, now: float) -> tuple[Ledger, list[Step]]:
    """What to do now that these workers are seen."""
    if ledger.replacement is None:
        return ledger, _begin(ledger, workers, room, now)
    known = {worker.generation: worker for worker in workers}
    if ledger.victim is not None:
        return (ledger, []) if ledger.victim in known else _finished(workers, room, now)
    asker, replacement = known.get(ledger.asker or 0), known.get(ledger.replacement)
    if replacement is None:
        return failed(ledger, ledger.replacement, now), [Step(Do.FAILED)]
    if asker is None:
        return _finished(workers, room, now)  # it is gone without having been told: its replacement has taken its place
    if asker.stage in (Stage.DRAINING, Stage.LEAVING):
        return replace(ledger, victim=asker.generation), []
    if replacement.stage not in (Stage.SERVING, Stage.WAITING):
        return ledger, []  # one that leaves takes nobody's place: it has failed in the last moment of its boot
    if not _can_spare_one(workers, room):
        return ledger, []  # others have died meanwhile
    victim = _worst([worker for worker in workers if worker.stage is Stage.WAITING and worker is not replacement]) or asker
    return replace(ledger, victim=victim.generation), [Step(Do.GRANT, victim.generation)]


def spawned(ledger: Ledger, replacement: int, asker: int) -> Ledger:
    """The worker of generation `replacement` has been brought up, for `asker`."""
    return replace(ledger, replacement=replacement, asker=asker, victim=None)


def _begin(ledger: Ledger, workers: Sequence[Seen], room: Room, now: float) -> list[Step]:
    if now < ledger.not_before:
        return []
    worst = _worst([worker for worker in workers if worker.stage is Stage.DRAINING])
    if worst is not None and room.may_surge and _stay(workers) < room.wanted:
        return [Step(Do.SPAWN, worst.generation)]  # before those who wait, for they serve meanwhile
    worst = _worst([worker for worker in workers if worker.stage is Stage.WAITING])
    if worst is None or not _can_spare_one(workers, room):
        return []
    return [Step(Do.SPAWN if room.may_surge else Do.GRANT, worst.generation)]


def _can_spare_one(workers: Sequence[Seen], room: Room) -> bool:
    return sum(worker.stage in (Stage.SERVING, Stage.WAITING) for worker in workers) > room.least


def _stay(workers: Sequence[Seen]) -> int:
    return sum(worker.stage in (Stage.STARTING, Stage.SERVING, Stage.WAITING) for worker in workers)


def _worst(of: list[Seen]) -> Seen | None:
    return max(of, key=lambda worker: (worker.excess, -worker.generation), default=None)


def _finished(workers: Sequence[Seen], room: Room, now: float) -> tuple[Ledger, list[Step]]:
    # and the next at once, for a supervisor may not look again for a second
    return Ledger(), [Step(Do.SHRINK), *_begin(Ledger(), workers, room, now)]


def failed(ledger: Ledger, generation: int, now: float) -> Ledger:
    """A worker has died before it served, a replacement or another: not at once again."""
    pause = min(LONGEST_BACKOFF, BACKOFF * 2.0 ** min(ledger.failures, 30))
    # with a victim on its way, the server itself brings up another: there is one too few without
    under_way = ledger if generation != ledger.replacement or ledger.victim is not None else Ledger()
    return replace(under_way, failures=ledger.failures + 1, failed=generation, not_before=now + pause)


def recovered(ledger: Ledger, workers: Sequence[Seen]) -> Ledger:
    """Forget the failures once a later worker has come to serve."""
    if ledger.failures and any(w.generation > ledger.failed and w.stage in (Stage.SERVING, Stage.WAITING) for w in workers):
        return replace(ledger, failures=0, not_before=0.0)
    return ledger
