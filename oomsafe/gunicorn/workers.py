"""gunicorn's worker classes: where each keeps its app, and its own way to end without losing a request."""

from __future__ import annotations

import inspect
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from oomsafe.pool.guard import Background, Guard
from oomsafe.pool.log import log

#: Seconds between two heartbeats of UvicornWorker, and so between two ticks; its own are timeout / 2 apart.
HEARTBEAT = 1

#: Seconds between two looks at whether a draining worker's last request has ended.
DRAIN_LOOK = 0.05

#: gunicorn's WORKER_BOOT_ERROR and APP_LOAD_ERROR: at these exit codes of a worker, the arbiter ends everything.
FATAL = (3, 4)


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


def recycle_of(worker: Any, grace_period: float) -> Callable[[], None]:
    """A function that makes `worker` finish what it has, and end. It may be called from any thread.

    The asyncio classes need oomsafe's own drain, for `grace_period` seconds; the others lose nothing by themselves.
    """
    kind = kind_of(worker)
    if kind in ("asgi", "uvicorn"):
        from oomsafe.gunicorn import asyncio_workers  # each worker loads what it needs

        return (asyncio_workers.recycle_asgi if kind == "asgi" else asyncio_workers.recycle_uvicorn)(worker, grace_period)
    wake = None
    if kind == "gevent":
        wake = _waking_gevent(worker)
        _name_listeners(worker)

    def recycle() -> None:
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


def _name_listeners(worker: Any) -> None:
    """Have a connection know its listener's address when the listener is closed already.

    gunicorn asks for it when the connection's greenlet runs, some time after it was accepted: a worker
    that ends in between drops the connection with EBADF.
    """
    handle = worker.handle
    named = {listener: _Listener(listener) for listener in worker.sockets}
    worker.handle = lambda listener, *connection: handle(named.get(listener, listener), *connection)


class _Listener:
    """A listener, open or closed."""

    def __init__(self, listener: Any) -> None:
        self._listener = listener
        self._name = listener.getsockname()

    def getsockname(self) -> Any:
        return self._name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._listener, name)


def spare_arbiter(worker: Any, pause: float) -> None:
    """Have a worker that fails to boot exit with another code than those for which the arbiter gives up the whole service.

    For workers that are forked because one was recycled: the others serve. It fails slowly, after `pause`
    seconds, for gunicorn forks the next one at once.
    """
    boot = worker.init_process

    def booting() -> None:
        try:
            boot()
        except SystemExit as ended:
            if ended.code not in FATAL:
                raise
        except Exception as error:
            if worker.booted:
                raise
            worker.log.error("a worker failed to boot, and the others serve on: %r", error, exc_info=error)
        else:
            return
        time.sleep(pause)
        raise SystemExit(1)

    worker.init_process = booting


def wrap_app(worker: Any, guard: Guard) -> None:
    """Put the middleware round the app. Every class reads it later, in run() or at each request."""
    kind = kind_of(worker)
    if kind == "asgi":
        worker.asgi = _asgi(worker.asgi, guard)
    elif kind != "uvicorn" or worker.config.interface == "wsgi":
        from oomsafe.wsgi.middleware import MemoryMiddleware

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
        guard.ready()  # its first heartbeat is in every class's loop: it serves
        guard.tick()

    worker.notify = ticking
    if kind_of(worker) == "uvicorn":
        worker.config.timeout_notify = min(HEARTBEAT, worker.config.timeout_notify)
