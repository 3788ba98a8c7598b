"""gunicorn's two asyncio classes, asgi and UvicornWorker: how each ends without losing a request."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from typing import Any

from oomsafe.asgi.drain import Drain, Heart
from oomsafe.asgi.uvicorn_server import UvicornDrain

#: Seconds that gunicorn's asgi worker gives a connection after its grace period.
LAST_MOMENT = 1


def recycle_asgi(worker: Any, grace_period: float) -> Callable[[], None]:
    """For gunicorn's own asgi class, of whose connections `nr_conns` is the number.

    `worker.alive` stays true while it drains: false, it would close connections that were promised to be kept
    alive, and its heartbeat would stop.
    """
    main: list[asyncio.Task[Any] | None] = []
    notify = worker.notify

    def noting() -> None:
        if not main:
            main.append(asyncio.current_task())
        notify()

    def finish(late: bool) -> None:
        if late:
            worker.cfg.set("graceful_timeout", LAST_MOMENT)
        was_alive, worker.alive = worker.alive, False
        if was_alive and main and main[0] is not None:
            main[0].cancel()  # out of its sleep of a second between two looks at `alive`, which it takes for its end

    worker.notify = noting
    worker._shutdown = _beating(worker, worker._shutdown, grace_period)
    drain = Drain(worker.loop, grace_period, lambda: worker.servers, lambda: _left(worker), finish)

    def recycle() -> None:
        _close_what_is_announced(worker)
        drain.begin()

    return recycle


def _close_what_is_announced(worker: Any) -> None:
    """gunicorn's asgi class does not see the middleware's `Connection: close`, and would wait for its client to close.

    Its protocol is told now, and not before: no request pays for it.
    """
    _, protocol = _named(worker, "ASGIWorker", "ASGIProtocol")
    start = getattr(protocol, "_send_response_start", None)
    if start is None:
        return

    def closing(self: Any, status: Any, headers: Any, request: Any, close: bool = False) -> None:  # noqa: ARG001  its signature
        self._keepalive = 0
        start(self, status, headers, request, close=True)

    protocol._send_response_start = closing


def _left(worker: Any) -> int:
    """The connections; when none is left, what goes on behind the responses, which is cancelled when the loop ends."""
    guard = getattr(worker, "oomsafe_guard", None)
    return int(worker.nr_conns) or (0 if guard is None else guard.in_flight)


def recycle_uvicorn(worker: Any, grace_period: float) -> Callable[[], None]:
    """For UvicornWorker: it makes its Server in run(), under the name that its module imported, so that name is ours."""
    drain = UvicornDrain(grace_period)
    module, plain = _named(worker, "UvicornWorker", "Server")
    if plain is None:
        return drain.begin

    class GuardedServer(plain):  # type: ignore[misc,valid-type]  # whichever uvicorn is installed
        async def startup(self, *args: Any, **kwargs: Any) -> None:
            await super().startup(*args, **kwargs)
            drain.serves(self)

        async def shutdown(self, *args: Any, **kwargs: Any) -> None:
            with Heart(worker.tmp.notify, grace_period):
                await super().shutdown(*args, **kwargs)
            # after SIGTERM, uvicorn raises the signal anew, and gunicorn's worker_exit is never called
            guard = getattr(worker, "oomsafe_guard", None)
            if guard is not None:
                guard.retire()

    module.Server = GuardedServer
    return drain.begin


def _named(worker: Any, worker_class: str, name: str) -> tuple[Any, Any]:
    """The module of a worker class that people derive their own from, and what it calls `name`; None where it has no such thing."""
    for cls in type(worker).__mro__:
        module = sys.modules.get(cls.__module__)
        if cls.__name__ == worker_class and hasattr(module, name):
            return module, getattr(module, name)
    return None, None


def _beating(worker: Any, shutdown: Callable[[], Any], seconds: float) -> Callable[[], Any]:
    """Its heartbeat goes on while it shuts down: it stops, and gunicorn would kill it for that with a request in flight."""

    async def beating() -> None:
        with Heart(worker.tmp.notify, seconds):
            await shutdown()

    return beating
