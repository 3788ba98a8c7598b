"""How a uvicorn Server ends without losing a request: for UvicornWorker in gunicorn, and for uvicorn's own workers."""

from __future__ import annotations

import asyncio
from typing import Any

from oomsafe.asgi.drain import Drain

#: Seconds that a request has, after its grace period, to see that it is cancelled.
LAST_MOMENT = 1


class UvicornDrain:
    """One Server's. It may be asked to end before the server is there, and from any thread."""

    def __init__(self, grace_period: float) -> None:
        self._grace_period = grace_period
        self._drain: Drain | None = None
        self._asked = False

    def serves(self, server: Any) -> None:
        """This is the Server, in its own loop, and it has its listeners."""
        self._drain = Drain(
            asyncio.get_running_loop(),
            self._grace_period,
            lambda: server.servers,
            lambda: len(server.server_state.connections) or len(server.server_state.tasks),
            lambda late: _end(server, late),
        )
        if self._asked:
            self._drain.begin()

    def begin(self) -> None:
        """Have it end."""
        self._asked = True
        if self._drain is not None:
            self._drain.begin()


def _end(server: Any, late: bool) -> None:
    if late and server.config.timeout_graceful_shutdown is None:
        # what was not done within its grace period, an endless stream, would never be
        server.config.timeout_graceful_shutdown = LAST_MOMENT
    # not by SIGTERM: uvicorn raises the signal anew when it has shut down, and gunicorn's worker_exit is never called
    server.should_exit = True
