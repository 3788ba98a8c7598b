"""The loop of a billiard worker: the child is measured from task to task, and recycled between two tasks."""

from __future__ import annotations

import select
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from billiard.pool import EX_RECYCLE

from oomsafe.celery.errors import in_words, info_of, memory_error_in
from oomsafe.errors import SoftMemoryLimitExceeded
from oomsafe.log import attempt, failed
from oomsafe.worker.guard import Guard
from oomsafe.worker.meter import PUBLISH_EVERY, Work

#: The keyword with which MainProcess hands out a task that has a memory_limit: the bytes by which it may grow.
GROWTH = "oomsafe_growth"


class Tasks(Protocol):
    """The object in a child that is notified when a task begins and ends."""

    def take_up(self, name: str, ticket: int, task_id: str, args: tuple[Any, ...], growth: int | None) -> None:
        """A task begins; `args` are those of Celery's tracer, `growth` its memory_limit. May raise SoftMemoryLimitExceeded."""

    def instead_of(self, name: str, error: MemoryError) -> Exception | None:
        """The MemoryError comes out of the tracer: what the task fails with instead, if its memory_limit is the cause."""

    def put_down(self, of_its_own: bool) -> None:
        """The task has ended; `of_its_own`: by itself, with or without an error. A second call changes nothing."""


def nothing() -> None:
    """The `recycle` of a child's guard. It has nothing to do, because the loop checks the guard between two tasks."""


class TaskLoop:
    """The loop of one child. `guard` None: the child is not measured, but still no MemoryError of a task leaves it."""

    def __init__(self, tasks: Tasks | None, begins: Callable[[], None]) -> None:
        """`begins` is called at the first idle moment, when everything that is loaded before the first task has been loaded."""
        self.guard: Guard | None = None
        self._tasks = tasks
        self._begins: Callable[[], None] | None = begins
        self.work: Work | None = None
        """The task in flight."""
        self._pipe: select.poll | None = None

    def run_in(self, worker: Any) -> None:
        """Hook into billiard's `worker`, between two tasks and after its last. Called in the child, before its loop begins."""
        wait_for_job, reader = worker.wait_for_job, getattr(worker.inq, "_reader", None)
        if reader is not None:
            # billiard's own reader.poll() creates a new poll object each time, which costs ten times as much
            self._pipe = select.poll()
            self._pipe.register(reader.fileno(), select.POLLIN)

        # inlined here and below, because every task pays for it: a call costs a child three times what it costs in a loop
        def between_two_tasks() -> Any:
            work, self.work = self.work, None
            if work is not None:
                work.meter.end(work)
            elif self._begins is not None:
                begins, self._begins = self._begins, None
                attempt("the first idle moment", "Celery", begins)
            self._idle()
            request = wait_for_job()
            if request:
                try:
                    return self._begun(request)
                except Exception as error:
                    failed("the begin of a task", "Celery", error)
            return request

        worker.wait_for_job = between_two_tasks
        worker.workloop = partial(self._to_its_end, worker.workloop)

    def _to_its_end(self, workloop: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Run billiard's loop. After its last task (worker_max_tasks_per_child) it does not wait for another, so that task ends here."""
        try:
            return workloop(*args, **options)
        finally:
            attempt("a child's end", "Celery", self._ends)

    def _ends(self) -> None:
        work, self.work = self.work, None
        if work is not None:
            work.meter.end(work)
        if self.guard is not None:
            self.guard.retire()

    def _idle(self) -> None:
        """Wait for a task. In billiard's own read, the child would sleep without publishing its figures, and without checking whether
        it should end."""
        guard = self.guard
        while guard is not None:
            if guard.leaving:
                guard.retire()
                # not a bare SystemExit: billiard has replaced sys.exit with a function that keeps the status for the parent
                sys.exit(EX_RECYCLE)
            if self._pipe is None or self._pipe.poll(PUBLISH_EVERY * 1000):
                return  # a task has come, or the pipe is closed, which billiard's own read notices
            guard.tick()

    def _begun(self, request: Any) -> Any:
        """A task has come: it is in flight from now on, and wrapped so that its MemoryError does not leave it."""
        kind, (job, i, function, args, kwargs) = request
        growth = kwargs.pop(GROWTH, None)  # the first thing, because the tracer takes no such keyword
        name, task_id = (str(args[0]), str(args[1])) if len(args) > 1 else ("?", "?")
        if self.guard is not None:
            self.work = self.guard.meter.begin(f"{name}[{task_id}]".encode("utf-8", "replace"))
            self.work.route = name
        return kind, (job, i, _Contained(function, name, self._tasks, job, task_id, growth), args, kwargs)


class _Contained:
    """A task's tracer, wrapped so that no MemoryError leaves it."""

    def __init__(
        self, function: Callable[..., Any], name: str, tasks: Tasks | None, ticket: int, task_id: str, growth: int | None = None
    ) -> None:
        self._function = function
        self._name = name
        self._tasks = tasks
        self._ticket = ticket
        self._task_id = task_id
        self._growth = growth

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tasks = self._tasks
        instead = None
        try:
            if tasks is None:
                result = self._function(*args, **kwargs)
            else:
                tasks.take_up(self._name, self._ticket, self._task_id, args, self._growth)
                of_its_own = False
                try:
                    result = self._function(*args, **kwargs)
                    of_its_own = True
                except MemoryError as error:
                    of_its_own = True
                    instead = tasks.instead_of(self._name, error)  # while the limit is still known
                    raise
                except Exception:
                    of_its_own = True
                    raise
                finally:
                    tasks.put_down(of_its_own)
        except MemoryError as error:
            problem = instead or in_words(self._name, error)
        except SoftMemoryLimitExceeded:
            if tasks is not None:
                tasks.put_down(True)  # the error was raised inside take_up() or put_down()
            raise
        else:
            found = memory_error_in(result)
            return result if found is None else (result[0], info_of(in_words(self._name, found)), *result[2:])
        raise problem
