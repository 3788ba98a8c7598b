"""What a node above its budget does: it starts no new task, and recycles its biggest idle child first. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

#: A paused node resumes below this share of its budget. Resuming at the budget itself would make it flap.
RESUME_AT = 0.95

#: Recycling a child that has grown by less than this share since it was fresh gives nothing back.
WORTH = 0.1

#: Seconds that a node waits for memory that none of its children holds: another process may give it back.
FUTILE_AFTER = 10.0


class Child(NamedTuple):
    """One child now; sizes in bytes."""

    generation: int
    held: int
    fresh: int
    """Its resident memory when it began to serve."""
    serves: bool
    """False: it is starting, draining or leaving."""
    idle: bool
    """It has nothing in flight."""


@dataclass(frozen=True)
class Intake:
    """Whether the node starts tasks. Times in seconds, on the clock of `now`."""

    paused: bool = False
    futile_since: float | None = None
    """Since when it has waited although no child has anything to give back; None: it does not wait."""
    refused: bool = False
    """It waited in vain: the budget is below what the node needs, so it is not enforced."""


class Plan(NamedTuple):
    """What to do."""

    intake: Intake
    recycle: int | None = None
    """The generation of the child to recycle; None: none."""


def shed(intake: Intake, used: int | None, budget: int | None, children: Sequence[Child], now: float) -> Plan:
    """What a node that holds `used` bytes should do. If `used` or `budget` is None (not known), the node continues."""
    if used is None or budget is None or used < budget * RESUME_AT:
        return Plan(Intake())
    if intake.refused or (not intake.paused and used <= budget):
        return Plan(intake)
    away = any(not child.serves for child in children)
    victim = None if away else biggest_idle(children)
    futile = not away and victim is None and all(child.idle for child in children)
    since = (now if intake.futile_since is None else intake.futile_since) if futile else None
    if since is not None and now - since >= FUTILE_AFTER:
        return Plan(Intake(refused=True))
    return Plan(replace(intake, paused=True, futile_since=since), victim if used > budget else None)


def biggest_idle(children: Sequence[Child]) -> int | None:
    """The generation of the biggest idle child that would give memory back; None: there is none."""
    able = [child for child in children if child.serves and child.idle and child.held - child.fresh > child.fresh * WORTH]
    return max(able, key=lambda child: child.held).generation if able else None
