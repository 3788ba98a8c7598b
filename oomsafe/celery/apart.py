"""Tasks that may have taken a whole node down are run apart: one at a time, while nothing else runs, so that it shows who did it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

from oomsafe.celery.pool_guard import PoolGuard
from oomsafe.celery.redelivery import Turn
from oomsafe.log import attempt, log
from oomsafe.policy.text import printable

#: Seconds between two looks at whether the next may be started.
STEP = 0.1


class Apart:
    """Of one node. All of it in the thread that consumes.

    A suspect waits here until all else has ended; then it runs alone for a while, and when it lasts longer, others may be
    started beside it again. Nobody gives up the broker's place in a queue for it: what waits is unacknowledged.
    """

    def __init__(
        self, consumer: Any, start: Callable[[Any], Any], units: bool, close: Callable[[], None], open_: Callable[[], None]
    ) -> None:
        """`start` hands a task to the pool; after `close` it is from here only that any is started, until `open_`.

        `units`: each task comes with one of the node's semaphore.
        """
        self._consumer = consumer
        self._start = start
        self._units = units
        self._close = close
        self._open = open_
        self._suspects: deque[tuple[Any, float]] = deque()
        self._waiting: list[Any] = []
        self._running: Any = None
        self._until = 0.0
        self._armed = False

    def keeps(self, request: Any) -> bool:
        """Whether this task is kept back, to be started from here."""
        if not request.task.acks_late:
            return False
        turn, seconds = self._guard.redelivery.turn(request)
        if turn is Turn.NOW:
            return False
        if turn is Turn.LATER:
            self._waiting.append(request)
        else:
            self._suspects.append((request, seconds))
            log.warning(
                "%s may have taken down the node that it ran on: it waits until all else here has ended, to run alone", _named(request)
            )
        if self._units:
            # not at once: that starts the next, which may be kept as well, and so on
            self._consumer.call_soon(self._consumer.controller._quick_release)
        self._arm(STEP)
        return True

    def forget(self) -> None:
        """The connection has gone: what waits comes again."""
        self._suspects.clear()
        self._waiting.clear()
        self._running = None
        self._guard.redelivery.runs_alone(False)

    @property
    def _guard(self) -> PoolGuard:
        found: PoolGuard = self._consumer.pool.guard
        return found

    def _arm(self, seconds: float) -> None:
        if not self._armed:
            self._armed = True
            # a node without an event loop has a thread for its timer
            self._consumer.timer.call_after(seconds, self._step if self._consumer.hub else lambda: self._consumer.call_soon(self._step))

    def _step(self) -> None:
        self._armed = False
        attempt("running suspects apart", "Celery", self._advance)
        if self._suspects or self._waiting or self._running is not None:
            self._arm(STEP if self._suspects or self._running is not None else 1.0)

    def _advance(self) -> None:
        waiting, self._waiting = self._waiting, []
        for request in waiting:
            self._consumer.on_task_request(request)
        if self._running is not None and not self._guard.runs(self._running):
            self._running = None
            self._guard.redelivery.runs_alone(False)
            if self._units:
                self._consumer.controller._quick_acquire(_nothing)  # its end has given back a unit that it did not have
        if self._running is None and self._suspects:
            self._close()
            if not self._guard.jobs:
                self._run(*self._suspects.popleft())
        elif self._running is None or time.monotonic() >= self._until:
            self._guard.redelivery.runs_alone(False)
            self._open()

    def _run(self, request: Any, seconds: float) -> None:
        log.warning("%s runs alone, and for %d s nothing else is started here", _named(request), seconds)
        self._guard.redelivery.runs_alone(True)
        self._running, self._until = request, time.monotonic() + seconds
        self._start(request)


def _named(request: Any) -> str:
    return f"task {printable(str(request.name))}[{printable(str(request.id))}]"


def _nothing() -> None:
    """For a unit that nobody needs."""
