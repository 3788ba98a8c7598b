"""Which runs that never came to their end count as deaths for memory, whom they are held against, and how many are enough."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import NamedTuple

#: Bytes by which a task must have grown to be the likeliest to have taken its whole node down.
GROWN = 32 << 20

#: Seconds for which a suspect runs alone at least, should it last so long.
ALONE_FOR = 60.0

#: So often that time is doubled at most.
DOUBLED = 10


class Run(NamedTuple):
    """What is noted before a run begins: where, and how often that machine's kernel had killed for memory until then."""

    boot: str
    """Which boot of which machine; empty where it is not known."""
    kills: int | None
    """By the whole machine's counter; None where it can't be read."""


class Fate(Enum):
    """What has become of a run that has left a note."""

    LIVES = "its node runs"
    OPEN = "its node can't be seen from here, and its lease has not expired"
    KILLED = "its node is gone, and the kernel may have done it"
    ENDED = "its node is gone, and the kernel has not done it"


def fate_of(began: Run, now: Run, lives: bool | None, leased: bool) -> Fate:
    """What has become of the run that began so; `now` is the machine that asks.

    `lives`: whether its node still runs, None where that can't be seen (another machine, another container); then its lease decides.
    On the same machine the OOM counter tells a kernel's kill from an operator's. Of another machine, or before a
    reboot, nothing is known: it counts, for a message that takes down one node after the other must come to an end.
    """
    if lives:
        return Fate.LIVES
    if lives is None and leased:
        return Fate.OPEN
    if began.boot and began.boot == now.boot and began.kills is not None and now.kills is not None:
        return Fate.KILLED if now.kills > began.kills else Fate.ENDED
    return Fate.KILLED


class Count(NamedTuple):
    """What is held against one task."""

    deaths: int = 0
    """Of its child alone, or of its whole node while nothing else ran there."""
    doubts: int = 0
    """Two for each death of its whole node that may well have been its doing, one for each that seems to be another's."""

    def after_its_node(self, alone: bool, grew: bool | None) -> Count:
        """Its whole node has died while it ran. `grew`: whether it had; None: nobody there had, as far as is known.

        Who kills a node while it is alone has killed it before, too.
        """
        if alone:
            return Count(self.deaths + 1 + self.doubts // 2, 0)
        return Count(self.deaths, self.doubts + (1 if grew is False else 2))

    @property
    def suspect(self) -> bool:
        """Whether it must run alone next: then its end, or the node's, tells."""
        return self.doubts >= 2

    @property
    def alone_for(self) -> float:
        """Seconds for which nothing else is started beside it. A quick killer kills within them; a slow one is seen to grow."""
        return float(ALONE_FOR * 2 ** min(DOUBLED, max(0, self.doubts // 2 - 1)))


def grew(task: str, grown: Mapping[str, int]) -> bool | None:
    """Whether `task` is among those that had grown most, of all that had grown by more than GROWN; None where none had."""
    if not grown:
        return None
    return grown.get(task, 0) * 2 >= max(grown.values())


def is_poison(deaths: int, allowed: int) -> bool:
    """Whether so many deaths are more than are `allowed`."""
    return deaths > allowed
