"""Celery: where the app is made, ``oomsafe.celery.install(app, soft_limit="300MiB")``.

Or by hand, with Celery's own signal, for what one child can do by itself::

celery.signals.worker_process_init.connect(oomsafe.celery.worker_process_init)

Begin with installation.py. In MainProcess run pool.py (the children), node.py and intake.py (the budget), pool_guard.py,
redelivery.py, poison.py, noting.py, apart.py and given_up.py (what becomes of a task whose child was killed), pool_choice.py, remote.py
and telling.py. In a child: child.py, task_loop.py; stock_child.py where MainProcess knows nothing of us. In a node
of one process: single.py and solo.py. It may import supervisor, worker and what is below.
"""

from __future__ import annotations

from oomsafe.celery.errors import WorkerOutOfMemory
from oomsafe.celery.installation import install, worker_process_init
from oomsafe.errors import MemoryLimitExceeded, SoftMemoryLimitExceeded

__all__ = ["MemoryLimitExceeded", "SoftMemoryLimitExceeded", "WorkerOutOfMemory", "install", "worker_process_init"]
