"""Was a run that never came to its end one that the kernel ended? And how many such ends are enough?"""

from __future__ import annotations

from typing import NamedTuple


class Run(NamedTuple):
    """What is noted before a run begins: where, and how often that machine's kernel had killed for memory until then."""

    boot: str
    """Which boot of which machine; empty where it is not known."""
    kills: int | None
    """By the whole machine's counter; None where it can't be read."""


def is_a_death(began: Run, now: Run, lives: bool) -> bool:
    """Whether the run that began so, and whose whole node is gone without a word, counts as a death for memory.

    `now` is the machine that asks; `lives`: the node still runs. On the same machine its OOM counter
    tells a kernel's kill from an operator's. Of another machine, or before a reboot, nothing is known: it counts,
    for a message that takes down one node after the other must come to an end.
    """
    if lives:
        return False
    if began.boot and began.boot == now.boot and began.kills is not None and now.kills is not None:
        return now.kills > began.kills
    return True


def is_poison(deaths: int, allowed: int) -> bool:
    """Whether so many deaths are more than are `allowed`."""
    return deaths > allowed
