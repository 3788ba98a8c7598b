"""install(): a Celery app whose nodes are guarded. Those who only send tasks import it too, so it loads nothing of a node."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from celery.exceptions import ImproperlyConfigured

from oomsafe.errors import ConfigError
from oomsafe.log import log, say_off
from oomsafe.policy.settings import Policy, is_off, load_policy, misplaced

#: Of a node, and of its consumer; by name: those who only send tasks don't import them.
WORKER_STEP = "oomsafe.celery.pool:PoolChoice"
CONSUMER_STEPS = ("oomsafe.celery.consumer:Node", "oomsafe.celery.single_process:Single")

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

    It may be called before `app` is configured, or after: the conf is not read here. A pool of another kind (threads, gevent,
    solo) is measured, and left as it is. Raises Celery's ImproperlyConfigured, in one line, for a setting that can't be right.
    OOMSAFE_DISABLE turns it off.
    """
    if is_off(os.environ):
        say_off()
        return
    try:
        checked, warnings = load_policy(os.environ, policy)
    except ConfigError as error:
        raise ImproperlyConfigured(f"oomsafe: {error}") from None
    import oomsafe.celery.remote  # noqa: F401  its commands are there for the node and for those who ask it

    app.oomsafe = Installed(checked, tuple(warnings), policy)
    # not by app.conf.worker_pool: to look there would load a configuration that is not there yet, which would then replace what is set here
    app.steps["worker"].add(WORKER_STEP)
    app.steps["consumer"].update(CONSUMER_STEPS)


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
    """For ``worker_process_init.connect``: this child's score is raised, it is measured, and recycled between two tasks.

    The policy is that of the environment. What MainProcess has to do, tasks' own limits among it, takes install(). Never raises.
    """
    if is_off(os.environ):
        return
    try:
        from oomsafe.celery.stock_child import guard_child  # here: who only sends tasks needs none of it

        guard_child()
    except Exception as error:
        log.log(logging.ERROR, "oomsafe failed in worker_process_init (Celery goes on): %r", error)
