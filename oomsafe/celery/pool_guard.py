"""In MainProcess: what oomsafe does for a prefork pool, for both of billiard's kinds. The pool calls it: see pool.py."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

from celery.exceptions import TaskRevokedError

from oomsafe.celery.errors import WorkerOutOfMemory, info_of
from oomsafe.celery.redelivery import Redelivery, request_of
from oomsafe.celery.task_limits import TaskLimits, task_of
from oomsafe.celery.task_loop import GROWTH
from oomsafe.errors import MemoryLimitExceeded
from oomsafe.log import attempt, failed, log
from oomsafe.policy.ceilings import SPARE, Ceiling
from oomsafe.policy.death_line import Flight
from oomsafe.policy.ends import By
from oomsafe.policy.limits import Capacity, Limits
from oomsafe.policy.text import printable
from oomsafe.policy.units import format_size
from oomsafe.policy.verdicts import Verdict
from oomsafe.scoreboard.board import Entry
from oomsafe.scoreboard.seat import Seat
from oomsafe.supervisor.deaths import Ended
from oomsafe.supervisor.supervisor import Supervisor
from oomsafe.supervisor.watcher import Stopped, Watcher, WatcherThread

#: At most this many tasks are named that ran when the kernel killed another process.
NAMED = 3


class HandedOut(NamedTuple):
    """The task behind one of billiard's jobs; stored in the job's attribute `oomsafe`."""

    request: Any
    """Celery's Request; None if the work is not a Celery task."""
    name: str
    task_id: str


class PoolGuard:
    """For one pool: the seats of its children, the limits of its tasks, the deaths of children, and the results of the tasks they ran.

    The number of a billiard job is its ticket on the scoreboard; pool.py ensures that no job has the number 0, which means no work there.
    """

    def __init__(self, supervisor: Supervisor, limits: TaskLimits, redelivery: Redelivery) -> None:
        self.supervisor = supervisor
        self.redelivery = redelivery
        self._limits = limits
        self._pool: Any = None
        watcher = None
        if supervisor.board is not None:
            watcher = Watcher(
                supervisor.board, lambda: bool(self.jobs), lambda ticket: ticket in self.jobs, redelivery.lasting, supervisor.policy.dry_run
            )
        self._watching = None if watcher is None else WatcherThread(watcher)
        if supervisor.backstop is not None:
            supervisor.backstop.may_kill = partial(self._may_kill, watcher)
        self.deaths = supervisor.deaths
        self.deaths.watcher = watcher
        supervisor.says_others = False
        self._ends = False
        self._seat: Seat | None = None
        self._children: dict[int, Seat | None] = {}
        """The seat of each living child, by its pid; None: the child has no seat."""
        self._ran: set[str] = set()
        self._then: set[str] = set()

    def attach(self, pool: Any) -> None:
        """Called with billiard's pool before it starts its children."""
        self._pool = pool

    @property
    def jobs(self) -> Mapping[int, Any]:
        """billiard's jobs that have been handed out and have no result yet, by number."""
        jobs: Mapping[int, Any] = self._pool._cache
        return jobs

    # its children

    def reserve_seat(self) -> None:
        """Called before a child is started; for_child() then gives it the seat."""
        self._seat = attempt("seat", "Celery", lambda: self.supervisor.seat(self.supervisor.reserve()))

    def for_child(self) -> dict[str, Any]:
        """The keywords of a GuardedWorker that billiard's own worker does not have."""
        lasting = self.redelivery.says_so and self._watching is not None
        return {"seat": self._seat, "notes_first": not lasting}

    def started(self, process: Any) -> None:
        """Called after a child was started."""
        self._children[process.pid] = seat = self._seat
        if seat is not None:
            attempt("seat", "Celery", lambda: self.supervisor.born_seat(seat.number, seat.generation, process.pid))

    def resized(self, children: int) -> None:
        """The number of children has changed (`worker --autoscale`, `control pool_grow`), and with it the share of every child."""
        attempt("the pool's size", "Celery", lambda: self.supervisor.change(children))

    def gone(self, process: Any) -> None:
        """Called for each child that billiard has joined, and by Celery again for the same child; the death is recorded only once."""
        if process.exitcode is None or process.pid not in self._children:
            return
        seat = self._children.pop(process.pid)
        attempt("the death of a child", "Celery", partial(self._record_death, process, seat))
        if seat is not None:
            attempt("release", "Celery", lambda: self.supervisor.release_seat(seat.number, seat.generation))

    def _may_kill(self, watcher: Watcher | None, child: Entry, held: int, limit: int) -> bool:
        """Whether a child above the pool's hard limit is killed: only inside a task, whose result then says so."""
        if watcher is None or self.supervisor.board is None:
            return False
        ticket, _ = self.supervisor.board.hand(child.number, child.generation)
        if ticket:
            watcher.stopped[child.generation] = Stopped(ticket, held, limit)
        return bool(ticket)

    def _record_death(self, process: Any, seat: Seat | None) -> None:
        """Called while the child's slot, if it had one, still belongs to it."""
        number, generation = (seat.number, seat.generation) if seat is not None else (None, None)
        death = self.deaths.read(number, generation, Ended(process.pid, process.exitcode))
        job = self.jobs.get(death.ticket)
        # the process object tells of a time limit, of revoke(terminate), and that the pool shrinks
        timed_out = getattr(process, "_oomsafe_timed_out", None)
        if timed_out is not None or (death.ticket and job is None):  # the result is set before the child is ended
            death.by = By.TIME_LIMIT
        elif self._ends or getattr(process, "_job_terminated", False) or getattr(process, "_controlled_termination", False):
            death.by = By.ORDER
        death.killed_by_server = death.by is not None
        if timed_out is not None and not death.flights:
            seconds = time.monotonic() - (timed_out._time_accepted or time.monotonic())
            death.flights = (Flight("{}[{}]".format(*name_and_id(timed_out)), seconds, None),)
        if job is not None and not getattr(job, "_accepted", True):
            # the task had begun, but MainProcess has not read that yet: billiard would give it to another child, and it would run twice
            attempt("a task that has begun", "Celery", lambda: job._ack(None, time.monotonic(), process.pid, None))
        death.work = None if job is None else name_and_id(job)
        self.deaths.record(death)
        if not death.is_unexplained_kill:
            self.redelivery.ended(death.ticket)

    def before_reaping(self) -> None:
        """Called before billiard joins children that have died."""
        attempt("the OOM counter", "Celery", self.deaths.counter.read)

    def reaped(self) -> None:
        """Called after billiard has joined them."""
        attempt("the deaths of children", "Celery", self.deaths.settle)

    def report_other_kills(self) -> None:
        """About once a second: log if the kernel has killed a process here that is not a child, such as a program that a task runs."""
        before, self._ran = self._ran, {name_and_id(job)[0] for job in list(self.jobs.values())}
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

    # its tasks

    def before_handing_out(self, options: Mapping[str, Any]) -> Any:
        """`options` are those of apply_async(). Returns the Request among them. Raises TaskRevokedError if the task has been given up."""
        request = request_of(options)
        if self.redelivery.says_alone and self.jobs:
            attempt("poison", "Celery", self.redelivery.joined)
        if is_late(request) and attempt("poison", "Celery", lambda: self.redelivery.is_refused(request)):
            raise TaskRevokedError(request.id)  # what Celery expects for a task that must not run
        return request

    def limits_of(self, args: Any) -> tuple[Ceiling | None, dict[str, int]]:
        """The limits of a task that is about to be handed out, and the keywords that its child gets with it; None: it has no limits.

        `args` are those of Celery's tracer. The child gets the growth at which the kernel refuses the task more.
        """
        try:
            name, _, headers = task_of(args)
            ceiling = self._limits.of(name, headers)
        except Exception as error:
            failed("limits", "Celery", error)
            return None, {}
        if ceiling is None or ceiling.hard is None or ceiling.absolute or self.supervisor.policy.dry_run:
            return ceiling, {}
        return ceiling._replace(spare=SPARE), {GROWTH: ceiling.hard}

    def handed_out(self, job: Any, args: Any, request: Any, ceiling: Ceiling | None) -> None:
        """`args` are those of Celery's tracer: (name, id, the message's headers, ...)."""
        try:
            name, task_id, _ = task_of(args)
            job.oomsafe = HandedOut(request, name, task_id)
            if is_late(request) or getattr(request and request.task, "retry_on_worker_lost", None):
                self.redelivery.lone_child = len(self.jobs) == len(self._pool._pool) == 1
                self.redelivery.handed_out(job._job, request)
            if self._watching is not None:
                self._watching.watch(job._job, ceiling)
        except Exception as error:
            failed("limits", "Celery", error)

    def ended(self, job: int) -> None:
        """The child has sent the task's result."""
        try:
            self.redelivery.forget(job)
        except Exception as error:
            failed("the end of a task", "Celery", error)

    def died_inside(self, job: Any, pid: int) -> bool:
        """Whether the child died inside this task: then no result is on its way, and billiard need not wait for one."""
        death = self.deaths.of(pid)
        return death is not None and death.ticket == job._job

    def settles(self, job: Any) -> bool:
        """Set the result of a task whose child is lost, if memory was the cause. Returns False if Celery's own result is right."""
        error = attempt("the death of a child", "Celery", partial(self._why, job))
        if error is None:
            attempt("the end of a task", "Celery", lambda: self.redelivery.ended(job._job))
            return False
        if isinstance(error, WorkerOutOfMemory) and attempt("poison", "Celery", partial(self._is_given_up, job, error)):
            job._set(None, (False, None))  # without a value, so that Celery does nothing more
            return True
        if isinstance(error, WorkerOutOfMemory):
            log.error("%s", error)
        else:  # the error's own fields have no room for these two
            log.error("%s (task id %s, child %s)", error, name_and_id(job)[1], job._worker_pid)
        job._set(None, (False, info_of(error)))
        return True

    def runs(self, request: Any) -> bool:
        """Whether the task of this Request has been handed out and has no result yet."""
        return any((work := _work_of(job)) is not None and work.request is request for job in list(self.jobs.values()))

    def _is_given_up(self, job: Any, error: Exception) -> bool:
        work = _work_of(job)
        return self.redelivery.died(job._job, None if work is None else work.request, str(error))

    def _why(self, job: Any) -> Exception | None:
        death, (name, task_id) = self.deaths.of(job._worker_pid), name_and_id(job)
        if death is None or death.ticket not in (0, job._job):
            return None
        if death.stopped is not None:
            return MemoryLimitExceeded(name, death.stopped.used, death.stopped.limit)
        if not death.is_unexplained_kill:
            return None
        self.deaths.judge()
        death.work = death.work or (name, task_id)  # the child was not inside the task yet, or not any more
        if death.verdict not in (Verdict.CONFIRMED, Verdict.LIKELY):
            return None
        return WorkerOutOfMemory(
            f"task {name}[{task_id}]: the kernel's OOM killer took its child {death.pid} ({death.verdict.value}): "
            f"rss {format_size(death.rss)} when last seen, limit {format_size(death.limit)} ({death.whence}); "
            "raise the limit, or set memory_limit for the task"
        )

    # its node

    def follow(self, capacity: Capacity, limits: Limits) -> None:
        """The memory limit may have changed: tasks that are handed out from now on get their share of the new one."""
        attempt("limits of tasks", "Celery", lambda: self._limits.follow(capacity, limits))

    def connection_lost(self) -> None:
        """Running tasks continue, and their messages will be redelivered."""
        attempt("a lost connection", "Celery", self.redelivery.all_ended)

    def begin_to_end(self) -> None:
        """The node was ordered to end. It may still be killed while its tasks run, and that must not count as deaths for memory."""
        self._ends = True
        attempt("the shutdown", "Celery", self.redelivery.all_ended)

    def end(self) -> None:
        """Called when the pool is closed."""
        if self._watching is not None:
            self._watching.end()
        self.redelivery.close()


def is_late(request: Any) -> bool:
    """Whether the message of this task is acknowledged only when it has ended (acks_late); `request` None: not a Celery task."""
    return request is not None and bool(request.task.acks_late)


def name_and_id(job: Any) -> tuple[str, str]:
    """The name and id of a billiard job's task, printable and short, because the sender of the message may have chosen both."""
    work = _work_of(job)
    return ("?", "?") if work is None else (printable(work.name), printable(work.task_id))


def _work_of(job: Any) -> HandedOut | None:
    found = getattr(job, "oomsafe", None)
    return found if isinstance(found, HandedOut) else None
