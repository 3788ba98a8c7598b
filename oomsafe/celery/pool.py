"""Celery's prefork pool with guarded children: ``worker_pool = "oomsafe.celery.pool:TaskPool"``.

In MainProcess. The classes here override methods of billiard and Celery, and call a PoolGuard (pool_guard.py)."""

from __future__ import annotations

import logging
import os
from functools import partial
from typing import Any

import billiard.pool
from billiard.pool import Pool as BlockingPool
from celery import bootsteps
from celery.concurrency import prefork
from celery.concurrency.asynpool import AsynPool
from celery.worker.components import Pool

from oomsafe.celery.child import GuardedAsynWorker, GuardedBlockingWorker, drops_meta
from oomsafe.celery.installation import installed
from oomsafe.celery.notes import Notes
from oomsafe.celery.pool_guard import PoolGuard
from oomsafe.celery.redelivery import Redelivery
from oomsafe.celery.single_process import runs_in_one_process
from oomsafe.celery.task_limits import limits_of
from oomsafe.log import attempt, log, log_with
from oomsafe.policy.limits import resolve_limits
from oomsafe.policy.settings import Policy
from oomsafe.policy.text import printable
from oomsafe.supervisor.supervisor import Supervisor


class TimeoutHandler(billiard.pool.TimeoutHandler):  # type: ignore[misc]
    """billiard's, which ends a child by SIGTERM first and by SIGKILL soon after: by then the child may have ended its task's record."""

    def on_hard_timeout(self, job: Any) -> None:
        """The task has passed its time limit: note that in the process object of its child, which is about to be ended."""
        process, _ = self._process_by_pid(job._worker_pid)
        if process is not None and not job.ready():
            process._oomsafe_timed_out = job
        super().on_hard_timeout(job)


class GuardedPool:
    """What is overridden in both of billiard's pools. Each method does what billiard does, and calls the guard."""

    TimeoutHandler = TimeoutHandler
    _worker: Any
    _processes: int

    def __init__(self, *args: Any, oomsafe: PoolGuard, **options: Any) -> None:
        self._guard = oomsafe
        oomsafe.attach(self)  # before its children are started below
        # a job's number is its ticket on the scoreboard, where 0 means no work, so billiard's first number, 0, is skipped
        attempt("tickets", "Celery", lambda: next(billiard.pool.job_counter))
        super().__init__(*args, **options)

    @property
    def Worker(self) -> Any:  # noqa: N802  billiard's name
        """What billiard calls to create a child; it reads this attribute for each one."""
        return partial(self._worker, **self._guard.for_child())

    def _create_worker_process(self, i: int) -> Any:
        self._guard.reserve_seat()
        process = super()._create_worker_process(i)  # type: ignore[misc]
        self._guard.started(process)
        return process

    def grow(self, n: int = 1) -> Any:
        """Add children."""
        try:
            return super().grow(n)  # type: ignore[misc]
        finally:
            self._guard.resized(self._processes)

    def shrink(self, n: int = 1) -> Any:
        """Remove children. Raises ValueError if not enough children are idle; a busy child stays."""
        try:
            return super().shrink(n)  # type: ignore[misc]
        finally:
            self._guard.resized(self._processes)

    def apply_async(self, func: Any, args: Any = (), kwds: Any = None, **options: Any) -> Any:
        """Celery hands out a task; `args` are (name, id, the message's headers, ...). Raises TaskRevokedError if it has been given up."""
        request = self._guard.before_handing_out(options)
        ceiling, keywords = self._guard.limits_of(args)
        job = super().apply_async(func, args, {**(kwds or {}), **keywords}, **options)  # type: ignore[misc]
        if job is not None:
            self._guard.handed_out(job, args, request, ceiling)
        return job

    def on_job_ready(self, job: int, i: Any, obj: Any, fd: Any) -> None:
        """The child has sent what its task returned."""
        super().on_job_ready(job, i, obj, fd)  # type: ignore[misc]
        self._guard.ended(job)

    def _join_exited_workers(self, shutdown: bool = False) -> Any:
        self._guard.before_reaping()
        try:
            return super()._join_exited_workers(shutdown)  # type: ignore[misc]
        finally:
            self._guard.reaped()

    def process_flush_queues(self, worker: Any) -> None:
        """Called for each child that billiard has joined; when the connection is lost, Celery also calls it for living children."""
        super().process_flush_queues(worker)  # type: ignore[misc]
        self._guard.gone(worker)

    def on_job_process_lost(self, job: Any, pid: int, exitcode: int) -> None:
        """The child that had this task died."""
        if self._guard.died_inside(job, pid):
            self.mark_as_worker_lost(job, exitcode)
        else:
            super().on_job_process_lost(job, pid, exitcode)  # type: ignore[misc]

    def mark_as_worker_lost(self, job: Any, exitcode: int) -> None:
        """Set the task's result: ours if the cause of the death is known, else Celery's own."""
        if not self._guard.settles(job):
            super().mark_as_worker_lost(job, exitcode)  # type: ignore[misc]

    def flush(self) -> None:
        """The connection to the broker is lost."""
        self._guard.connection_lost()
        flush = getattr(super(), "flush", None)
        if flush is not None:
            flush()


class GuardedAsynPool(GuardedPool, AsynPool):  # type: ignore[misc]
    """For brokers with an event loop: Redis, RabbitMQ."""

    _worker = GuardedAsynWorker

    def _track_child_process(self, proc: Any, hub: Any) -> None:
        """Have the event loop notify us of the child's end. Called for each new child, and again for all of them after a lost connection.

        Celery watches a pipe that the kernel closes while the child is still ending (do_exit() in kernel/exit.c: exit_files(), then
        exit_notify()). Then Celery stops watching it, and if the child can't be waited for yet, only Celery's timer of 5 s starts a
        replacement. A pidfd is readable once the child can be waited for. Celery closes what stands in `_sentinel_poll`.
        """
        watched = getattr(proc, "_sentinel_poll", None) is not None  # since before the connection was lost
        pidfd = None if watched else attempt("the end of a child", "Celery", partial(pidfd_of, proc))
        if pidfd is not None:
            proc._sentinel_poll = pidfd
        super()._track_child_process(proc, hub)
        if pidfd is not None and pidfd not in hub.readers:  # this version of Celery watches something else
            os.close(pidfd)
            if proc._sentinel_poll == pidfd:
                proc._sentinel_poll = None


class GuardedBlockingPool(GuardedPool, BlockingPool):  # type: ignore[misc]
    """For brokers without one: the filesystem, SQS and so on."""

    _worker = GuardedBlockingWorker


def pidfd_of(process: Any) -> int | None:
    """A pidfd of a child that has not been waited for (pidfd_open(2), Linux 5.3); None if it has been, or if the kernel gives none."""
    if process.exitcode is not None:
        return None  # another process may have its pid
    try:
        return os.pidfd_open(process.pid)
    except (OSError, AttributeError):
        return None


class TaskPool(prefork.TaskPool):  # type: ignore[misc]
    """Celery's pool class, with oomsafe's pools. In MainProcess."""

    options: dict[str, Any]
    Pool = GuardedAsynPool
    BlockingPool = GuardedBlockingPool
    guard: PoolGuard | None = None
    """None until the pool is started."""

    def on_start(self) -> None:
        """Called before the first child is started."""
        log_with(logging.getLogger("celery"))
        found = installed(self.app)
        for warning in found.warnings:
            log.warning("%s", warning)
        limit = self.app.conf.worker_max_memory_per_child if self.app else None
        if limit:
            log.warning("worker_max_memory_per_child=%s is left alone: it compares a peak that never falls; soft_limit does not", limit)
        if self.app and self.app.conf.result_extended:
            attempt("the result backend", "Celery", self._say_dropped)
        self.guard = self._made_guard(found.policy)
        self.options = {**self.options, "oomsafe": self.guard}
        super().on_start()

    def _say_dropped(self) -> None:
        backend = self.app.backend
        if drops_meta(backend):
            log.warning(
                "result_extended is on, and results have no memory figures all the same: %s.%s does not store what is added to a result",
                type(backend).__module__, type(backend).__qualname__,
            )  # fmt: skip

    def _made_guard(self, policy: Policy) -> PoolGuard:
        """Raises ImproperlyConfigured for an invalid limit of a task."""
        # the arguments of a child's initializer are the app and the node's hostname
        name = next((given for given in self.options.get("initargs", ())[1:2] if isinstance(given, str)), "")
        supervisor = Supervisor(policy, "celery prefork", self.limit, forks=self.forking_enable, name=name)
        if supervisor.board is None:
            log.error("without a scoreboard this node has no memory limits of tasks, no budget, no worker-memory events, no inspect memory")
        try:
            redelivery, capacity = self._redelivery(policy), supervisor.capacity
            return PoolGuard(supervisor, limits_of(self.app, policy, capacity, resolve_limits(policy, capacity)[0]), redelivery)
        except Exception:
            supervisor.close()
            raise

    def _redelivery(self, policy: Policy) -> Redelivery:
        def notes() -> Notes:
            return Notes(self.app.backend if self.app else None, os.getpid())

        notes().sweep()
        # if the kind is not known, the notes are read for each acks_late message
        driver = attempt("the broker's kind", "Celery", lambda: str(self.app.connection_for_read().transport.driver_type)) or ""
        return Redelivery(notes, policy.max_oom_redeliveries, driver, policy.dry_run)

    def on_stop(self) -> None:
        """Called at a shutdown. A warm one waits here for running tasks, a cold one for the children that it has signalled."""
        runs = self._pool is not None
        if self.guard is not None and runs:
            self.guard.begin_to_end()
        super().on_stop()
        if self.guard is not None and runs:
            self.guard.end()
        self._close()

    def on_terminate(self) -> None:
        """Called at a shutdown that waits for nothing."""
        if self.guard is not None and self._pool is not None:
            self.guard.begin_to_end()
            self.guard.end()
        super().on_terminate()
        self._close()

    def _close(self) -> None:
        if self.guard is not None:
            self.guard.supervisor.close()


class PoolChoice(bootsteps.StartStopStep):  # type: ignore[misc]
    """A bootstep of each node: replaces the prefork pool, by whatever name it was selected, and warns about a pool that nothing guards.

    The pool is not known any earlier, because the command line, a keyword of app.Worker() and the conf may all select it.
    """

    name = "oomsafe.PoolChoice"
    requires = (Pool,)  # so that it is created before the pool, which is created after all steps

    def __init__(self, worker: Any, **options: Any) -> None:
        super().__init__(worker, **options)
        if worker.pool_cls is prefork.TaskPool:
            worker.pool_cls = TaskPool

    def start(self, worker: Any) -> None:
        """Called once, when the node starts: logs a warning if the pool is not guarded."""
        if not isinstance(worker.pool, TaskPool) and not runs_in_one_process(worker.pool):
            kind = type(worker.pool)
            log.warning(
                "oomsafe does not guard this node: its pool is %s, so no child is recycled, and memory limits of tasks are off; "
                "use -P prefork, or derive that pool from oomsafe.celery.pool:TaskPool",
                printable(f"{kind.__module__}:{kind.__qualname__}"),
            )
