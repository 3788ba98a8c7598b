"""Which unfinished runs count as deaths for memory, against which task they count, and how many make it poison."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import NamedTuple

#: Bytes by which a task must have grown to be a prime suspect for the death of its whole node.
GROWN = 32 << 20

#: The least seconds for which a suspect runs alone, if it lasts that long.
ALONE_FOR = 60.0

#: How many times that period is doubled at most.
DOUBLED = 10


class Run(NamedTuple):
    """What is noted before a run begins: the machine, and how many OOM kills its kernel had counted by then."""

    boot: str
    """The machine's boot id; empty if it is not known."""
    kills: int | None
    """The whole machine's counter; None if it can't be read."""


class Fate(Enum):
    """What happened to a run whose note is still there."""

    LIVES = "its node runs"
    OPEN = "its node can't be seen from here, and its lease has not expired"
    KILLED = "its node is gone, and the kernel may have done it"
    ENDED = "its node is gone, and the kernel has not done it"


def fate_of(began: Run, now: Run, lives: bool | None, leased: bool) -> Fate:
    """What happened to the run that was noted as `began`; `now` describes the machine that asks.

    `lives`: whether its node still runs; None if that can't be seen (another machine, another container), and then its lease decides.
    On the same machine the OOM counter tells a kernel kill from an operator's. For another machine, or before a
    reboot, nothing is known and the run counts as killed, because a message that takes down one node after the other must be stopped.
    """
    if lives:
        return Fate.LIVES
    if lives is None and leased:
        return Fate.OPEN
    if began.boot and began.boot == now.boot and began.kills is not None and now.kills is not None:
        return Fate.KILLED if now.kills > began.kills else Fate.ENDED
    return Fate.KILLED


class Count(NamedTuple):
    """The deaths that count against one task."""

    deaths: int = 0
    """Deaths of its child alone, or of its whole node while nothing else ran there."""
    doubts: int = 0
    """Two for each death of its whole node that it probably caused, one for each that another task probably caused."""

    def after_its_node(self, alone: bool, grew: bool | None) -> Count:
        """The count after its whole node died while it ran. `grew`: whether it had grown; None: no task there is known to have grown.

        A task that kills a node while it runs alone there also caused the earlier deaths.
        """
        if alone:
            return Count(self.deaths + 1 + self.doubts // 2, 0)
        return Count(self.deaths, self.doubts + (1 if grew is False else 2))

    @property
    def suspect(self) -> bool:
        """Whether it must run alone next, which proves or clears it."""
        return self.doubts >= 2

    @property
    def alone_for(self) -> float:
        """Seconds for which nothing else is started beside it. A quick killer kills within them; a slow one is measured as it grows."""
        return float(ALONE_FOR * 2 ** min(DOUBLED, max(0, self.doubts // 2 - 1)))


def grew(task: str, grown: Mapping[str, int]) -> bool | None:
    """Whether `task` had grown at least half as much as the biggest of `grown` (which has those over GROWN); None if that is empty."""
    if not grown:
        return None
    return grown.get(task, 0) * 2 >= max(grown.values())


def is_poison(deaths: int, allowed: int) -> bool:
    """Whether `deaths` are more than `allowed`."""
    return deaths > allowed
