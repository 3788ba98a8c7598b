"""This process's guard: created by the server's adapter after the fork, or by the middleware itself."""

from __future__ import annotations

import logging
import os
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from oomsafe.log import attempt, log, once, say_off
from oomsafe.policy.settings import Policy, is_off, load_policy
from oomsafe.policy.units import refused
from oomsafe.worker.guard import Guard, Recycle

if TYPE_CHECKING:
    from oomsafe.scoreboard.own_board import OwnBoard
    from oomsafe.worker.siblings import Siblings


class Way(NamedTuple):
    """How to recycle a process that no server's adapter guards."""

    recycle: Recycle
    workers: int = 1
    """How many such processes its parent wants, including this one: they take turns."""

    @property
    def said(self) -> str:
        """For the log: what happens to such a process above its soft limit."""
        if self.workers > 1:
            return "it ends, one worker after the other, and its parent starts another"
        return "it ends, and something else must restart it (OOMSAFE_SINGLE=exit)"


RecycleOf = Callable[[Policy], Way | None]

#: Seconds until the next attempt after a guard could not be created: 0 first, then FIRST_PAUSE, then doubled up to LONGEST_PAUSE.
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0

#: For the log: what happens above its soft limit to a process that is not recycled.
STAYS = "it logs a warning, because nothing here would start another (if something does under uvicorn, set OOMSAFE_SINGLE=exit)"


class Routed(Protocol):
    """An adapter's object that knows which code serves which route."""

    def called(self) -> Iterable[tuple[Any, str]]:
        """(function or class, route): what is called for each route that it knows."""


_routed: weakref.WeakSet[Routed] = weakref.WeakSet()

_guard: Guard | None = None
_by_server = False
"""Whether a server's adapter has created it."""
_failed: _Failed | None = None


class _Failed(NamedTuple):
    """The last failed attempt to create a guard in this process."""

    pid: int
    until: float
    """Monotonic time of the next attempt."""
    pause: float
    """Seconds from the failure to the next attempt."""


def knows_routes(one: Routed) -> None:
    """`one` is asked, when a worker was probed, which code serves which route; for as long as it lives."""
    _routed.add(one)


def called_by_routes() -> list[tuple[Any, str]]:
    """(function or class, route), from all of knows_routes()."""
    found: list[tuple[Any, str]] = []
    for one in list(_routed):
        found += attempt("the endpoints of routes", "the server", lambda one=one: list(one.called())) or []  # type: ignore[misc]
    return found


def set_guard(guard: Guard) -> None:
    """Set this process's guard. Called by a server's adapter."""
    global _guard, _by_server
    _guard, _by_server = guard, True


def get_guard() -> Guard | None:
    """This process's guard; None before there is one. A guard created before a fork belongs to the parent."""
    return _guard if _guard is not None and _guard.here else None


def probe(requests: int = 2000, seconds: float = 60.0) -> bool:
    """Trace this worker's allocations for so many requests or tasks, and so many seconds at most, and log which lines of code keep memory.

    For code that runs in a worker; `oomsafe probe` does the same from outside. It begins within about two seconds, and slows the process
    down until it ends; a worker that has a supervisor is replaced then. Returns False if nothing begins: this process is not guarded (yet),
    or is traced already. Raises ConfigError if a figure is out of range.
    """
    from oomsafe.policy.probe import MOST_SECONDS, MOST_WORK

    if type(requests) is not int or not 1 <= requests <= MOST_WORK:
        raise refused("requests", requests, f"is not a number from 1 to {MOST_WORK}", "2000")
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 < seconds <= MOST_SECONDS:
        raise refused("seconds", seconds, f"is not above 0 and at most {MOST_SECONDS:.0f}", "60")
    guard = get_guard()
    return guard is not None and guard.probe(requests, float(seconds))


def own_guard() -> Guard | None:
    """This process's guard if no server's adapter has created it, so that no adapter calls its tick(); else None."""
    return None if _by_server else get_guard()


def guard_for(
    keywords: Mapping[str, Any], unit: str, recycle_of: RecycleOf | None = None, name_of: Callable[[], str] | None = None
) -> Guard | None:
    """This process's guard. If no adapter has created one, it is created here, as a pool of one with this policy.

    `recycle_of(policy)` returns how such a process can be recycled; None: it can't, and only measures.
    `name_of()` returns what it is called unless the policy says so; None: nothing.
    Returns None if the creation failed, which is logged once: the work goes on unmeasured, and the next attempt comes later.
    Returns None also in a fork of a server's worker, which is not a worker, and if oomsafe is off.
    """
    guard = get_guard()
    if guard is None and is_off(os.environ):
        say_off()
        return None
    if guard is None:
        return None if _by_server and _guard is not None else _alone(keywords, unit, recycle_of, name_of)
    ignored = ", ".join(sorted(set(keywords) - {"headers"}))
    if ignored:
        once("keywords", logging.WARNING, "MemoryMiddleware: %s ignored, because this process is guarded already", ignored)
    return guard


def warn_of_metrics(policy: Policy) -> None:
    """Log that `metrics` does nothing in a process that has no supervisor of oomsafe's."""
    if policy.metrics is not None:
        log.warning(
            "metrics=%s does nothing in a process without a supervisor of oomsafe's: "
            "mount oomsafe.metrics.prometheus.metrics_app in the app", policy.metrics,
        )  # fmt: skip


def _siblings(workers: int) -> Siblings | None:
    if workers < 2:
        return None
    from oomsafe.worker.siblings import Siblings  # imported here, because most workers have a scoreboard

    return Siblings(workers)


def _advice(error: Exception) -> str:
    """What the user can do about a failure, for the log; empty if that is not known."""
    if type(error).__module__.partition(".")[0] == "blockbuster":
        return (
            " (a detector of blocking calls keeps an event loop from reading files, which a guard must do: "
            "use it only in tests, or exempt oomsafe)"
        )
    return ""


def _own_board(policy: Policy, name_of: Callable[[], str] | None) -> OwnBoard | None:
    """For `oomsafe status`. None in a fork of a guarded process, of which there may be one for each request."""
    if _guard is not None:
        return None
    from oomsafe.scoreboard.own_board import OwnBoard  # imported here, because most workers have a supervisor

    return OwnBoard.create(policy.name or (name_of() if name_of is not None else ""))


def _alone(keywords: Mapping[str, Any], unit: str, recycle_of: RecycleOf | None, name_of: Callable[[], str] | None) -> Guard | None:
    global _guard, _by_server, _failed
    before = _failed if _failed is not None and _failed.pid == os.getpid() else None
    if before is not None and time.monotonic() < before.until:
        return None
    try:
        policy, warnings = load_policy(os.environ, keywords)
        # with OOMSAFE_SINGLE=exit something restarts this process, which need not be its parent
        parent = None if os.environ.get("OOMSAFE_SINGLE") == "exit" else os.getppid()
        way = recycle_of(policy) if recycle_of is not None else None
        recycle, siblings = (None, None) if way is None else (way.recycle, _siblings(way.workers))
        guard = Guard(policy, recycle=recycle, unit=unit, parent=parent, siblings=siblings, own_board=_own_board(policy, name_of))
    except Exception as error:
        if before is None:
            log.error(
                "no guard can be created, so nothing is measured until one can: %r%s; attempts continue, at most %.0f s apart",
                error, _advice(error), LONGEST_PAUSE,
            )  # fmt: skip
        pause = 0.0 if before is None else min(LONGEST_PAUSE, max(FIRST_PAUSE, 2 * before.pause))
        _failed = _Failed(os.getpid(), time.monotonic() + pause, pause)
        return None
    if before is not None:
        log.warning("a guard has been created now: from here on this process is measured")
    for warning in warnings:
        log.warning("%s", warning)
    warn_of_metrics(policy)
    attempt("the line at boot", "the server", lambda: guard.say_limits(STAYS if way is None else way.said))
    _guard, _by_server, _failed = guard, False, None
    return guard
