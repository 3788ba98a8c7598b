"""A child of oomsafe's prefork pool: it has a seat in the pool, its tasks have limits, and their results can say how much they grew."""

from __future__ import annotations

import inspect
import logging
import os
import signal
from collections.abc import Callable
from functools import partial
from typing import Any

from billiard.pool import Worker as BlockingWorker
from celery import current_app
from celery.backends.base import DisabledBackend
from celery.concurrency.asynpool import Worker as AsynWorker
from celery.states import READY_STATES

from oomsafe.celery.errors import heed
from oomsafe.celery.notes import Notes
from oomsafe.celery.routes import Routes
from oomsafe.celery.task_loop import TaskLoop, nothing
from oomsafe.celery.task_memory import TaskMemory
from oomsafe.errors import SoftMemoryLimitExceeded
from oomsafe.kernel.process import forget_peak, peak_rss_of
from oomsafe.log import attempt, failed, log, log_with
from oomsafe.scoreboard.board import Scoreboard
from oomsafe.scoreboard.seat import Seat
from oomsafe.scoreboard.slot import Slot
from oomsafe.supervisor.watcher import TELL
from oomsafe.worker.current import knows_routes, set_guard
from oomsafe.worker.guard import Guard


class GuardedWorker:
    """What is overridden in both of billiard's workers."""

    def __init__(self, *args: Any, seat: Seat | None = None, notes_first: bool = True, **options: Any) -> None:
        """`notes_first`: note tasks that are delivered for the first time, too, because MainProcess does not."""
        self._seat = seat
        self._notes_first = notes_first
        self._guard: Guard | None = None
        self._slot: Slot | None = None
        self._loop = TaskLoop(self, self._begins)
        self._ticket, self._name, self._late = 0, "", ""
        self._is_late: dict[str, bool] = {}
        self._notes: Notes | None = None
        self._meta: Meta | None = None
        self._memory: TaskMemory | None = None
        self._held, self._fails = 0, False
        super().__init__(*args, **options)

    def __reduce__(self) -> Any:
        made: tuple[Any, ...] = super().__reduce__()  # type: ignore[assignment]
        return _made, (made[0], made[1], self._seat, self._notes_first)

    def after_fork(self) -> None:
        """The earliest hook in a child. It takes its seat here: from now on the kernel kills it before MainProcess."""
        taken = None if self._seat is None else attempt("seat", "Celery", self._seat.take)
        super().after_fork()  # type: ignore[misc]
        log_with(logging.getLogger("celery"))
        board, slot = taken or (None, None)
        if self._seat is not None:
            self._be_guarded(self._seat, board, slot)
        if self._slot is None or self._guard is None:
            log.error(
                "no place on the scoreboard: memory limits of tasks are off in this child (soft_memory_limit, memory_limit), "
                "and nobody sees what it holds; %s", "soft_limit is kept" if self._guard is not None else "soft_limit is off, too",
            )  # fmt: skip

    def _be_guarded(self, seat: Seat, board: Scoreboard | None, slot: Slot | None) -> None:
        self._slot = slot
        # billiard has reset all signals by now
        signal.signal(TELL, self._warned)
        # nothing needs to be called when the child should end, because it checks that before each task
        self._guard = self._loop.guard = attempt("guard", "Celery", lambda: Guard.of_seat(seat, board, slot, unit="tasks", recycle=nothing))
        if self._guard is not None:
            set_guard(self._guard)
            self._routes = Routes()
            knows_routes(self._routes)
            self._memory = attempt("memory limits of tasks", "Celery", partial(self._task_memory, self._guard))
            if current_app.conf.result_extended:
                self._meta = attempt("a result's meta", "Celery", partial(Meta, current_app, self._guard))

    def _task_memory(self, guard: Guard) -> TaskMemory:
        memory = TaskMemory(guard, self._runs_out)
        memory.install(lambda: self._loop.work)
        return memory

    def _make_child_methods(self, *args: Any, **options: Any) -> None:
        super()._make_child_methods(*args, **options)  # type: ignore[misc]
        self._loop.run_in(self)

    def _begins(self) -> None:
        if self._guard is not None:
            self._guard.ready()  # what it holds now is its baseline

    def take_up(self, name: str, ticket: int, task_id: str, args: tuple[Any, ...], growth: int | None) -> None:
        """Note that a task begins: its limits may only be enforced inside it. `args` are those of Celery's tracer.

        `growth`: the bytes by which it may grow, which the kernel enforces.

        Raises SoftMemoryLimitExceeded if the supervisor's signal about its limit arrives here already.
        """
        try:
            late = self._is_late.get(name)
            if late is None:
                late = self._is_late[name] = bool(getattr(current_app.tasks.get(name), "acks_late", False))
            if late and (self._notes_first or self._slot is None or _has_come_before(args)):
                # the broker still has its message: if this whole node dies now, the message goes to another node
                self._notes = self._notes or Notes(current_app.backend, os.getppid())
                self._notes.begins(task_id)
                self._late = task_id
            if self._meta is not None:
                self._meta.begins()
            if self._slot is not None and self._guard is not None:
                self._name, self._ticket, self._fails = name, ticket, False
                self._held = self._guard.meter.without_files
                self._slot.take_up(ticket, self._held)
            if self._memory is not None:
                self._memory.begin(name, task_id, growth)
        except SoftMemoryLimitExceeded:
            raise
        except Exception as error:
            failed("the begin of a task", "Celery", error)

    def instead_of(self, name: str, error: MemoryError) -> Exception | None:
        """What the task fails with instead of this error; None: the error stays."""
        return None if self._memory is None else self._memory.instead_of(name, error)

    def _runs_out(self, reserve: int) -> None:
        """The task in hand was refused memory. It ends, and is neither told of its soft limit nor stopped while its failure is reported."""
        self._fails = True
        if self._slot is not None and self._ticket:
            self._slot.take_up(self._ticket, self._held + reserve)

    def put_down(self, of_its_own: bool) -> None:
        """Note that the task has ended; `of_its_own`: by itself, with or without an error. A second call changes nothing."""
        if self._guard is not None and not self._guard.here:
            return  # in a fork that the task has made: the task and its note belong to the parent
        try:
            try:
                self._put_down(of_its_own)
            except SoftMemoryLimitExceeded:  # the signal came after the task's last line: the task has ended, and its result stands
                self._put_down(of_its_own)
        except Exception as error:
            failed("the end of a task", "Celery", error)

    def _put_down(self, of_its_own: bool) -> None:
        if self._memory is not None:
            self._memory.end()
        if self._ticket and self._slot is not None:
            self._ticket = 0  # from here on the signal raises nothing
            self._slot.put_down()
        if self._late and self._notes is not None:
            (self._notes.ended_well if of_its_own else self._notes.ended)(self._late)
            self._late = ""

    def _warned(self, *_: object) -> None:
        """Handle the supervisor's signal: raise in the current task if it is still the one that is over its soft limit.

        Otherwise the task has grown, and what it may still get is measured again.
        """
        heed(self._slot, 0 if self._fails else self._ticket, self._name)
        if self._memory is not None:
            self._memory.follow()


class GuardedAsynWorker(GuardedWorker, AsynWorker):  # type: ignore[misc]
    """A child of AsynPool."""


class GuardedBlockingWorker(GuardedWorker, BlockingWorker):  # type: ignore[misc]
    """A child of billiard's own Pool."""


def _made(made: Callable[..., Any], given: tuple[Any, ...], seat: Seat | None, notes_first: bool) -> Any:
    """In a spawned child: the worker, with its seat."""
    worker = made(*given)
    worker._seat, worker._notes_first = seat, notes_first
    return worker


def _has_come_before(args: tuple[Any, ...]) -> bool:
    """Whether the broker marks the message as redelivered; `args` are those of Celery's tracer."""
    request = args[2] if len(args) > 2 else None
    info = request.get("delivery_info") if isinstance(request, dict) else None
    return isinstance(info, dict) and bool(info.get("redelivered"))


def drops_meta(backend: Any) -> bool:
    """Whether what Meta adds to a result does not reach where this backend stores it.

    Known are those that build what they store by the method that Meta wraps; Celery's own for SQL does, and keeps only what is a column.
    """
    if isinstance(backend, DisabledBackend):
        return False  # nothing at all is stored
    table = getattr(getattr(backend, "task_cls", None), "__table__", None)
    if table is not None:
        return "memory" not in table.columns
    methods = (inspect.unwrap(method) for kind in type(backend).__mro__ for method in vars(kind).values() if inspect.isfunction(method))
    return not any("_get_result_meta" in method.__code__.co_names for method in methods)


class Meta:
    """Adds ``memory: {"peak_growth": ..., "rss_end": ...}`` to each task's result, in bytes; None: not known. For ``result_extended``."""

    def __init__(self, app: Any, guard: Guard) -> None:
        """From here on the results that the app's result backend stores contain it."""
        self._guard = guard
        # Celery's own setting compares the process's peak, which would be reset here: if it is set, the peak of one task can't be known
        self._resets = not app.conf.worker_max_memory_per_child
        self._before: int | None = None
        backend, inner = app.backend, app.backend._get_result_meta

        def with_memory(*args: Any, **options: Any) -> Any:
            meta = inner(*args, **options)
            if isinstance(meta, dict) and meta.get("status") in READY_STATES:
                memory = attempt("a result's meta", "Celery", self._memory)
                return meta if memory is None else {**meta, "memory": memory}
            return meta

        backend._get_result_meta = with_memory

    def begins(self) -> None:
        """A task begins: reset the process's peak, if possible, and note what the process holds before the task."""
        self._before = self._guard.meter.measure() if self._resets and forget_peak() else None

    def _memory(self) -> dict[str, int | None]:
        rss = self._guard.meter.measure() if self._guard.meter.rss_known else None
        peak = peak_rss_of(os.getpid())
        known = self._before is not None and peak is not None
        return {"peak_growth": max(0, (peak or 0) - (self._before or 0)) if known else None, "rss_end": rss}
