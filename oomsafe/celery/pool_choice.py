"""A step of each node: whatever the prefork pool was asked for by is our pool, and any other pool that nothing guards is named."""

from __future__ import annotations

from typing import Any

from celery import bootsteps
from celery.concurrency import prefork
from celery.worker.components import Pool

from oomsafe.celery.pool import TaskPool
from oomsafe.celery.single import runs_in_one_process
from oomsafe.log import log
from oomsafe.policy.text import printable


class PoolChoice(bootsteps.StartStopStep):  # type: ignore[misc]
    """Which pool it is is known no sooner: the command line, a keyword of app.Worker() and the conf have their say."""

    name = "oomsafe.PoolChoice"
    requires = (Pool,)  # so it is created before its pool is, which is when all steps are there

    def __init__(self, worker: Any, **options: Any) -> None:
        super().__init__(worker, **options)
        if worker.pool_cls is prefork.TaskPool:
            worker.pool_cls = TaskPool

    def start(self, worker: Any) -> None:
        """Once, when the node starts, and logs."""
        if not isinstance(worker.pool, TaskPool) and not runs_in_one_process(worker.pool):
            kind = type(worker.pool)
            log.warning(
                "oomsafe does not guard this node: its pool is %s, so no child is recycled, and memory limits of tasks are off; "
                "use -P prefork, or derive that pool from oomsafe.celery.pool:TaskPool",
                printable(f"{kind.__module__}:{kind.__qualname__}"),
            )
