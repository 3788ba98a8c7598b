"""Whether the kernel's OOM killer took a worker. The kernel counts its kills, but does not say which process it killed."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple


class Verdict(Enum):
    """How sure it is that the kernel killed a worker for its memory."""

    CONFIRMED = "confirmed"
    """The kernel's log names it, or the counter of the workers' own cgroup covers every death that nothing else explains."""
    LIKELY = "likely"
    """The counter covers some of these deaths, or it is the whole machine's, which counts other processes too."""
    UNKNOWN = "unknown"
    """There is no counter."""
    NOT_THE_KERNEL = "not the kernel"


class Count(NamedTuple):
    """What a counter of OOM kills says about deaths at the same time."""

    rises: int | None
    """By how much it rose while they died; None: there is no counter."""
    own: bool
    """It is the counter of the workers' own cgroup; False: the whole machine's."""
    doubtful: int = 0
    """How many of these rises may have been for deaths before."""


def verdict(deaths: int, kills: int | None, own: bool) -> Verdict:
    """The verdict on `deaths` by SIGKILL that nothing else explains, while the counter rose by `kills` (None: there is no counter).

    `own`: it is the counter of the workers' own cgroup.
    """
    if kills is None:
        return Verdict.UNKNOWN
    if kills <= 0:
        return Verdict.NOT_THE_KERNEL
    return Verdict.CONFIRMED if own and kills >= deaths else Verdict.LIKELY


def verdicts(named: Sequence[bool], dying: int, count: Count) -> list[tuple[Verdict, str]]:
    """The verdict on each of some deaths by SIGKILL that nothing else explains, and its evidence in words.

    `named`: for each death, whether the kernel's log says that it killed that process. `dying`: how many more workers are about to die by
    SIGKILL: the counter has risen for them already, if it was the kernel.
    """
    sure = (Verdict.CONFIRMED, "the kernel's log names it")
    left = len(named) - sum(named) + dying
    rises = None if count.rises is None else max(0, count.rises - sum(named))
    # whoever the log does not name, while it names as many as were counted, was not killed by the kernel
    found = verdict(left, rises, count.own)
    if found is Verdict.CONFIRMED and (rises or 0) - count.doubtful < left:
        found = Verdict.LIKELY
    return [sure if one else (found, _evidence(found, count, left, rises)) for one in named]


def _evidence(found: Verdict, count: Count, deaths: int, rises: int | None) -> str:
    whose = "this cgroup's" if count.own else "the whole machine's"
    if found is Verdict.UNKNOWN:
        return "the kernel shows no count of OOM kills here"
    if found is Verdict.NOT_THE_KERNEL:
        return f"{whose} count of OOM kills has not risen for it"
    many = f"{rises} for {deaths} deaths" if deaths > 1 or (rises or 0) > 1 else "1"
    return f"{whose} count of OOM kills has risen by {many}"
