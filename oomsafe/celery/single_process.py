"""A node whose tasks all run in its one process (threads, gevent, eventlet, solo). It is measured; with OOMSAFE_SINGLE=exit, it is
recycled by a warm shutdown."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import threading
from collections.abc import Callable, Mapping
from typing import Any

from celery import bootsteps, signals
from celery.worker import state as node_state
from celery.worker.consumer.tasks import Tasks

from oomsafe.celery.errors import heed, in_words, info_of, memory_error_in
from oomsafe.celery.installation import installed
from oomsafe.celery.routes import Routes
from oomsafe.celery.task_limits import HARD, SOFT, TaskLimits, limits_of, task_of
from oomsafe.errors import SoftMemoryLimitExceeded
from oomsafe.kernel.capacity import read_capacity
from oomsafe.log import attempt, log, log_with
from oomsafe.policy.settings import Policy
from oomsafe.policy.text import printable
from oomsafe.policy.units import format_size
from oomsafe.scoreboard.board import InHand, Scoreboard
from oomsafe.scoreboard.own_board import OwnBoard
from oomsafe.supervisor.watcher import TELL, Watcher, WatcherThread, tell
from oomsafe.worker.current import knows_routes, set_guard
from oomsafe.worker.guard import Guard
from oomsafe.worker.meter import PUBLISH_EVERY, Work

#: The pool in which a task has the node's main thread, so that an error about its soft limit can be raised in it.
SOLO = "celery.concurrency.solo"

#: Settings that require child processes and a MainProcess beside them.
FOR_CHILDREN = (
    "task_soft_memory_limit", "task_memory_limit", "task_memory_absolute", "max_oom_redeliveries", "max_unavailable",
    "worker_oom_score_adj", "supervisor_oom_score_adj", "metrics",
)  # fmt: skip

#: Those of them that do work in a solo node.
FOR_SOLO = ("task_soft_memory_limit", "task_memory_absolute")

#: The most limits of single tasks that are named in the log.
NAMED = 3

POOLS = tuple(f"celery.concurrency.{name}" for name in ("solo", "thread", "gevent", "eventlet"))


class Single(bootsteps.StartStopStep):  # type: ignore[misc]
    """A bootstep of a node whose pool is one of POOLS, or derived from one."""

    name = "oomsafe.Single"
    requires = (Tasks,)

    def __init__(self, consumer: Any, **options: Any) -> None:
        super().__init__(consumer, **options)
        self.enabled = runs_in_one_process(consumer.pool)
        self._timer: Any = None
        self._guard: Guard | None = None
        self._flying: dict[int, Work] = {}
        guard = attempt("the guard", "Celery", lambda: self._guard_process(consumer)) if self.enabled else None
        if guard is not None and _is_solo(consumer.pool):
            soft = _soft_limits(consumer.app, guard)
            if soft is not None:
                consumer.pool.on_apply = soft.telling(consumer.pool.on_apply)

    def _guard_process(self, consumer: Any) -> Guard:
        log_with(logging.getLogger("celery"))
        found = installed(consumer.app)
        for warning in found.warnings:
            log.warning("%s", warning)
        idle = _cannot_act(consumer.app, found.policy, _is_solo(consumer.pool))
        if idle:
            log.warning(
                "settings that can't act in a node of one process, where to stop a task is to stop all: %s; "
                "use -P prefork, or soft_limit and OOMSAFE_SINGLE=exit", ", ".join(idle),
            )  # fmt: skip
        exits = os.environ.get("OOMSAFE_SINGLE") == "exit"
        own_board = OwnBoard.create(found.policy.name or str(consumer.hostname or ""))
        guard = self._guard = consumer.oomsafe_guard = Guard(
            found.policy, recycle=_shut_down_warmly if exits else None, unit="tasks", own_board=own_board
        )
        set_guard(guard)
        self._routes = Routes()
        knows_routes(self._routes)
        consumer.pool.on_apply = _containing(consumer.pool.on_apply)
        signals.task_prerun.connect(self._begun, weak=False)
        signals.task_postrun.connect(self._ended, weak=False)
        stays = "it logs a warning: all tasks are in this one process, and if something restarts it, set OOMSAFE_SINGLE=exit"
        attempt("the line at boot", "Celery", lambda: guard.say_limits("it is shut down warmly (OOMSAFE_SINGLE=exit)" if exits else stays))
        return guard

    def start(self, consumer: Any) -> None:
        """Called at each connection to the broker."""
        guard = self._guard
        if guard is not None:
            self._timer = consumer.timer.call_repeatedly(PUBLISH_EVERY, guard.tick)

    def stop(self, consumer: Any) -> None:
        """Called at the end of each connection."""
        if self._timer is not None:
            consumer.timer.cancel(self._timer)
            self._timer = None

    shutdown = stop

    def _begun(self, sender: Any = None, task_id: Any = None, **_: Any) -> None:
        if self._guard is not None and sender is not None:
            work = self._guard.meter.begin(f"{sender.name}[{task_id}]".encode("utf-8", "replace"))
            work.route = str(sender.name)
            self._flying[id(sender.request_stack.top)] = work  # by request, because the same task id may be in flight twice

    def _ended(self, sender: Any = None, **_: Any) -> None:
        work = self._flying.pop(id(sender.request_stack.top), None) if sender is not None else None
        if work is not None:
            work.end()


def runs_in_one_process(pool: Any) -> bool:
    """Whether all tasks of this pool run in one process. The pool's class may be derived from one of Celery's."""
    return any(kind.__module__ in POOLS for kind in type(pool).__mro__)


def _is_solo(pool: Any) -> bool:
    return any(kind.__module__ == SOLO for kind in type(pool).__mro__)


def _soft_limits(app: Any, guard: Guard) -> SoftLimits | None:
    """The tasks' soft limits; None if they can't be set up, which is logged. Raises ImproperlyConfigured for an invalid limit."""
    limits = limits_of(app, guard.policy, read_capacity(), guard.limits)
    return attempt("soft limits", "Celery", lambda: SoftLimits(limits, guard, guard.policy.dry_run))


def _cannot_act(app: Any, policy: Policy, solo: bool) -> list[str]:
    """The settings that need children and were given anyway, in any way; each printable and short."""
    default = Policy()
    names = [name for name in FOR_CHILDREN if not (solo and name in FOR_SOLO)]
    given = {name: app.conf.get(name) for name in names if name.startswith("task_") and app.conf.get(name)}
    given |= {name: getattr(policy, name) for name in names if getattr(policy, name) != getattr(default, name)}
    found = [_shown(name, value) for name, value in given.items()]
    own = [
        f"{_shown(field, value)} of task {printable(name)}"
        for name, task in sorted(app.tasks.items())
        for field in ((HARD,) if solo else (SOFT, HARD))
        if (value := getattr(task, field, None)) is not None
    ]
    return [*found, *own[:NAMED], *([f"{len(own) - NAMED} more limits of tasks"] if len(own) > NAMED else [])]


def _shown(name: str, value: object) -> str:
    if isinstance(value, int) and name.endswith("limit"):
        return f"{name}={format_size(value)}"
    return f"{name}={printable(str(value), 40)}"


def _shut_down_warmly() -> None:
    """From any thread: the node's loop notices it within two seconds. Running tasks end first, the rest stays in the broker."""
    if node_state.should_stop is None:
        node_state.should_stop = os.EX_OK


def _containing(apply: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the pool's on_apply so that no task's MemoryError leaves it."""

    def on_apply(target: Callable[..., Any], args: Any = None, kwargs: Any = None, **options: Any) -> Any:
        """Run `target`, Celery's tracer; `args` begin with the task's name."""
        name = str(args[0]) if args else "?"

        def contained(*given: Any, **named: Any) -> Any:
            try:
                result = target(*given, **named)
                found = memory_error_in(result)
            except MemoryError as error:
                result, found = (1, None, 0.0), error
            # not inside the except block, where the new error would keep the MemoryError as its context
            return result if found is None else (1, info_of(in_words(name, found)), result[2])

        return apply(contained, args, kwargs, **options)

    return on_apply


class SoftLimits:
    """The soft memory limits of a solo node's tasks. Nothing can stop a task there, but the running task has its thread to itself.

    The error is raised in that thread: by a signal if it is the main thread, else (as in pytest's celery_worker) by setting an
    asynchronous exception from outside. All methods run in that thread, except _tell(), which the watcher's thread calls.
    """

    def __init__(self, limits: TaskLimits, guard: Guard, dry_run: bool) -> None:
        self._limits = limits
        self._guard = guard
        board = Scoreboard.private()
        slot = board.reserve()
        assert slot is not None, "a new board has a slot"
        slot.claim()
        self._slot = slot
        self._name, self._last, self._ticket = "", 0, 0
        watcher = Watcher(board, lambda: self._ticket != 0, lambda ticket: ticket == self._ticket, dry_run=dry_run, tell=self._tell)
        self._watcher = WatcherThread(watcher)
        self._hears = threading.current_thread() is threading.main_thread()
        self._thread: int | None = None
        self._set = False
        self._setting = threading.Lock()
        if self._hears:
            signal.signal(TELL, lambda *_: heed(self._slot, self._ticket, self._name))

    def telling(self, apply: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap the pool's on_apply so that its tasks' soft limits are enforced."""

        def on_apply(target: Callable[..., Any], args: Any = None, kwargs: Any = None, **options: Any) -> Any:
            """Run `target`, Celery's tracer; `args` are (name, id, the message's headers, ...)."""

            def measured(*given: Any, **named: Any) -> Any:
                try:
                    try:
                        name, _, headers = task_of(given)
                        self._take_up(name, headers)
                        return target(*given, **named)
                    finally:
                        self._put_down()
                except SoftMemoryLimitExceeded as error:  # it was raised in the tracer's code, before or after the task's
                    return 1, info_of(error), 0.0

            return apply(measured, args, kwargs, **options)

        return on_apply

    def _take_up(self, name: str, headers: Mapping[str, Any]) -> None:
        self._put_down()  # the error may have interrupted the end of the previous task
        ceiling = self._limits.of(name, headers)
        if ceiling is None or ceiling.soft is None:
            return
        self._last += 1
        in_main = self._hears and threading.current_thread() is threading.main_thread()
        self._name, self._ticket, self._thread = name, self._last, None if in_main else threading.get_ident()
        self._watcher.watch(self._last, ceiling._replace(hard=None))
        self._guard.meter.measure()
        self._slot.take_up(self._last, self._guard.meter.without_files)

    def _put_down(self) -> None:
        if self._ticket:
            with self._setting:  # from here on no exception is set
                self._ticket = 0
                if self._set:
                    self._set = False
                    _raise_in(self._thread, None)  # withdraw an exception that was not raised yet: it was meant for this task
            self._slot.put_down()

    def _tell(self, work: InHand) -> None:
        """In the watcher's thread. A signal also interrupts a system call; an exception that is set is raised only after the call."""
        if self._thread is None:
            tell(work)
            return
        with self._setting:
            limit = self._slot.heed_limit(work.ticket) if work.ticket == self._ticket else None
            if limit is not None:
                self._set = _raise_in(self._thread, _made_of(printable(self._name), *limit))


def _made_of(name: str, used: int, limit: int) -> type[SoftMemoryLimitExceeded]:
    """A class with these figures built in, because CPython creates the exception that is set in a thread without arguments."""

    class Warned(SoftMemoryLimitExceeded):
        def __init__(self, *args: Any) -> None:
            super().__init__(*(args or (name, used, limit)))

        def __reduce__(self) -> Any:
            return SoftMemoryLimitExceeded, self.args

    for field in ("__name__", "__qualname__", "__module__", "__doc__"):
        setattr(Warned, field, getattr(SoftMemoryLimitExceeded, field))
    return Warned


def _raise_in(thread: int | None, error: type[Exception] | None) -> bool:
    """Raise `error` once between two bytecodes of that thread; None: withdraw one that was not raised yet. Returns whether it exists."""
    found = ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread or 0), None if error is None else ctypes.py_object(error))
    return bool(found)
