"""install(): a Celery app whose prefork pool is ours. Also imported by those who only send tasks, so it costs them nothing."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from celery.exceptions import ImproperlyConfigured

from oomsafe.errors import ConfigError
from oomsafe.policy.settings import Policy, load_policy, misplaced
from oomsafe.pool.log import log

POOL = "oomsafe.celery.pool:TaskPool"

#: By name: those who only send tasks don't import it.
STEPS = ("oomsafe.celery.node:Node", "oomsafe.celery.single:Single")

#: What Celery calls its own process pool.
PREFORK = ("prefork", "processes", "celery.concurrency.prefork:TaskPool")

#: How one gives a setting.
INSTEAD = "write oomsafe.celery.install(app, {field}=...), or set {variable} in the environment"


@dataclass(frozen=True)
class Installed:
    """What install() has left with the app."""

    policy: Policy
    warnings: tuple[str, ...]
    keywords: Mapping[str, Any]


def install(app: Any, **policy: Any) -> None:
    """Guard the children of `app`'s workers. Keywords are those of Policy.

    Raises Celery's ImproperlyConfigured, in one line, for a setting that can't be right. A pool of another
    kind (threads, gevent, solo) is measured, and left as it is.
    """
    try:
        checked, warnings = load_policy(os.environ, policy)
    except ConfigError as error:
        raise ImproperlyConfigured(f"oomsafe: {error}") from None
    import oomsafe.celery.remote  # noqa: F401  its commands are there for the node and for those who ask it

    app.oomsafe = Installed(checked, tuple(warnings), policy)
    app.steps["consumer"].update(STEPS)
    if app.conf.worker_pool in PREFORK:
        app.conf.worker_pool = POOL


def installed(app: Any) -> Installed:
    """What install()'s keywords make with the environment as it is now, when the node starts: the app may have set variables since.

    Without install() that of the environment alone. Raises ImproperlyConfigured.
    """
    found = getattr(app, "oomsafe", None)
    keywords = found.keywords if isinstance(found, Installed) else {}
    try:
        policy, warnings = load_policy(os.environ, keywords)
    except ConfigError as error:
        raise ImproperlyConfigured(f"oomsafe: {error}") from None
    ours = misplaced(app.conf if app is not None else (), "Celery's configuration", INSTEAD)
    return Installed(policy, (*warnings, *ours), keywords)


def worker_process_init(**_: Any) -> None:
    """For ``worker_process_init.connect``: this child's score is raised, and its memory measured.

    It can't be recycled from here, nor is it seen by a pool: that takes install(). Never raises.
    """
    try:
        from oomsafe.pool.current import guard_for
        from oomsafe.pool.seat import raise_own_score

        policy, _warnings = load_policy(os.environ, {})
        raise_own_score(policy)
        if guard_for({}, "tasks") is not None:
            log.info("oomsafe measures this child; to have it recycled, call oomsafe.celery.install(app)")
    except Exception as error:
        log.log(logging.ERROR, "oomsafe failed in worker_process_init (Celery goes on): %r", error)
