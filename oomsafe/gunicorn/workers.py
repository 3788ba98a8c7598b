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

#: Seconds between two looks at whether a draining worker's last request has ended.
DRAIN_LOOK = 0.05


def kind_of(worker: Any) -> str:
    """Which of the classes below `worker` is, by what it has: people derive their own."""
    names = {cls.__name__ for cls in type(worker).__mro__}
    if "UvicornWorker" in names:
        return "uvicorn"
    if "ASGIWorker" in names:
        return "asgi"
    if "ThreadWorker" in names:
        return "gthread"
    if "GeventWorker" in names:
        return "gevent"
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
    wake = _waking_gevent(worker) if kind == "gevent" else None

    def recycle() -> None:
        if server is not None:
            server.end()
            return
        worker.alive = False
        if kind == "gthread" and hasattr(worker, "method_queue"):
            worker.method_queue.defer(lambda: None)  # out of its select, as its own SIGTERM handler does
        elif kind == "sync" and worker.PIPE:
            os.write(worker.PIPE[1], b"1")  # likewise: an idle one sleeps for timeout / 2
        elif wake is not None:
            wake()

    return recycle


def _waking_gevent(worker: Any) -> Callable[[], None] | None:
    """A function that has the worker look at `alive` now. It sleeps for a second between two looks, and grows meanwhile.

    Its sleep is one that can be cut short: in its module, `gevent` is replaced by one whose sleep()
    ends when it is told to, and which sleeps less while the last requests end.
    """
    module = next((sys.modules[cls.__module__] for cls in type(worker).__mro__ if cls.__name__ == "GeventWorker"), None)
    gevent: Any = getattr(module, "gevent", None)
    if module is None or gevent is None:
        return None
    from gevent.event import Event

    told, loop = Event(), gevent.get_hub().loop  # the hub of this thread: whoever wakes may be another

    class Waking:
        def sleep(self, seconds: float = 0) -> None:
            if told.is_set():
                gevent.sleep(min(seconds, DRAIN_LOOK))
            else:
                told.wait(seconds)

        def __getattr__(self, name: str) -> Any:
            return getattr(gevent, name)

    module.gevent = Waking()  # type: ignore[attr-defined]
    return lambda: loop.run_callback_threadsafe(told.set)


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
