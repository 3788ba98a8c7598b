"""Whether the kernel's OOM killer took a worker. The kernel counts its kills, but does not say which process it killed."""

from __future__ import annotations

from enum import Enum


class Verdict(Enum):
    """How sure it is that the kernel killed a worker for its memory."""

    CONFIRMED = "confirmed"
    """The counter of the workers' own cgroup covers every death that nothing else explains."""
    LIKELY = "likely"
    """The counter covers some of these deaths, or it is the whole machine's, which counts other processes too."""
    UNKNOWN = "unknown"
    """There is no counter."""
    NOT_THE_KERNEL = "not the kernel"


def verdict(deaths: int, kills: int | None, own: bool) -> Verdict:
    """The verdict on `deaths` by SIGKILL that nothing else explains, while the counter rose by `kills` (None: there is no counter).

    `own`: it is the counter of the workers' own cgroup.
    """
    if kills is None:
        return Verdict.UNKNOWN
    if kills <= 0:
        return Verdict.NOT_THE_KERNEL
    return Verdict.CONFIRMED if own and kills >= deaths else Verdict.LIKELY
