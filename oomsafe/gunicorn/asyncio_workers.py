"""How each asyncio class ends without losing a request: asgi, UvicornWorker, aiohttp's classes and tornado."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

from oomsafe.drain.drain import Drain, Heart
from oomsafe.drain.stalled import Owed, Wait
from oomsafe.drain.uvicorn import UvicornDrain

#: Seconds that a worker gives a connection after the grace period.
LAST_MOMENT = 1


def recycle_asgi(worker: Any, grace_period: float) -> Callable[[], None]:
    """The recycle function for gunicorn's own asgi class, which counts its connections in `nr_conns`.

    `worker.alive` stays true during the drain. If it were false, the worker would close connections that were promised to be kept
    alive, and its heartbeat would stop.
    """
    connections = _note_connections(worker)
    wake = _waking(worker)

    def finish(late: bool) -> None:
        if late:
            worker.cfg.set("graceful_timeout", LAST_MOMENT)
        worker.alive = False
        wake()

    worker._shutdown = _beating(worker, worker._shutdown, grace_period)
    drain = Drain(worker.loop, grace_period, lambda: worker.servers, lambda: _left(worker), finish, lambda: connections, _wait_of)

    def recycle() -> None:
        _close_what_is_announced(worker)
        drain.begin()

    return recycle


def _close_what_is_announced(worker: Any) -> None:
    """Have gunicorn's asgi class close connections itself: it ignores the middleware's `Connection: close`, and waits for its client.

    Its protocol is patched only when the drain begins, so that no earlier request pays for it.
    """
    _, protocol = _named(worker, "ASGIWorker", "ASGIProtocol")
    start = getattr(protocol, "_send_response_start", None)
    if start is None:
        return

    def announcing(self: Any, status: Any, headers: Any, request: Any, close: bool = False) -> None:  # noqa: ARG001  its signature
        self._keepalive = 0
        start(self, status, headers, request, close=True)

    protocol._send_response_start = announcing


def _waking(worker: Any) -> Callable[[], None]:
    """A function that makes the worker check `alive` now: by itself it sleeps for a second between two checks.

    In its module, `asyncio` is replaced by an object whose sleep() can be cut short. Cancelling its task would not do:
    if asyncio was imported twice, as by ddtrace, a module may know a different CancelledError than the
    one that is raised, and would report an error.
    """
    module, plain = _named(worker, "ASGIWorker", "asyncio")
    sleeping: set[Any] = set()

    def wake() -> None:
        for sleep in list(sleeping):
            _end(sleep)

    class Waking:
        async def sleep(self, seconds: float) -> None:
            sleep = worker.loop.create_future()
            timer = worker.loop.call_later(seconds, _end, sleep)
            sleeping.add(sleep)
            try:
                await sleep
            finally:
                timer.cancel()
                sleeping.discard(sleep)

        def __getattr__(self, name: str) -> Any:
            return getattr(plain, name)

    if module is not None:
        module.asyncio = Waking()
    return wake


def _end(sleep: Any) -> None:
    if not sleep.done():
        sleep.set_result(None)


def _note_connections(worker: Any) -> set[Any]:
    """A set that from now on holds the protocols of the open connections: gunicorn's asgi class only counts them."""
    connections: set[Any] = set()
    module, plain = _named(worker, "ASGIWorker", "ASGIProtocol")
    if plain is None:
        return connections

    class NotedProtocol(plain):  # type: ignore[misc,valid-type]  # whichever gunicorn is installed
        def connection_made(self, transport: Any) -> None:
            connections.add(self)
            super().connection_made(transport)

        def connection_lost(self, exc: Exception | None) -> None:
            connections.discard(self)
            super().connection_lost(exc)

    module.ASGIProtocol = NotedProtocol
    return connections


def _wait_of(protocol: Any) -> Wait | None:
    """What an open connection waits for from its client; None if it has work, or if that can't be known (uWSGI's protocol, gunicorn 24).

    An HTTP/2 connection is also made to end.
    """
    parser = getattr(protocol, "_callback_parser", None)
    if getattr(protocol, "_h2_conn", None) is not None:
        from oomsafe.gunicorn.goaway import end_http2  # imported here, because most workers have no HTTP/2

        return end_http2(protocol)
    if parser is None or getattr(protocol, "_websocket", None) or getattr(protocol, "_finishing_calls", None):
        return None
    if protocol._current_request is None:
        begun = bool(getattr(parser, "_buffer", b"")) or getattr(parser, "_state", "request_line") != "request_line"
        # after the first request, a timer runs from the end of a response until the next head is complete; until then it is idle
        return Wait(Owed.HEAD, begun) if begun or protocol.req_count <= 1 else Wait(Owed.NEXT, token=protocol.req_count)
    receiver = protocol._body_receiver
    waiter = getattr(receiver, "_waiter", None)
    return None if waiter is None or receiver._complete else Wait(Owed.BODY, token=waiter)


def _left(worker: Any) -> int:
    """The number of connections; if there are none, that of requests which still run after their response: ending the loop cancels them."""
    guard = getattr(worker, "oomsafe_guard", None)
    return int(worker.nr_conns) or (0 if guard is None else guard.meter.in_flight)


def recycle_uvicorn(worker: Any, grace_period: float) -> Callable[[], None]:
    """The recycle function for UvicornWorker, which creates its Server in run() by a name in its module: that name is replaced."""
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
            # after SIGTERM, uvicorn raises the signal again, and gunicorn's worker_exit is never called
            guard = getattr(worker, "oomsafe_guard", None)
            if guard is not None:
                guard.retire()

    module.Server = GuardedServer
    return drain.begin


def recycle_aiohttp(worker: Any, grace_period: float) -> Callable[[], None]:
    """The recycle function for aiohttp's classes, which by themselves close kept-alive connections that may have a request on its way.

    The sites that the worker starts later, in run(), are recorded, because they lead to its listeners and connections.
    """
    web: Any = importlib.import_module("aiohttp.web")
    sites: list[Any] = []
    start = web.SockSite.start

    async def noting(site: Any) -> None:
        await start(site)
        sites.append(site)

    web.SockSite.start = noting

    def finish(late: bool) -> None:
        for site in sites if late else ():
            site._runner._shutdown_timeout = LAST_MOMENT  # its own timeout would only start now, without a heartbeat
        worker.alive = False
        worker._notify_waiter_done()  # wakes it from its sleep of a second, as its own SIGQUIT handler does

    def connections() -> int:
        return sum(len(site._runner.server.connections) for site in sites)

    drain = Drain(worker.loop, grace_period, lambda: [site._server for site in sites], connections, finish)

    def recycle() -> None:
        _announce_the_last(web)
        drain.begin()

    return recycle


def _announce_the_last(web: Any) -> None:
    """Make each response that aiohttp begins from now on carry `Connection: close`; no earlier request pays for it."""
    prepare = web.StreamResponse.prepare

    async def closing(response: Any, request: Any) -> Any:
        response.force_close()
        return await prepare(response, request)

    web.StreamResponse.prepare = closing


def recycle_tornado(worker: Any, grace_period: float) -> Callable[[], None]:
    """The recycle function for gunicorn's tornado class, which by itself closes all connections after one to two seconds."""

    def recycle() -> None:
        # looked up here, because the server and its loop are created in run()
        server = worker.server
        Drain(
            worker.ioloop.asyncio_loop,
            grace_period,
            lambda: [_Stopping(server.stop)],
            lambda: len(server._connections),
            lambda _: _end_tornado(worker),
        ).begin()
        server.conn_params.no_keep_alive = True  # responses to later requests carry `Connection: close`

    return recycle


class _Stopping:
    """A tornado server in the form of a listener that Drain expects; tornado turns what it accepts into connections at once."""

    def __init__(self, stop: Callable[[], None]) -> None:
        self.close = stop

    async def wait_closed(self) -> None:
        """Return at once, because everything accepted is a connection by now."""


def _end_tornado(worker: Any) -> None:
    worker.alive = False
    worker.server_alive = False  # its server has stopped, so its next check of `alive` ends the loop
    worker.heartbeat()


def _named(worker: Any, worker_class: str, name: str) -> tuple[Any, Any]:
    """The module that defines `worker_class`, of which `worker` may be a subclass, and its attribute `name`; (None, None): not found."""
    for cls in type(worker).__mro__:
        module = sys.modules.get(cls.__module__)
        if cls.__name__ == worker_class and hasattr(module, name):
            return module, getattr(module, name)
    return None, None


def _beating(worker: Any, shutdown: Callable[[], Any], seconds: float) -> Callable[[], Any]:
    """`shutdown` with a heartbeat. Without one, gunicorn would kill the worker with a request in flight."""

    async def beating() -> None:
        with Heart(worker.tmp.notify, seconds):
            await shutdown()

    return beating
