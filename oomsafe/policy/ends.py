"""How a worker ended, from its exit status, its own record, and what its server and the kernel have done to it. Pure."""

from __future__ import annotations

import signal
from enum import Enum
from typing import NamedTuple

from oomsafe.policy.verdicts import Verdict

#: Signals by which a process ends because of a fault of its own.
CRASHES = frozenset(
    number
    for name in ("SIGSEGV", "SIGBUS", "SIGABRT", "SIGILL", "SIGFPE", "SIGSYS", "SIGTRAP", "SIGXCPU", "SIGXFSZ")
    if (number := getattr(signal, name, None)) is not None
)


class End(str, Enum):
    """How a worker ended. The scoreboard stores an end's position in this order, so append new ends at the end."""

    RECYCLED = "recycled"
    SERVER = "server"
    """In order: its server ended it (a reload, a shutdown, one worker less, max_requests), or it heeded somebody's SIGTERM."""
    EXITED = "exited"
    """By itself, with a status, and not in order."""
    CRASHED = "crashed"
    """By a signal that C code causes: a segmentation fault, abort()."""
    LIMIT = "limit"
    """oomsafe killed it above its hard limit, or above the limit of its task."""
    TIMEOUT = "timeout"
    """Its server killed it: it did not answer in time, or its task took too long."""
    SIGNAL = "signal"
    """By somebody's signal, which was not the kernel's OOM killer's."""
    OOM_CONFIRMED = "oom_confirmed"
    """By the kernel's OOM killer, for certain."""
    OOM_LIKELY = "oom_likely"
    """By SIGKILL, while the kernel's OOM killer took some process."""
    OOMD = "oomd"
    """By systemd-oomd, which leaves a mark on the cgroup."""
    UNKNOWN = "unknown"
    """By SIGKILL, and nothing here tells whose; or its exit status is not known."""

    def __str__(self) -> str:
        return self.value

    def __format__(self, spec: str) -> str:  # Python 3.10 and 3.12 differ
        return format(self.value, spec)

    @property
    def in_order(self) -> bool:
        """Whether nobody need be told."""
        return self in (End.RECYCLED, End.SERVER)

    @property
    def for_memory(self) -> bool:
        """Whether the kernel or oomsafe killed it for its memory, as far as is known."""
        return self in (End.LIMIT, End.OOM_CONFIRMED, End.OOM_LIKELY, End.OOMD)


class By(Enum):
    """Why its server ended a worker itself."""

    ORDER = "order"
    """A reload, a shutdown, one worker less."""
    TIMEOUT = "it had not answered in time"
    TIME_LIMIT = "its task had passed its time limit"
    GRACE = "it had not ended within its grace period"


class Facts(NamedTuple):
    """What is known of a worker's end."""

    exitcode: int | None
    """As in multiprocessing: a negative number is the signal that ended it. None: its server does not tell."""
    by: By | None = None
    """What its server did to it; None: nothing."""
    killed_by_server: bool = False
    """Whether its server sent it SIGKILL."""
    left: bool = False
    """Whether it ended as its server has its workers end: by its own record it had no more work."""
    drained: bool = False
    """Whether it was being recycled, by its own record."""
    stopped: bool = False
    """Whether oomsafe killed it at a limit."""
    oomd: bool = False
    """Whether systemd-oomd has left its mark since this worker was last seen alive."""


def is_unexplained_kill(facts: Facts) -> bool:
    """Whether it died by a SIGKILL that neither its server nor oomsafe sent: then the kernel's counts must tell."""
    return facts.exitcode == -signal.SIGKILL and not facts.stopped and not facts.killed_by_server


def end_of(facts: Facts, verdict: Verdict | None = None) -> End:
    """How it ended; `verdict` is that on an unexplained SIGKILL."""
    if facts.stopped:
        return End.LIMIT
    if is_unexplained_kill(facts):
        return End.OOMD if facts.oomd and verdict is not Verdict.CONFIRMED else _END_OF[verdict or Verdict.UNKNOWN]
    if facts.by in (By.TIMEOUT, By.TIME_LIMIT, By.GRACE):
        return End.TIMEOUT
    if facts.exitcode is not None and -facts.exitcode in CRASHES:
        return End.CRASHED
    if facts.by is By.ORDER or (facts.left and (facts.exitcode or 0) >= 0):
        return End.RECYCLED if facts.drained else End.SERVER
    if facts.exitcode is None:
        return End.UNKNOWN
    return End.EXITED if facts.exitcode >= 0 else End.SIGNAL


_END_OF = {
    Verdict.CONFIRMED: End.OOM_CONFIRMED,
    Verdict.LIKELY: End.OOM_LIKELY,
    Verdict.UNKNOWN: End.UNKNOWN,
    Verdict.NOT_THE_KERNEL: End.SIGNAL,
}


def name_of_signal(exitcode: int | None) -> str:
    """``SIGSEGV``; ``signal 63`` for one without a name, empty if no signal ended it."""
    if exitcode is None or exitcode >= 0:
        return ""
    try:
        return signal.Signals(-exitcode).name
    except ValueError:
        return f"signal {-exitcode}"
