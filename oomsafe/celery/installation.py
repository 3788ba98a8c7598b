"""install(): guard the nodes of a Celery app. Processes that only send tasks import this too, so it loads none of a node's modules."""

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

#: The bootsteps of a node and of its consumer, by name, so that processes that only send tasks don't import them.
WORKER_STEP = "oomsafe.celery.pool:PoolChoice"
CONSUMER_STEPS = ("oomsafe.celery.consumer:Node", "oomsafe.celery.single_process:Single")

#: How to give a setting instead.
INSTEAD = "write oomsafe.celery.install(app, {field}=...), or set {variable} in the environment"


@dataclass(frozen=True)
class Installed:
    """What install() has stored in the app."""

    policy: Policy
    warnings: tuple[str, ...]
    keywords: Mapping[str, Any]


def install(app: Any, **policy: Any) -> None:
    """Guard the children of `app`'s workers. Keywords are those of Policy.

    It may be called before or after `app` is configured, because the conf is not read here. A pool of another kind (threads, gevent,
    solo) stays as it is and is measured. Raises Celery's ImproperlyConfigured, in one line, for an invalid setting.
    OOMSAFE_DISABLE turns it off.
    """
    if is_off(os.environ):
        say_off()
        return
    try:
        checked, warnings = load_policy(os.environ, policy)
    except ConfigError as error:
        raise ImproperlyConfigured(f"oomsafe: {error}") from None
    import oomsafe.celery.remote  # noqa: F401  registers its commands, for the node and for the command line

    app.oomsafe = Installed(checked, tuple(warnings), policy)
    # not app.conf.worker_pool: access would load a configuration that may not be there yet, and loading it later would replace this setting
    app.steps["worker"].add(WORKER_STEP)
    app.steps["consumer"].update(CONSUMER_STEPS)


def installed(app: Any) -> Installed:
    """The policy from install()'s keywords and the environment as it is now, at the node's start: the app may have set variables since.

    Without install(), the policy from the environment only. Raises ImproperlyConfigured.
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
    """For ``worker_process_init.connect``: raise this child's score, measure it, and recycle it between two tasks.

    The policy comes from the environment. Everything that MainProcess must do, such as limits of tasks, requires install(). Never raises.
    """
    if is_off(os.environ):
        return
    try:
        from oomsafe.celery.stock_child import guard_child  # imported here, because a process that only sends tasks needs none of it

        guard_child()
    except Exception as error:
        log.log(logging.ERROR, "oomsafe failed in worker_process_init (Celery goes on): %r", error)
