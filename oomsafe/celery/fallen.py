"""Which children of a node have died for memory: how many, by whose hand, and the last of them."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from oomsafe.policy.text import printable
from oomsafe.policy.verdicts import Verdict

#: Of so many it is told when they died, and with what.
LAST = 8

#: What is told as the verdict on a child that was stopped at its task's memory_limit: nobody has to guess there.
STOPPED = "stopped"


@dataclass
class Gone:
    """A child that has died, as it was left on the scoreboard."""

    pid: int
    ticket: int
    """Of the task that it was inside of; 0: of none, so what it had to say it may have said."""
    rss: int | None
    """When it was last seen, in bytes."""
    killed: bool
    """By SIGKILL, and no hand of Celery's or ours was in it."""
    in_hand: tuple[str, str] | None = None
    """Its task's name and id, printable; None: it had none, or nobody knows which."""
    stopped: bool = False
    """By us, at its task's limit."""
    verdict: Verdict | None = None
    """Whether it was the kernel; None while nobody has asked."""
    at: float = field(default_factory=time.time)
    """Seconds since 1970."""


class Fallen:
    """Of one pool. Noted in the thread that reaps, told in any."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        """By verdict: confirmed or likely to be the kernel's, or stopped at their task's limit."""
        self._last: tuple[Gone, ...] = ()

    def note(self, gone: Gone) -> None:
        """It has died, and been judged if it had to be; only what it did for memory counts."""
        why = _why(gone)
        if why is not None:
            self._last = (gone, *self._last)[:LAST]
            self.counts = {**self.counts, why: self.counts.get(why, 0) + 1}

    def told(self) -> list[dict[str, Any]]:
        """The last of them, the latest first. Bytes, and seconds since 1970; None is not known."""
        return [
            {"at": gone.at, "task": name, "id": task_id, "pid": gone.pid, "rss": gone.rss, "verdict": _why(gone)}
            for gone in self._last
            for name, task_id in (gone.in_hand or (None, None),)
        ]


def name_and_id(job: Any) -> tuple[str, str]:
    """Of the task that one of billiard's jobs is, printable and short: both may have been chosen by whoever sent it."""
    name, task_id = getattr(job, "oomsafe_task", ("?", "?"))[:2]
    return printable(str(name)), printable(str(task_id))


def _why(gone: Gone) -> str | None:
    if gone.stopped:
        return STOPPED
    return gone.verdict.value if gone.verdict in (Verdict.CONFIRMED, Verdict.LIKELY) else None
