"""A node's intake of tasks, which can be closed for a while and opened again."""

from __future__ import annotations

from collections import deque
from typing import Any

from oomsafe.celery.apart import Apart
from oomsafe.log import attempt, failed, log

#: Why a gate may be closed.
MEMORY, SUSPECTS = "memory", "suspects"


class Gate:
    """What comes to the node passes here on its way to the pool. Made once, with the consumer.

    Closed, the node consumes nothing, so what is in the broker stays there for other nodes. What it
    had prefetched is held here, unacknowledged: it is started when the gate opens, or goes back to the
    broker when the connection or the node ends. Without an event loop, one task may pass yet: the one
    that waits for a child already.
    """

    def __init__(self, consumer: Any) -> None:
        self._reasons: set[str] = set()
        self._consumer = consumer
        self._held: deque[Any] = deque()
        self._says: str | None = None
        self._asked = False
        worker = consumer.controller
        self._start = worker._process_task
        # with an event loop the worker comes here from behind its semaphore, without one straight from its consumer
        units = consumer.on_task_request != self._start
        if not units:
            consumer.on_task_request = self._take
        self._apart = Apart(consumer, self._start, units, lambda: self.close(reason=SUSPECTS), lambda: self.open(SUSPECTS))
        worker._process_task = self._take

    @property
    def closed(self) -> bool:
        """Whether no task is started."""
        return bool(self._reasons)

    def close(self, line: str | None = None, reason: str = MEMORY) -> None:
        """Start no more tasks. From any thread, and again at each look. `line` is logged when nothing more comes."""
        before = reason in self._reasons
        self._reasons.add(reason)
        self._says = line or self._says
        if reason == MEMORY or not before:
            self._turn()

    def open(self, reason: str = MEMORY) -> None:
        """Go on, if there is no other reason not to. From any thread."""
        before = self.closed
        self._reasons.discard(reason)
        if before and not self.closed:
            self._turn()

    def forget(self) -> None:
        """The connection has gone, and with it the right to acknowledge what is held: the broker gives it to somebody again."""
        self._held.clear()
        self._reasons.discard(SUSPECTS)
        attempt("forgetting suspects", "Celery", self._apart.forget)

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
        try:
            if self._apart.keeps(request):
                return None
        except Exception as error:
            failed("running suspects apart", "Celery", error)
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
            self._take(self._held.popleft())
