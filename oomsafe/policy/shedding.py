"""When a node is above its budget: it starts no new task, and the biggest idle child is recycled first. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

#: Once it has paused, a node goes on below this share of its budget: at the budget itself it would do so at every breath.
RESUME_AT = 0.95

#: A child that has grown by less than this share since it was fresh gives nothing back when it is recycled.
WORTH = 0.1

#: Seconds that a node waits for memory that none of its children has: somebody else may give it back.
FUTILE_AFTER = 10.0


class Child(NamedTuple):
    """One child at this moment; sizes in bytes."""

    generation: int
    held: int
    fresh: int
    """What it had resident when it had just begun to serve."""
    serves: bool
    """False: it is starting, or on its way out."""
    idle: bool
    """Nothing is in flight in it."""


@dataclass(frozen=True)
class Intake:
    """Whether the node starts tasks. Times in seconds, on the clock of `now`."""

    paused: bool = False
    futile_since: float | None = None
    """Since when it waits although no child has anything to give back; None: it does not."""
    refused: bool = False
    """It has waited for nothing: the budget is below what the node needs, so it is not kept to."""


class Plan(NamedTuple):
    """What to do."""

    intake: Intake
    recycle: int | None = None
    """The generation of the child that is to be recycled; None: none."""


def shed(intake: Intake, used: int | None, budget: int | None, children: Sequence[Child], now: float) -> Plan:
    """What a node that holds `used` bytes should do. A figure that is not known stops nothing."""
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
    """The generation of the idle child that holds most, of those that would give something back; None: there is none."""
    able = [child for child in children if child.serves and child.idle and child.held - child.fresh > child.fresh * WORTH]
    return max(able, key=lambda child: child.held).generation if able else None
