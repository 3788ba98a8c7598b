"""Celery: where the app is made, ``oomsafe.celery.install(app, soft_limit="300MiB")``.

Or by hand, with Celery's own signal, for what one child can do by itself::

celery.signals.worker_process_init.connect(oomsafe.celery.worker_process_init)

Begin with installation.py, which runs where the app is made (launch.py: where `oomsafe run` starts a node).

- In MainProcess: pool.py overrides billiard's methods, which hand over to pool_guard.py (children, their deaths, what becomes of their
  tasks). consumer.py has the node's budget and its intake, redelivery.py which tasks may come again, remote.py what others may ask.
- In a child: child.py, and task_loop.py around each task; stock_child.py where MainProcess knows nothing of us.
- In a node of one process (threads, gevent, eventlet, solo): single_process.py.
- In more than one: task_limits.py and notes.py in MainProcess and where tasks run, errors.py everywhere.

It may import supervisor, worker and what is below.
"""

from __future__ import annotations

from oomsafe.celery.errors import WorkerOutOfMemory
from oomsafe.celery.installation import install, worker_process_init
from oomsafe.errors import MemoryLimitExceeded, SoftMemoryLimitExceeded

__all__ = ["MemoryLimitExceeded", "SoftMemoryLimitExceeded", "WorkerOutOfMemory", "install", "worker_process_init"]
