"""Was it the kernel's OOM killer? Its counter says how many it killed, never whom."""

from __future__ import annotations

from enum import Enum


class Verdict(Enum):
    """How sure it is that the kernel killed a worker for its memory."""

    CONFIRMED = "confirmed"
    """The counter of the workers' own cgroup covers every death that nothing else explains."""
    LIKELY = "likely"
    """It covers some of them, or it is the whole machine's, which others are counted in as well."""
    UNKNOWN = "unknown"
    """There is no counter."""
    NOT_THE_KERNEL = "not the kernel"


def verdict(deaths: int, kills: int | None, own: bool) -> Verdict:
    """Of `deaths` by SIGKILL that nothing else explains, while the counter rose by `kills`; `own`: that of the workers' cgroup."""
    if kills is None:
        return Verdict.UNKNOWN
    if kills <= 0:
        return Verdict.NOT_THE_KERNEL
    return Verdict.CONFIRMED if own and kills >= deaths else Verdict.LIKELY
