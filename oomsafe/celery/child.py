"""A child of Celery's prefork pool: measured from task to task, recycled between two of them."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from billiard.einfo import ExceptionInfo
from billiard.pool import EX_RECYCLE
from billiard.pool import Worker as BlockingWorker
from celery.concurrency.asynpool import Worker as AsynWorker

from oomsafe.errors import TaskMemoryError
from oomsafe.pool.current import set_guard
from oomsafe.pool.guard import Guard
from oomsafe.pool.log import attempt, log_with
from oomsafe.pool.meter import PUBLISH_EVERY, Work
from oomsafe.pool.seat import Seat


class Guarded:
    """What both of billiard's workers have in common here. Everything below runs in the child."""

    inq: Any
    wait_for_job: Callable[[], Any]

    def __init__(self, *args: Any, seat: Seat | None = None, **options: Any) -> None:
        self._seat = seat
        self._guard: Guard | None = None
        self._work: Work | None = None
        super().__init__(*args, **options)

    def __reduce__(self) -> Any:
        made: tuple[Any, ...] = super().__reduce__()  # type: ignore[assignment]
        return _made, (made[0], made[1], self._seat)

    def after_fork(self) -> None:
        """The earliest seam in a child: from here on it dies before MainProcess."""
        taken = None if self._seat is None else attempt("seat", "Celery", self._seat.take)
        super().after_fork()  # type: ignore[misc]
        if self._seat is None or taken is None:
            return
        log_with(logging.getLogger("celery"))
        board, slot = taken
        # nothing to be called when it is to end: it asks before each task
        self._guard = attempt("guard", "Celery", partial(self._seat.guard, board, slot, _nothing, None, "tasks"))
        if self._guard is not None:
            set_guard(self._guard)

    def _make_child_methods(self, *args: Any, **options: Any) -> None:
        super()._make_child_methods(*args, **options)  # type: ignore[misc]
        wait_for_job = self.wait_for_job

        def between_two_tasks() -> Any:
            attempt("the end of a task", "Celery", self._ended)
            self._idle()
            request = wait_for_job()
            return (attempt("the begin of a task", "Celery", lambda: self._begun(request)) if request else None) or request

        self.wait_for_job = between_two_tasks

    def _ended(self) -> None:
        work, self._work = self._work, None
        if work is not None:
            work.end()
        elif self._guard is not None:
            self._guard.ready()  # the first idle moment: what it has now is what it needs

    def _idle(self) -> None:
        """Until a task comes. billiard would sleep in its read, and what this child has left would not be seen, nor would it end."""
        guard, reader = self._guard, getattr(self.inq, "_reader", None)
        while guard is not None:
            if guard.leaving:
                guard.retire()
                # not a bare SystemExit: what billiard has put in its place tells the parent why
                sys.exit(EX_RECYCLE)
            try:
                if reader is None or reader.poll(PUBLISH_EVERY):
                    return
            except (OSError, EOFError):
                return  # the pipe is closed: billiard's own read finds that out
            guard.tick()

    def _begun(self, request: Any) -> Any:
        """A task has come: it is in flight from now on, and a MemoryError of its stays in this process."""
        kind, (job, i, function, args, kwargs) = request
        name, task_id = (args[0], args[1]) if len(args) > 1 else ("?", "?")
        if self._guard is not None:
            self._work = self._guard.begin(f"{name}[{task_id}]".encode("utf-8", "replace"))
            self._work.route = str(name)
        return kind, (job, i, _Contained(function, str(name)), args, kwargs)


class GuardedAsynWorker(Guarded, AsynWorker):  # type: ignore[misc]
    """Of AsynPool."""


class GuardedBlockingWorker(Guarded, BlockingWorker):  # type: ignore[misc]
    """Of billiard's own Pool."""


class _Contained:
    """A task's tracer. A MemoryError that leaves it would be raised again in MainProcess, and end it (celery#5655)."""

    def __init__(self, function: Callable[..., Any], name: str) -> None:
        self._function = function
        self._name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            result = self._function(*args, **kwargs)
        except MemoryError as error:
            problem = self._in_words(error)
        else:
            # (failed, what it returned or an ExceptionInfo, seconds): its failure is in the result backend by now
            if not isinstance(result, tuple) or not result[0] or not isinstance(getattr(result[1], "exception", None), MemoryError):
                return result
            problem = self._in_words(result[1].exception)
            return (result[0], ExceptionInfo((TaskMemoryError, problem, None)), *result[2:])
        raise problem

    def _in_words(self, error: BaseException) -> TaskMemoryError:
        # plain text, and no chain: what can't be pickled must not cross either
        said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        return TaskMemoryError(f"task {self._name} ran out of memory: {said}")


def _nothing() -> None:
    """What a guard calls where there is nothing to be done at once."""


def _made(made: Callable[..., Any], given: tuple[Any, ...], seat: Seat | None) -> Any:
    """In a spawned child: the worker, with its seat."""
    worker = made(*given)
    worker._seat = seat
    return worker
