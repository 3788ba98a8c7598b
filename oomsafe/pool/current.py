"""This process's guard: the one that the server's adapter made after the fork, or one of the middleware's own."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from oomsafe.policy.settings import load_policy
from oomsafe.pool.guard import Guard
from oomsafe.pool.meter import log

_guard: Guard | None = None


def set_guard(guard: Guard) -> None:
    """From now on this process is guarded by `guard`."""
    global _guard
    _guard = guard


def get_guard() -> Guard | None:
    """This process's guard; None before there is one. One made before a fork is the parent's."""
    return _guard if _guard is not None and _guard.pid == os.getpid() else None


def guard_for(keywords: Mapping[str, Any], unit: str) -> Guard:
    """This process's guard. Where no adapter has made one, a pool of one that measures, with this policy.

    Raises ConfigError for keywords that can't be right.
    """
    guard = get_guard()
    if guard is None:
        policy, warnings = load_policy(os.environ, keywords)
        for warning in warnings:
            log.warning("%s", warning)
        guard = Guard(policy, unit=unit)
        set_guard(guard)
    elif ignored := sorted(set(keywords) - {"headers"}):
        guard.say_once("keywords", 30, "MemoryMiddleware(%s=...) is ignored here: the server's own policy holds", "=..., ".join(ignored))
    return guard
