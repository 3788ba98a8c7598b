"""This process's guard: the one that the server's adapter made after the fork, or one of the middleware's own."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

from oomsafe.policy.settings import Policy, load_policy
from oomsafe.pool.guard import Guard, Recycle
from oomsafe.pool.log import log

RecycleOf = Callable[[Policy], Recycle | None]

#: Under which a request carries its Work from one middleware to the next, so that it is counted once, and announced once.
KEY = "oomsafe.work"

_guard: Guard | None = None
_failed_in: int | None = None


def set_guard(guard: Guard) -> None:
    """From now on this process is guarded by `guard`."""
    global _guard
    _guard = guard


def get_guard() -> Guard | None:
    """This process's guard; None before there is one. One made before a fork is the parent's."""
    return _guard if _guard is not None and _guard.here else None


def guard_for(keywords: Mapping[str, Any], unit: str, recycle_of: RecycleOf | None = None) -> Guard | None:
    """This process's guard. Where no adapter has made one, a pool of one, with this policy.

    `recycle_of(policy)` tells how such a process can be recycled; None where it can't, and it only measures.
    None when even that failed, which is logged once: the work goes on unmeasured.
    """
    guard = get_guard()
    if guard is None:
        return _alone(keywords, unit, recycle_of)
    ignored = ", ".join(sorted(set(keywords) - {"headers"}))
    if ignored:
        guard.say_once("keywords", logging.WARNING, "MemoryMiddleware: %s ignored, for this process is guarded already", ignored)
    return guard


def _alone(keywords: Mapping[str, Any], unit: str, recycle_of: RecycleOf | None) -> Guard | None:
    global _failed_in
    if _failed_in == os.getpid():
        return None
    try:
        policy, warnings = load_policy(os.environ, keywords)
        # where its user says that something restarts this process, that need not be its parent
        parent = None if os.environ.get("OOMSAFE_SINGLE") == "exit" else os.getppid()
        guard = Guard(policy, recycle=recycle_of(policy) if recycle_of is not None else None, unit=unit, parent=parent)
    except Exception as error:
        _failed_in = os.getpid()
        log.error("no guard can be made, so nothing is measured: %r", error)
        return None
    for warning in warnings:
        log.warning("%s", warning)
    set_guard(guard)
    return guard
