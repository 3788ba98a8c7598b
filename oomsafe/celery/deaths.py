"""What becomes of a task whose child is gone: stopped at its limit, killed by the kernel, or Celery's own WorkerLostError."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

from celery.exceptions import TaskRevokedError

from oomsafe.celery.errors import WorkerOutOfMemory, info_of
from oomsafe.celery.limits import TaskLimits, task_of
from oomsafe.celery.redelivery import Redelivery, request_of
from oomsafe.errors import MemoryLimitExceeded
from oomsafe.log import attempt, failed, log
from oomsafe.policy.text import printable
from oomsafe.policy.units import format_size
from oomsafe.policy.verdicts import Verdict
from oomsafe.scoreboard.seat import Seat
from oomsafe.supervisor.deaths import Deaths
from oomsafe.supervisor.supervisor import Supervisor
from oomsafe.supervisor.watcher import Watcher, WatcherThread

#: Of so many tasks it is told that they ran when the kernel killed something else.
NAMED = 3


class Enforcing:
    """What both of Celery's pools have in common here, in MainProcess: what each task may take, and what became of it."""

    _cache: dict[int, Any]
    _pool: list[Any]

    def __init__(self, *args: Any, oomsafe: Supervisor, limits: TaskLimits, redelivery: Redelivery, **options: Any) -> None:
        self._supervisor = oomsafe
        self._redelivery = redelivery
        self._limits = limits
        self._ran: set[str] = set()
        self._then: set[str] = set()
        self._watcher: Watcher | None = None
        self._watching: WatcherThread | None = None
        if oomsafe.board is not None:
            dry = oomsafe.policy.dry_run
            self._watcher = Watcher(
                oomsafe.board, lambda: bool(self._cache), lambda ticket: ticket - 1 in self._cache, redelivery.lasting, dry
            )
            self._watching = WatcherThread(self._watcher)
        self.deaths = Deaths(oomsafe.board, lambda: oomsafe.capacity, self._watcher)
        super().__init__(*args, **options)

    def apply_async(self, func: Any, args: Any = (), kwds: Any = None, **options: Any) -> Any:
        """Celery hands out a task: (name, id, the message's headers, ...)."""
        request = request_of(options)
        late = request is not None and request.task.acks_late
        if self._redelivery.says_alone and self._cache:
            attempt("poison", "Celery", self._redelivery.joined)
        if late and attempt("poison", "Celery", lambda: self._redelivery.is_refused(request)):
            raise TaskRevokedError(request.id)  # what Celery expects of a task that is not to run
        result = super().apply_async(func, args, kwds or {}, **options)  # type: ignore[misc]
        if result is not None:
            try:
                self._watch(result, args, request, late)
            except Exception as error:
                failed("limits", "Celery", error)
        return result

    def _watch(self, job: Any, args: Any, request: Any, late: bool) -> None:
        job.oomsafe_request = request
        if late or getattr(request and request.task, "retry_on_worker_lost", None):
            self._redelivery.lone_child = len(self._cache) == len(self._pool) == 1
            self._redelivery.handed_out(job._job + 1, request)
        job.oomsafe_task = name, _, headers = task_of(args)
        ceiling = self._limits.of(name, headers)
        if self._watching is not None:
            self._watching.watch(job._job + 1, ceiling)

    def begin_to_end(self) -> None:
        """The node has been told to end. Whoever told it may lose patience, and kill it with what still runs."""
        attempt("the shutdown", "Celery", self._redelivery.all_ended)

    def end_watch(self) -> None:
        """The pool is closed."""
        if self._watching is not None:
            self._watching.end()
        self._redelivery.close()

    def gone(self, worker: Any, seat: Seat | None) -> None:
        """For each child that billiard has joined, while its slot, if it had one, is still its own."""
        number, generation = (seat.number, seat.generation) if seat is not None else (None, None)
        death = self.deaths.read(number, generation, pid=worker.pid, exitcode=worker.exitcode)
        ticket = death.ticket
        # a time limit has given the task its result by now; revoke(terminate) is noted with the child
        death.explained = bool(ticket and ticket - 1 not in self._cache) or getattr(worker, "_job_terminated", False)
        job = self._cache.get(ticket - 1)
        if job is not None and not getattr(job, "_accepted", True):
            # it had begun, and MainProcess has not read so yet: billiard would hand it to another child, where it would run a second time
            attempt("a task that has begun", "Celery", lambda: job._ack(None, time.monotonic(), worker.pid, None))
        death.work = None if job is None else name_and_id(job)
        self.deaths.record(death)
        if not death.is_unexplained_kill:
            self._redelivery.ended(ticket)

    def _join_exited_workers(self, shutdown: bool = False) -> Any:
        attempt("the OOM counter", "Celery", self.deaths.counter.read)
        try:
            return super()._join_exited_workers(shutdown)  # type: ignore[misc]
        finally:
            attempt("the deaths of children", "Celery", self.deaths.settle)

    def look_for_others(self) -> None:
        """About once a second: has the kernel killed a process here that is none of the children, as a program that a task runs is?"""
        before, self._ran = self._ran, {name_and_id(job)[0] for job in list(self._cache.values())}
        counter = self.deaths.counter
        kills = counter.read()
        if counter.risen:
            self._then = self._then or before | self._ran
        others = counter.others() if kills is not None and kills.own else 0
        if others:
            log.warning(
                "the kernel's OOM killer took %d of this cgroup's processes that were no child of this node: programs that a task ran, or "
                "others in the cgroup; with memory_limit a task is stopped for what its programs hold%s", others,
                f"; then ran {', '.join(sorted(self._then)[:NAMED])}" if self._then else "",
            )  # fmt: skip
        if not counter.risen:
            self._then = set()

    def on_job_process_lost(self, job: Any, pid: int, exitcode: int) -> None:
        """The child died with this task. Inside of it there is no result on its way that billiard would have to wait for."""
        death = self.deaths.of(pid)
        if death is not None and death.ticket == job._job + 1:
            self.mark_as_worker_lost(job, exitcode)
        else:
            super().on_job_process_lost(job, pid, exitcode)  # type: ignore[misc]

    def mark_as_worker_lost(self, job: Any, exitcode: int) -> None:
        """Its result: with what we know, else Celery's own."""
        error = attempt("the death of a child", "Celery", partial(self._why, job))
        if error is None:
            attempt("the end of a task", "Celery", lambda: self._redelivery.ended(job._job + 1))
            super().mark_as_worker_lost(job, exitcode)  # type: ignore[misc]
            return
        if isinstance(error, WorkerOutOfMemory) and attempt("poison", "Celery", partial(self._is_given_up, job, error)):
            job._set(None, (False, None))  # no value: Celery is told nothing more
            return
        if isinstance(error, WorkerOutOfMemory):
            log.error("%s", error)
        else:  # what it is made of has room for neither
            log.error("%s (task id %s, child %s)", error, name_and_id(job)[1], job._worker_pid)
        job._set(None, (False, info_of(error)))

    def _is_given_up(self, job: Any, error: Exception) -> bool:
        return self._redelivery.died(job._job + 1, getattr(job, "oomsafe_request", None), str(error))

    def on_job_ready(self, job: int, i: Any, obj: Any, fd: Any) -> None:
        """Its child has sent what it returned."""
        super().on_job_ready(job, i, obj, fd)  # type: ignore[misc]
        try:
            self._redelivery.forget(job + 1)
        except Exception as error:
            failed("the end of a task", "Celery", error)

    def flush(self) -> None:
        """The connection to the broker is lost: what runs goes on, and comes again."""
        attempt("a lost connection", "Celery", self._redelivery.all_ended)
        flush = getattr(super(), "flush", None)
        if flush is not None:
            flush()

    def _why(self, job: Any) -> Exception | None:
        death, (name, task_id) = self.deaths.of(job._worker_pid), name_and_id(job)
        if death is None or death.ticket not in (0, job._job + 1):
            return None
        if death.stopped is not None:
            return MemoryLimitExceeded(name, death.stopped.used, death.stopped.limit)
        if not death.is_unexplained_kill:
            return None
        self.deaths.judge()
        death.work = death.work or (name, task_id)  # it was not inside of it, or not any more
        if death.verdict not in (Verdict.CONFIRMED, Verdict.LIKELY):
            return None
        return WorkerOutOfMemory(
            f"task {name}[{task_id}]: the kernel's OOM killer took its child {death.pid} ({death.verdict.value}): "
            f"rss {format_size(death.rss)} when last seen, limit {format_size(death.limit)} ({death.whence}); "
            "raise the limit, or set memory_limit for the task"
        )


def name_and_id(job: Any) -> tuple[str, str]:
    """Of the task that one of billiard's jobs is, printable and short: both may have been chosen by whoever sent it."""
    name, task_id = getattr(job, "oomsafe_task", ("?", "?"))[:2]
    return printable(str(name)), printable(str(task_id))
