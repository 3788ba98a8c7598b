"""How a uvicorn Server ends without losing a request: for UvicornWorker in gunicorn, and for uvicorn's own workers."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
from typing import Any

from oomsafe.drain.drain import Drain
from oomsafe.drain.stalled import Owed, Wait
from oomsafe.log import log_with
from oomsafe.policy.settings import Policy
from oomsafe.worker.current import Way

#: Seconds that a request has, after the grace period, to handle its cancellation.
LAST_MOMENT = 1


class UvicornDrain:
    """The drain of one Server. begin() may be called from any thread, even before the server exists."""

    def __init__(self, grace_period: float) -> None:
        self._grace_period = grace_period
        self._drain: Drain | None = None
        self._asked = False

    def serves(self, server: Any) -> None:
        """Set the Server, once it has its listeners. Called in the server's own loop."""
        self._drain = Drain(
            asyncio.get_running_loop(),
            self._grace_period,
            lambda: server.servers,
            lambda: len(server.server_state.connections) or len(server.server_state.tasks),
            lambda late: _end(server, late),
            lambda: server.server_state.connections,
            _wait_of,
        )
        if self._asked:
            self._drain.begin()

    def begin(self) -> None:
        """Drain and end the server."""
        self._asked = True
        if self._drain is not None:
            self._drain.begin()


def own_recycle(policy: Policy) -> Way | None:
    """How the uvicorn worker that runs this loop, without our supervisor, is recycled. None if it should not be, or is no uvicorn."""
    server = _running_server()
    if server is None:
        return None
    log_with_uvicorn()
    if not recycles_alone(server.config):
        return None
    drain = UvicornDrain(policy.grace_period)
    drain.serves(server)
    return Way(drain.begin, server.config.workers)


def own_name() -> str:
    """The import path of the app that the uvicorn Server of this loop serves; empty: there is none, or no path. Called in a loop."""
    app = getattr(getattr(_running_server(), "config", None), "app", None)
    return app if isinstance(app, str) else ""


def serves_here() -> bool:
    """Whether a uvicorn Server of this loop listens. Called in a loop."""
    return bool(getattr(_running_server(), "servers", None))


def running_loop() -> asyncio.AbstractEventLoop | None:
    """The running asyncio loop of this thread; None if trio runs the app, where there is no uvicorn either."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _running_server() -> Any:
    """The uvicorn Server that created the current task; if none did, the only Server of this loop. Else None.

    An app gets no reference to its Server. The handler of SIGTERM is the Server's method, but only until the app sets its own;
    the Server's serve() is awaited by one of the loop's tasks for as long as it serves.
    """
    if running_loop() is None:
        return None
    servers = [server for task in asyncio.all_tasks() if (server := _awaited_server(task)) is not None]
    current = asyncio.current_task()
    servers = [server for server in servers if current in server.server_state.tasks] or servers
    return servers[0] if len(servers) == 1 else None


def _awaited_server(task: asyncio.Task[Any]) -> Any:
    """The Server that has a method on the task's stack; None: there is none."""
    awaited: Any = task.get_coro()
    while (frame := getattr(awaited, "cr_frame", None)) is not None:
        server = frame.f_locals.get("self")
        if all(hasattr(server, name) for name in ("server_state", "servers", "should_exit", "config")):
            return server
        awaited = awaited.cr_await
    return None


def recycles_alone(config: Any) -> bool:
    """Whether a uvicorn process without our supervisor may end: only if something starts another in its place.

    uvicorn's own supervisor of several workers does; its reloader waits for a file to change. For a
    single process, the user says so with OOMSAFE_SINGLE=exit.
    """
    if os.environ.get("OOMSAFE_SINGLE") == "exit":
        return not config.should_reload
    return config.workers > 1 and not config.should_reload and _is_worker()


def _is_worker() -> bool:
    """Whether uvicorn's supervisor has started this process.

    `workers` alone is not enough: it may come from WEB_CONCURRENCY, which a Server that a program runs by itself ignores.
    """
    target = getattr(multiprocessing.current_process(), "_target", None)
    return getattr(target, "__module__", None) == "uvicorn._subprocess"


def log_with_uvicorn() -> None:
    """Send our log lines where uvicorn's go. Called once uvicorn's log is configured."""
    log_with(logging.getLogger("uvicorn.error"))


def _wait_of(protocol: Any) -> Wait | None:
    """What an open connection waits for from its client; None if it has work, or if that can't be known."""
    if not hasattr(protocol, "cycle"):
        return None  # a websocket, HTTP/2
    cycle = protocol.cycle
    if cycle is None or cycle.response_complete:
        # the keep-alive timer runs from the end of a response until more data arrives
        idle = protocol.timeout_keep_alive_task is not None
        begun = _next_has_begun(protocol)
        if idle and not begun:
            return Wait(Owed.NEXT, token=protocol.timeout_keep_alive_task)
        return Wait(Owed.HEAD, begun or cycle is not None)
    # the future on which the app waits in receive(): a new one after each part
    waiting = getattr(cycle.message_event, "_waiters", None)
    if not waiting or not cycle.more_body or cycle.body or cycle.response_started:
        return None
    return Wait(Owed.BODY, token=waiting[0])


def _next_has_begun(protocol: Any) -> bool:
    """Whether any part of the next request's head has arrived: httptools' protocol then makes a new scope, h11's keeps it in a buffer."""
    if protocol.scope is not getattr(protocol.cycle, "scope", None):
        return True
    return bool(getattr(getattr(protocol, "conn", None), "trailing_data", (b"",))[0])


def _end(server: Any, late: bool) -> None:
    if late and server.config.timeout_graceful_shutdown is None:
        # work that did not finish within the grace period, such as an endless stream, would never finish
        server.config.timeout_graceful_shutdown = LAST_MOMENT
    # not by SIGTERM: uvicorn raises the signal again after its shutdown, and gunicorn's worker_exit is never called
    server.should_exit = True
