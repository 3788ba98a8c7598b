"""A node's intake of tasks, which can be closed for a while and opened again."""

from __future__ import annotations

from collections import deque
from typing import Any

from oomsafe.pool.log import attempt, log


class Gate:
    """What comes to the node passes here on its way to the pool. Made once, with the consumer.

    Closed, the node consumes nothing, so what is in the broker stays there for other nodes. What it
    had prefetched is held here, unacknowledged: it is started when the gate opens, or goes back to the
    broker when the connection or the node ends. Without an event loop, one task may pass yet: the one
    that waits for a child already.
    """

    def __init__(self, consumer: Any) -> None:
        self.closed = False
        self._consumer = consumer
        self._held: deque[Any] = deque()
        self._says: str | None = None
        self._asked = False
        worker = consumer.controller
        self._start = worker._process_task
        # with an event loop the worker comes here from behind its semaphore, without one straight from its consumer
        if consumer.on_task_request == self._start:
            consumer.on_task_request = self._take
        worker._process_task = self._take

    def close(self, line: str | None = None) -> None:
        """Start no more tasks. From any thread, and again at each look. `line` is logged when nothing more comes."""
        self.closed = True
        self._says = line or self._says
        self._turn()

    def open(self) -> None:
        """Go on. From any thread."""
        self.closed = False
        self._turn()

    def forget(self) -> None:
        """The connection has gone, and with it the right to acknowledge what is held: the broker gives it to somebody again."""
        self._held.clear()

    def _turn(self) -> None:
        """In the thread that consumes: a timer fires there if there is an event loop, else that thread may be busy for long."""
        if self._consumer.hub:
            self._turned()
        elif not self._asked:
            self._asked = True
            self._consumer.call_soon(self._turned)

    def _turned(self) -> None:
        self._asked = False
        attempt("pausing the node" if self.closed else "resuming the node", "Celery", self._pause if self.closed else self._resume)

    def _take(self, request: Any) -> Any:
        if self.closed:
            self._held.append(request)
            return None
        return self._start(request)

    def _pause(self) -> None:
        if self._consumer.task_consumer is not None:
            # each time, for a reconnection opens the consumer anew
            self._consumer.task_consumer.cancel()
            if self._says is not None:
                log.warning("%s", self._says)
                self._says = None

    def _resume(self) -> None:
        if self._consumer.task_consumer is not None:
            self._consumer.task_consumer.consume()
        while self._held and not self.closed:
            self._start(self._held.popleft())
