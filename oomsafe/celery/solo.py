"""The soft memory limits of a solo node's tasks: nothing can stop a task there, but it has the main thread, so it can be told."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from typing import Any

from oomsafe.celery.errors import info_of
from oomsafe.celery.limits import TaskLimits, heed, task_of
from oomsafe.errors import SoftMemoryLimitExceeded
from oomsafe.pool.guard import Guard
from oomsafe.pool.scoreboard import Scoreboard
from oomsafe.pool.watcher import TELL, Watcher


class SoftLimits:
    """Tells the task that runs. All of it in the main thread, but for the watcher's look."""

    def __init__(self, limits: TaskLimits, guard: Guard, dry_run: bool) -> None:
        """Raises ValueError outside of the main thread, where no signal can be heard."""
        self._limits = limits
        self._guard = guard
        board = Scoreboard.private()
        slot = board.reserve()
        assert slot is not None, "a new board has a slot"
        slot.claim()
        self._slot = slot
        self._name, self._last, self._ticket = "", 0, 0
        self._watcher = Watcher(board, lambda: self._ticket != 0, lambda ticket: ticket == self._ticket, dry_run=dry_run)
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
        self._name, self._ticket = name, self._last
        self._watcher.watch(self._last, ceiling._replace(hard=None))
        self._guard.measure()
        self._slot.take_up(self._last, self._guard.without_files)

    def _put_down(self) -> None:
        if self._ticket:
            self._ticket = 0
            self._slot.put_down()
