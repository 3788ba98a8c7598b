"""This process's guard: the one that the server's adapter made after the fork, or one of the middleware's own."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from oomsafe.log import attempt, log, once, say_off
from oomsafe.policy.settings import Policy, is_off, load_policy
from oomsafe.worker.guard import Guard, Recycle

if TYPE_CHECKING:
    from oomsafe.worker.siblings import Siblings


class Way(NamedTuple):
    """How a process is recycled that no server's adapter guards."""

    recycle: Recycle
    workers: int = 1
    """How many such processes its parent wants, this one included: they take turns."""

    @property
    def told(self) -> str:
        """For the log: what becomes of such a process above its soft limit."""
        if self.workers > 1:
            return "it ends, one worker after the other, and its parent brings up another"
        return "it ends, and something else is to restart it (OOMSAFE_SINGLE=exit)"


RecycleOf = Callable[[Policy], Way | None]

#: Seconds until a guard that could not be made is tried again: at once, then after twice as long each time, and at most so long.
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0

#: What becomes of a process above its soft limit that is not recycled.
STAYS = "a warning says so, for nothing here would bring up another (under uvicorn, where something does: OOMSAFE_SINGLE=exit)"

_guard: Guard | None = None
_by_server = False
"""Whether a server's adapter has made it."""
_failed: _Failed | None = None


class _Failed(NamedTuple):
    """The last try to make a guard in this process."""

    pid: int
    until: float
    """Monotonic time of the next one."""
    pause: float


def set_guard(guard: Guard) -> None:
    """From now on this process is guarded by `guard`: what a server's adapter says."""
    global _guard, _by_server
    _guard, _by_server = guard, True


def get_guard() -> Guard | None:
    """This process's guard; None before there is one. One made before a fork is the parent's."""
    return _guard if _guard is not None and _guard.here else None


def own_guard() -> Guard | None:
    """The same, where no server's adapter has made it: then none ticks."""
    return None if _by_server else get_guard()


def guard_for(keywords: Mapping[str, Any], unit: str, recycle_of: RecycleOf | None = None) -> Guard | None:
    """This process's guard. Where no adapter has made one, a pool of one, with this policy.

    `recycle_of(policy)` tells how such a process can be recycled; None where it can't, and it only measures.
    None when even that failed, which is logged once: the work goes on unmeasured, and it is tried again later.
    None also in a fork of a server's worker, which is no worker, and where oomsafe is off.
    """
    guard = get_guard()
    if guard is None and is_off(os.environ):
        say_off()
        return None
    if guard is None:
        return None if _by_server and _guard is not None else _alone(keywords, unit, recycle_of)
    ignored = ", ".join(sorted(set(keywords) - {"headers"}))
    if ignored:
        once("keywords", logging.WARNING, "MemoryMiddleware: %s ignored, for this process is guarded already", ignored)
    return guard


def _siblings(workers: int) -> Siblings | None:
    if workers < 2:
        return None
    from oomsafe.worker.siblings import Siblings  # here: most workers have a scoreboard

    return Siblings(workers)


def _advice(error: Exception) -> str:
    """What its user can do about it."""
    if type(error).__module__.partition(".")[0] == "blockbuster":
        return (
            " (a detector of blocking calls keeps an event loop from reading files, as a guard must: leave it to tests, or exempt oomsafe)"
        )
    return ""


def _alone(keywords: Mapping[str, Any], unit: str, recycle_of: RecycleOf | None) -> Guard | None:
    global _guard, _by_server, _failed
    before = _failed if _failed is not None and _failed.pid == os.getpid() else None
    if before is not None and time.monotonic() < before.until:
        return None
    try:
        policy, warnings = load_policy(os.environ, keywords)
        # where its user says that something restarts this process, that need not be its parent
        parent = None if os.environ.get("OOMSAFE_SINGLE") == "exit" else os.getppid()
        way = recycle_of(policy) if recycle_of is not None else None
        recycle, siblings = (None, None) if way is None else (way.recycle, _siblings(way.workers))
        guard = Guard(policy, recycle=recycle, unit=unit, parent=parent, siblings=siblings)
    except Exception as error:
        if before is None:
            log.error(
                "no guard can be made, so nothing is measured until it can: %r%s; it is tried again, at last every %.0f s",
                error, _advice(error), LONGEST_PAUSE,
            )  # fmt: skip
        pause = 0.0 if before is None else min(LONGEST_PAUSE, max(FIRST_PAUSE, 2 * before.pause))
        _failed = _Failed(os.getpid(), time.monotonic() + pause, pause)
        return None
    if before is not None:
        log.warning("a guard could be made at last: from now on this process is measured")
    for warning in warnings:
        log.warning("%s", warning)
    attempt("the line at boot", "the server", lambda: guard.say_limits(STAYS if way is None else way.told))
    _guard, _by_server, _failed = guard, False, None
    return guard
