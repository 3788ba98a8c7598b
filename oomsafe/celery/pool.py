"""Celery's prefork pool, its children in a pool of ours: ``worker_pool = "oomsafe.celery.pool:TaskPool"``."""

from __future__ import annotations

import logging
import os
from functools import partial
from typing import Any

from billiard.pool import Pool as BlockingPool
from celery.concurrency import prefork
from celery.concurrency.asynpool import AsynPool

from oomsafe.celery.child import GuardedAsynWorker, GuardedBlockingWorker
from oomsafe.celery.deaths import Enforcing
from oomsafe.celery.installation import installed
from oomsafe.celery.limits import limits_of
from oomsafe.celery.poison import Poison
from oomsafe.celery.redelivery import Redelivery
from oomsafe.log import attempt, log, log_with
from oomsafe.policy.limits import Capacity, Limits, resolve_limits
from oomsafe.policy.settings import Policy
from oomsafe.scoreboard.seat import Seat
from oomsafe.supervisor.deaths import Deaths
from oomsafe.supervisor.supervisor import Supervisor


class Seating(Enforcing):
    """What both of Celery's pools have in common here: each child gets a seat, and gives it back when it is gone."""

    _worker: Any
    _processes: int

    def __init__(self, *args: Any, oomsafe: Supervisor, **options: Any) -> None:
        self._seat: Seat | None = None
        self._seats: dict[int, Seat] = {}
        super().__init__(*args, oomsafe=oomsafe, **options)

    @property
    def Worker(self) -> Any:  # noqa: N802  billiard's name
        """What billiard makes a child of: it looks this up for each."""
        lasting = self._redelivery.says_so and self._watcher is not None
        return partial(self._worker, seat=self._seat, notes_first=not lasting)

    def grow(self, n: int = 1) -> Any:
        """By `worker --autoscale` or `control pool_grow`: from now on each child has a smaller share, those that are there too."""
        try:
            return super().grow(n)  # type: ignore[misc]
        finally:
            self._resized()

    def shrink(self, n: int = 1) -> Any:
        """The reverse; what can't be spared stays, and then this raises ValueError."""
        try:
            return super().shrink(n)  # type: ignore[misc]
        finally:
            self._resized()

    def _resized(self) -> None:
        attempt("the pool's size", "Celery", lambda: self._supervisor.change(self._processes))

    def _create_worker_process(self, i: int) -> Any:
        self._seat = attempt("seat", "Celery", lambda: self._supervisor.seat(self._supervisor.reserve()))
        process = super()._create_worker_process(i)  # type: ignore[misc]
        if self._seat is not None:
            self._seats[process.pid] = self._seat
            self._supervisor.born_seat(self._seat.number, self._seat.generation, process.pid)
        return process

    def process_flush_queues(self, worker: Any) -> None:
        """For each child that billiard has joined, and by Celery for the same child once more: it has died but once."""
        super().process_flush_queues(worker)  # type: ignore[misc]
        if worker.exitcode is None or getattr(worker, "oomsafe_gone", False):
            return
        worker.oomsafe_gone = True
        seat = self._seats.pop(worker.pid, None)
        attempt("the death of a child", "Celery", lambda: self.gone(worker, seat))
        if seat is not None:
            attempt("release", "Celery", lambda: self._supervisor.release_seat(seat.number, seat.generation))


class GuardedAsynPool(Seating, AsynPool):  # type: ignore[misc]
    """For brokers with an event loop: Redis, RabbitMQ."""

    _worker = GuardedAsynWorker


class GuardedBlockingPool(Seating, BlockingPool):  # type: ignore[misc]
    """For the others: the filesystem, SQS and so on."""

    _worker = GuardedBlockingWorker


class TaskPool(prefork.TaskPool):  # type: ignore[misc]
    """Celery's, in MainProcess."""

    options: dict[str, Any]
    Pool = GuardedAsynPool
    BlockingPool = GuardedBlockingPool

    def on_start(self) -> None:
        """Before the first child."""
        log_with(logging.getLogger("celery"))
        found = installed(self.app)
        for warning in found.warnings:
            log.warning("%s", warning)
        limit = self.app.conf.worker_max_memory_per_child if self.app else None
        if limit:
            log.warning("worker_max_memory_per_child=%s is left alone: it compares a peak that never falls; soft_limit does not", limit)
        self.supervisor = Supervisor(found.policy, "celery prefork", self.limit, forks=self.forking_enable)
        if self.supervisor.board is None:
            log.error("without a scoreboard this node has no memory limits of tasks, no budget, no worker-memory events, no inspect memory")
        capacity = self.supervisor.capacity
        self.redelivery = self._redelivery(found.policy)
        self.options = {
            **self.options,
            "oomsafe": self.supervisor,
            "limits": limits_of(self.app, found.policy, capacity, resolve_limits(found.policy, capacity)[0]),
            "redelivery": self.redelivery,
        }
        super().on_start()

    def follow(self, capacity: Capacity, limits: Limits) -> None:
        """What the kernel allows may have moved."""
        self.options["limits"].follow(capacity, limits)

    @property
    def deaths(self) -> Deaths | None:
        """Of its children; None while there is no pool of ours."""
        found = getattr(self._pool, "deaths", None)
        return found if isinstance(found, Deaths) else None

    def look_for_others(self) -> None:
        """About once a second: has the kernel killed what is no child?"""
        if self._pool is not None:
            self._pool.look_for_others()

    def _redelivery(self, policy: Policy) -> Redelivery:
        def poison() -> Poison:
            return Poison(self.app.backend if self.app else None, os.getpid())

        poison().sweep()
        # not known: each late message is looked up
        driver = attempt("the broker's kind", "Celery", lambda: str(self.app.connection_for_read().transport.driver_type)) or ""
        return Redelivery(poison, policy.max_oom_redeliveries, driver, policy.dry_run)

    def on_stop(self) -> None:
        """A shutdown: a warm one waits here for what runs, a cold one for what it has signalled."""
        pool = self._pool
        if pool is not None:
            pool.begin_to_end()
        super().on_stop()
        if pool is not None:
            pool.end_watch()
        self.supervisor.close()

    def on_terminate(self) -> None:
        """One that waits for nothing."""
        if self._pool is not None:
            self._pool.begin_to_end()
            self._pool.end_watch()
        super().on_terminate()
        self.supervisor.close()
