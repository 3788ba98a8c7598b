"""Celery: where the app is made, ``oomsafe.celery.install(app, soft_limit="300MiB")``.

Or by hand, with Celery's own signal, for what one child can do by itself::

celery.signals.worker_process_init.connect(oomsafe.celery.worker_process_init)
"""

from __future__ import annotations

from oomsafe.celery.installation import install, worker_process_init

__all__ = ["install", "worker_process_init"]
