"""A child of stock Celery's prefork pool, where install() was not called: what the child can do by itself."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from typing import Any

from billiard.pool import Worker
from billiard.process import current_process

from oomsafe.celery.child import GuardedWorker
from oomsafe.celery.task_loop import TaskLoop, nothing
from oomsafe.kernel.capacity import read_capacity
from oomsafe.kernel.process import rss_of, sizes_of
from oomsafe.log import log
from oomsafe.policy.boot_line import dry, lifetime_in_force
from oomsafe.policy.settings import Policy, load_policy
from oomsafe.policy.units import format_size
from oomsafe.policy.victims import auto_raise
from oomsafe.scoreboard.seat import enlist
from oomsafe.worker.current import set_guard
from oomsafe.worker.guard import Guard
from oomsafe.worker.siblings import Siblings

#: The key under which the children of a node log their boot line only once.
SAID = b"celery"


def guard_child() -> None:
    """Called by Celery before billiard's loop begins: from its first idle moment on, this child is measured and recycled.

    A pool whose tasks run in this process has no such loop: there, only the score is raised. Raises ConfigError.
    """
    worker = getattr(current_process(), "_target", None)
    if isinstance(worker, GuardedWorker):
        return  # install() guards this child already
    policy, warnings = load_policy(os.environ, {})
    # no supervisor of ours sets the difference, so it is computed here: it must put this child above its parent
    capacity, wanted = read_capacity(supervisor_rss=rss_of(os.getppid())), policy.worker_oom_score_adj
    enlist(policy, os.getppid(), auto_raise(capacity.supervisor_rss, capacity.effective) if wanted == "auto" else wanted, None)
    if not isinstance(worker, Worker):
        log.warning("worker_process_init guards children of the prefork pool; here nothing is measured: call oomsafe.celery.install(app)")
        return
    loop = TaskLoop(None, lambda: _begins(loop, policy, warnings))
    loop.run_in(worker)


def _begins(loop: TaskLoop, policy: Policy, warnings: Any) -> None:
    """The child waits for its first task: what it holds now is its baseline."""
    siblings = Siblings(None)
    parent = os.getppid()
    rss, held = sizes_of(parent) or (None, None)
    capacity = replace(read_capacity(supervisor_rss=rss, workers=siblings.counted or 1), supervisor_held=held)
    # nothing needs to be called when the child should end, because it checks that before each task
    make = partial(Guard, policy, recycle=nothing, unit="tasks", capacity=capacity, parent=parent, siblings=siblings)
    loop.guard = guard = make()
    set_guard(guard)
    if siblings.first_to_say(SAID):
        for warning in warnings:
            log.warning("%s", warning)
        log.info(
            "oomsafe guards each child by itself: soft limit %s%s, recycled between two tasks%s. Limits of tasks, the verdict on a death, "
            "the end of poison loops, a budget, metrics and inspect memory take MainProcess: call oomsafe.celery.install(app)",
            format_size(guard.limits.soft), lifetime_in_force(guard.limits), dry(policy),
        )  # fmt: skip
