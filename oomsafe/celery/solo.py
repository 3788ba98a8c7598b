"""The soft memory limits of a solo node's tasks: nothing can stop a task there, but the one that runs has a thread for itself, and is told
in that: by a signal where it is the main thread; else, as in pytest's celery_worker, by an exception that is set there from outside.
"""

from __future__ import annotations

import ctypes
import signal
import threading
from collections.abc import Callable, Mapping
from typing import Any

from oomsafe.celery.errors import heed, info_of
from oomsafe.celery.task_limits import TaskLimits, task_of
from oomsafe.errors import SoftMemoryLimitExceeded
from oomsafe.policy.text import printable
from oomsafe.scoreboard.board import InHand, Scoreboard
from oomsafe.supervisor.watcher import TELL, Watcher, WatcherThread, tell
from oomsafe.worker.guard import Guard


class SoftLimits:
    """Tells the task that runs. All of it in the thread that has the tasks, but for the watcher's look."""

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
        """The same pool, whose tasks are told."""

        def on_apply(target: Callable[..., Any], args: Any = None, kwargs: Any = None, **options: Any) -> Any:
            """Run `target`, Celery's tracer; `args` are (name, id, the message's headers, ...)."""

            def told(*given: Any, **named: Any) -> Any:
                try:
                    try:
                        name, _, headers = task_of(given)
                        self._take_up(name, headers)
                        return target(*given, **named)
                    finally:
                        self._put_down()
                except SoftMemoryLimitExceeded as error:  # it met the tracer's code, before the task's or behind it
                    return 1, info_of(error), 0.0

            return apply(told, args, kwargs, **options)

        return on_apply

    def _take_up(self, name: str, headers: Mapping[str, Any]) -> None:
        self._put_down()  # the last one's end may have been where it was told
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
            with self._setting:  # from here on none is set
                self._ticket = 0
                if self._set:
                    self._set = False
                    _raise_in(self._thread, None)  # one that has not been raised yet is taken back: it was the task's alone
            self._slot.put_down()

    def _tell(self, work: InHand) -> None:
        """In the watcher's thread. A signal also ends a system call; an exception that is set is raised when the call returns."""
        if self._thread is None:
            tell(work)
            return
        with self._setting:
            told = self._slot.heed_limit(work.ticket) if work.ticket == self._ticket else None
            if told is not None:
                self._set = _raise_in(self._thread, _made_of(printable(self._name), *told))


def _made_of(name: str, used: int, limit: int) -> type[SoftMemoryLimitExceeded]:
    """One whose figures are known already: CPython makes what is set in a thread of nothing."""

    class Told(SoftMemoryLimitExceeded):
        def __init__(self, *args: Any) -> None:
            super().__init__(*(args or (name, used, limit)))

        def __reduce__(self) -> Any:
            return SoftMemoryLimitExceeded, self.args

    for field in ("__name__", "__qualname__", "__module__", "__doc__"):
        setattr(Told, field, getattr(SoftMemoryLimitExceeded, field))
    return Told


def _raise_in(thread: int | None, error: type[Exception] | None) -> bool:
    """Between two bytecodes of that thread, once; None: take back what has not been raised yet. Returns whether there is such a thread."""
    found = ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread or 0), None if error is None else ctypes.py_object(error))
    return bool(found)
