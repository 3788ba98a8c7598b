"""gunicorn's worker classes: where each keeps its app, and its own way to end without losing a request."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable
from typing import Any

from oomsafe.pool.guard import Background, Guard
from oomsafe.pool.meter import log

#: Seconds between two heartbeats of UvicornWorker, and so between two ticks; its own are timeout / 2 apart.
HEARTBEAT = 1


def kind_of(worker: Any) -> str:
    """Which of the classes below `worker` is, by what it has: people derive their own."""
    names = {cls.__name__ for cls in type(worker).__mro__}
    if "UvicornWorker" in names:
        return "uvicorn"
    if "ASGIWorker" in names:
        return "asgi"
    if "ThreadWorker" in names:
        return "gthread"
    return "sync" if "SyncWorker" in names else "other"


def background_of(worker: Any) -> Background | None:
    """How to run something slow beside the requests; None: in place, between two of them."""
    if kind_of(worker) not in ("uvicorn", "asgi"):
        return None
    from oomsafe.asgi.middleware import in_thread

    return in_thread


def recycle_of(worker: Any) -> Callable[[], None]:
    """A function that makes `worker` finish what it has, and end. It may be called from any thread."""
    kind = kind_of(worker)
    server = _capture_uvicorn_server(worker) if kind == "uvicorn" else None

    def recycle() -> None:
        if server is not None:
            server.end()
            return
        worker.alive = False
        if kind == "gthread" and hasattr(worker, "method_queue"):
            worker.method_queue.defer(lambda: None)  # out of its select, as its own SIGTERM handler does
        elif kind == "sync" and worker.PIPE:
            os.write(worker.PIPE[1], b"1")  # likewise: an idle one sleeps for timeout / 2

    return recycle


def wrap_app(worker: Any, guard: Guard) -> None:
    """Put the middleware round the app. Every class reads it later, in run() or at each request."""
    kind = kind_of(worker)
    if kind == "asgi":
        worker.asgi = _asgi(worker.asgi, guard)
    elif kind != "uvicorn" or worker.config.interface == "wsgi":
        from oomsafe.wsgi.middleware import MemoryMiddleware  # each worker loads the one that it needs

        worker.wsgi = MemoryMiddleware(worker.wsgi, guard=guard)
    elif _is_asgi3(worker.wsgi):
        worker.wsgi = _asgi(worker.wsgi, guard)
    else:
        log.warning("the app is not ASGI 3, so its requests are not measured: only the worker's memory is")


def _asgi(app: Any, guard: Guard) -> Any:
    from oomsafe.asgi.middleware import MemoryMiddleware

    return MemoryMiddleware(app, guard=guard)


def _is_asgi3(app: Any) -> bool:
    """What uvicorn's interface "auto" asks: the middleware must not make an ASGI 2 app look like another."""
    call = app if inspect.isfunction(app) else type(app).__call__
    return inspect.iscoroutinefunction(call)


def tick_with(worker: Any, guard: Guard) -> None:
    """Have the guard look at every heartbeat: also when no request comes."""
    notify = worker.notify

    def ticking() -> None:
        notify()
        guard.tick()

    worker.notify = ticking
    if kind_of(worker) == "uvicorn":
        worker.config.timeout_notify = min(HEARTBEAT, worker.config.timeout_notify)


class _UvicornServer:
    """The Server that UvicornWorker will make in run(), once it is there."""

    def __init__(self) -> None:
        self.server: Any = None
        self._ended = False

    def note(self, server: Any) -> None:
        self.server = server
        if self._ended:
            server.should_exit = True

    def end(self) -> None:
        # not by SIGTERM: uvicorn raises the signal anew when it has shut down, and worker_exit is never called
        self._ended = True
        if self.server is not None:
            self.server.should_exit = True


def _capture_uvicorn_server(worker: Any) -> _UvicornServer:
    """UvicornWorker keeps its Server in a local variable: have the class tell us when one starts."""
    captured = _UvicornServer()
    for cls in type(worker).__mro__:
        module = sys.modules.get(cls.__module__)
        plain = getattr(module, "Server", None)
        if cls.__name__ != "UvicornWorker" or plain is None:
            continue

        class NotedServer(plain):  # type: ignore[misc,valid-type]  # whichever uvicorn is installed
            async def startup(self, *args: Any, **kwargs: Any) -> None:
                captured.note(self)
                await super().startup(*args, **kwargs)

            async def shutdown(self, *args: Any, **kwargs: Any) -> None:
                await super().shutdown(*args, **kwargs)
                # after SIGTERM, uvicorn raises the signal anew, and gunicorn's worker_exit is never called
                guard = getattr(worker, "oomsafe_guard", None)
                if guard is not None:
                    guard.retire()

        module.Server = NotedServer  # type: ignore[union-attr]
        break
    return captured
