"""The soft memory limits of a solo node's tasks: nothing can stop a task there, but it has the main thread, so it can be told."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from typing import Any

from oomsafe.celery.limits import TaskLimits
from oomsafe.errors import SoftMemoryLimitExceeded
from oomsafe.policy.text import printable
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
        self._slot = board.reserve()
        if self._slot is not None:
            self._slot.claim()
        self._name, self._last, self._ticket = "", 0, 0
        self._watcher = Watcher(board, lambda: self._ticket != 0, lambda ticket: ticket == self._ticket, dry_run=dry_run)
        signal.signal(TELL, self._told)

    def telling(self, target: Callable[..., Any]) -> Callable[..., Any]:
        """Celery's tracer, whose task is told; it is called with (name, id, the message's headers, ...)."""

        def told(*args: Any, **options: Any) -> Any:
            headers = args[2] if len(args) > 2 and isinstance(args[2], dict) else {}
            try:
                self._take_up(str(args[0]) if args else "?", headers)
                return target(*args, **options)
            finally:
                self._put_down()

        return told

    def _take_up(self, name: str, headers: Mapping[str, Any]) -> None:
        self._put_down()  # the last one's end may have been where it was told
        ceiling = self._limits.of(name, headers)
        if self._slot is None or ceiling is None or ceiling.soft is None:
            return
        self._last += 1
        self._name, self._ticket = name, self._last
        self._watcher.watch(self._last, ceiling._replace(hard=None))
        self._slot.take_up(self._last, self._guard.measure())

    def _put_down(self) -> None:
        if self._ticket and self._slot is not None:
            self._ticket = 0
            self._slot.put_down()

    def _told(self, *_: object) -> None:
        ticket, used, limit = self._slot.told_of_limit if self._slot is not None else (0, 0, 0)
        if self._ticket and ticket == self._ticket:
            raise SoftMemoryLimitExceeded(printable(self._name), used, limit)
