"""Celery: where the app is made, ``oomsafe.celery.install(app, soft_limit="300MiB")``.

Or by hand, with Celery's own signal, for what one child can do by itself::

celery.signals.worker_process_init.connect(oomsafe.celery.worker_process_init)
"""

from __future__ import annotations

from oomsafe.celery.errors import WorkerOutOfMemory
from oomsafe.celery.installation import install, worker_process_init
from oomsafe.errors import MemoryLimitExceeded, SoftMemoryLimitExceeded

__all__ = ["MemoryLimitExceeded", "SoftMemoryLimitExceeded", "WorkerOutOfMemory", "install", "worker_process_init"]
