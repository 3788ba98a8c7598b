"""Celery: where the app is made, ``oomsafe.celery.install(app, soft_limit="300MiB")``.

Or by hand, with Celery's own signal; then each child does only what it can do by itself::

celery.signals.worker_process_init.connect(oomsafe.celery.worker_process_init)

Begin reading with installation.py, which runs where the app is made (launch.py: where `oomsafe run` starts a node).

- In MainProcess: pool.py overrides billiard's methods, and calls pool_guard.py (children, their deaths, what happens to their
  tasks). consumer.py has the node's budget and its intake, redelivery.py decides which tasks may be redelivered, and remote.py has the
  commands for `celery inspect` and `celery control`.
- In a child: child.py, task_loop.py around each task, and task_memory.py for its memory limit; stock_child.py if install() was
  not called in MainProcess.
- In a node of one process (threads, gevent, eventlet, solo): single_process.py.
- In several of these: task_limits.py and notes.py in MainProcess and in processes that run tasks, errors.py in all.

This package may import supervisor, worker and what is below them.
"""

from __future__ import annotations

from oomsafe.celery.errors import WorkerOutOfMemory
from oomsafe.celery.installation import install, worker_process_init
from oomsafe.errors import MemoryLimitExceeded, SoftMemoryLimitExceeded

__all__ = ["MemoryLimitExceeded", "SoftMemoryLimitExceeded", "WorkerOutOfMemory", "install", "worker_process_init"]
