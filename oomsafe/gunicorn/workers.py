"""gunicorn's worker classes: where each keeps its app, and how each ends without losing a request."""

from __future__ import annotations

import inspect
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from oomsafe.log import attempt
from oomsafe.worker.background import Background, in_thread
from oomsafe.worker.guard import Guard
from oomsafe.worker.pressure import IDLE_MOMENT

#: Seconds between two heartbeats of UvicornWorker, and so between two ticks; by itself it beats every timeout / 2.
HEARTBEAT = 1

#: Seconds between two checks whether a draining worker's last request has ended.
DRAIN_POLL = 0.05

#: gunicorn's WORKER_BOOT_ERROR and APP_LOAD_ERROR: if a worker exits with one of these codes, the arbiter stops.
FATAL = (3, 4)


#: By a class's name: its kind, and the package of the class of that name. Any package, because UvicornWorker comes from several places.
KINDS = {
    "SyncWorker": ("sync", "gunicorn.workers."),
    "ThreadWorker": ("gthread", "gunicorn.workers."),
    "GeventWorker": ("gevent", "gunicorn.workers."),
    "EventletWorker": ("eventlet", "gunicorn.workers."),
    "TornadoWorker": ("tornado", "gunicorn.workers."),
    "ASGIWorker": ("asgi", "gunicorn.workers."),
    "GunicornWebWorker": ("aiohttp", "aiohttp."),
    "UvicornWorker": ("uvicorn", ""),
}


def kind_of(worker: Any) -> str:
    """Which of the classes above `worker` is or derives from; "other" for an unknown class."""
    for cls in type(worker).__mro__:
        kind, home = KINDS.get(cls.__name__, ("", ""))
        if kind and cls.__module__.startswith(home):
            return kind if kind != "uvicorn" or hasattr(getattr(worker, "config", None), "interface") else "other"
    return "other"


def background_of(worker: Any) -> Background | None:
    """How to run something slow beside the requests; None: in place, between two requests."""
    return in_thread if kind_of(worker) in ("uvicorn", "asgi", "aiohttp", "tornado") else None


def recycle_of(worker: Any, grace_period: float) -> Callable[[], None] | None:
    """A function that makes `worker` finish its requests and end; None if its class offers no way. It may be called from any thread.

    The asyncio classes need oomsafe's own drain, for `grace_period` seconds; the others lose no request by themselves.
    """
    kind = kind_of(worker)
    if kind in ("asgi", "uvicorn", "aiohttp", "tornado"):
        from oomsafe.gunicorn import asyncio_workers  # imported here, so that each worker loads only what it needs

        recycle_kind: Callable[[Any, float], Callable[[], None]] = getattr(asyncio_workers, f"recycle_{kind}")
        return recycle_kind(worker, grace_period)
    if kind == "other":
        return _recycle_as_gunicorn_would()
    wake = None
    if kind == "gevent":
        wake = _waking_gevent(worker)
        _name_listeners(worker)

    def recycle() -> None:
        worker.alive = False
        if kind == "gthread" and hasattr(worker, "method_queue"):
            worker.method_queue.defer(lambda: _close_idle(worker))  # wakes it from its select, as its own SIGTERM handler does
        elif kind == "sync" and worker.PIPE:
            os.write(worker.PIPE[1], b"1")  # likewise: an idle worker sleeps for timeout / 2
        elif wake is not None:
            if getattr(worker, "wsgi_handler", None) is not None:
                _announce_the_last(worker.wsgi_handler)
            wake()

    return recycle


def _close_idle(worker: Any) -> None:
    """In gthread's own thread: close idle kept-alive connections early, after IDLE_MOMENT, while this worker holds up the pool.

    By itself gunicorn waits for them for two seconds. This is checked in each turn of its loop, because each answered connection
    is kept alive from then on.
    """
    guard: Guard | None = getattr(worker, "oomsafe_guard", None)
    cap = getattr(worker, "_cap_keepalive", None)  # since gunicorn 27.0.1
    if cap is None or guard is None:
        return
    holds_up, end_idle = guard.holds_up, worker.murder_keepalived

    def ending_idle(*force: Any, **named: Any) -> None:
        if holds_up():
            cap(time.monotonic() + IDLE_MOMENT)
        end_idle(*force, **named)

    worker.murder_keepalived = ending_idle


def _recycle_as_gunicorn_would() -> Callable[[], None] | None:
    """A function that sends SIGTERM, on which gunicorn ends every class gracefully. None if the class has no handler of its own for it.

    A class that does not call init_signals() still has the arbiter's handler, which only queues the signal.
    """
    handler = signal.getsignal(signal.SIGTERM)
    if handler in (signal.SIG_DFL, signal.SIG_IGN) or hasattr(getattr(handler, "__self__", None), "SIG_QUEUE"):
        return None
    return lambda: os.kill(os.getpid(), signal.SIGTERM)


def _waking_gevent(worker: Any) -> Callable[[], None] | None:
    """A function that makes the worker check `alive` now: by itself it sleeps for a second between two checks, and grows meanwhile.

    In its module, `gevent` is replaced by an object whose sleep() can be cut short, and which sleeps less while the last
    requests end. None if gevent is not there.
    """
    module = next((sys.modules[cls.__module__] for cls in type(worker).__mro__ if cls.__name__ == "GeventWorker"), None)
    gevent: Any = getattr(module, "gevent", None)
    if module is None or gevent is None:
        return None
    from gevent.event import Event

    ending, loop = Event(), gevent.get_hub().loop  # the hub of this thread, because the waking thread may be another

    class Waking:
        def sleep(self, seconds: float = 0) -> None:
            if ending.is_set():
                gevent.sleep(min(seconds, DRAIN_POLL))
            else:
                ending.wait(seconds)

        def __getattr__(self, name: str) -> Any:
            return getattr(gevent, name)

    module.gevent = Waking()  # type: ignore[attr-defined]
    return lambda: loop.run_callback_threadsafe(ending.set)


def _announce_the_last(handler: Any) -> None:
    """Make gevent's pywsgi send `Connection: close` from now on: by itself it keeps connections alive until they are cut."""
    start = handler.start_response

    def closing(self: Any, status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
        keeps = not status.startswith("101") and all(name.lower() != "connection" for name, _ in headers)
        return start(self, status, [*headers, ("Connection", "close")] if keeps else headers, exc_info)

    handler.start_response = closing


def _name_listeners(worker: Any) -> None:
    """Make a listener's address available to its connections after the listener is closed.

    gunicorn reads the address when the connection's greenlet runs, some time after the accept: a worker
    that ends in between would drop the connection with EBADF.
    """
    handle = worker.handle
    named = {listener: _Listener(listener) for listener in worker.sockets}
    worker.handle = lambda listener, *connection: handle(named.get(listener, listener), *connection)


class _Listener:
    """A listener that knows its address even when it is closed."""

    def __init__(self, listener: Any) -> None:
        self._listener = listener
        self._name = listener.getsockname()

    def getsockname(self) -> Any:
        return self._name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._listener, name)


def spare_arbiter(worker: Any, pause: float) -> None:
    """Make a worker that fails to boot exit with a code for which the arbiter does not stop the whole service.

    For workers that are forked because one was recycled, while others serve. It exits after `pause`
    seconds, because gunicorn forks the next one at once.
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
            worker.log.error("a worker failed to boot; the others keep serving: %r", error, exc_info=error)
        else:
            return
        time.sleep(pause)
        raise SystemExit(1)

    worker.init_process = booting


def left_alone(worker: Any) -> str | None:
    """Why the app can't be wrapped in the middleware; None if it is known to be WSGI or ASGI, and its class calls it as such."""
    kind, app = kind_of(worker), _app(worker)
    if kind == "other":
        return f"what {type(worker).__name__} serves is not known to be WSGI or ASGI"
    if kind == "aiohttp":
        return "an aiohttp app is neither WSGI nor ASGI"
    if kind == "asgi":
        return None if _takes(app, 3) else "the app is not ASGI 3"
    if kind == "uvicorn" and worker.config.interface != "wsgi":
        return None if _is_asgi3(app) else "the app is not ASGI 3"
    if (kind == "uvicorn" and worker.config.factory) or (kind == "tornado" and _is_tornados(app)):
        return "the app is not WSGI"
    return None if _is_wsgi(app) else "the app is not WSGI"


def wrap_app(worker: Any, guard: Guard) -> None:
    """Wrap the app in the middleware, if left_alone() is None. Every class reads the app later, in run() or at each request."""
    kind, app = kind_of(worker), _app(worker)
    if kind == "asgi":
        worker.asgi = _asgi(app, guard)
    else:
        worker.wsgi = _asgi(app, guard) if kind == "uvicorn" and worker.config.interface != "wsgi" else _wsgi(app, guard)


def _app(worker: Any) -> Any:
    return getattr(worker, "asgi" if kind_of(worker) == "asgi" else "wsgi", None)


def _asgi(app: Any, guard: Guard) -> Any:
    from oomsafe.asgi.middleware import MemoryMiddleware

    guard.at_the_door = True
    return MemoryMiddleware(app, guard=guard)


def _wsgi(app: Any, guard: Guard) -> Any:
    from oomsafe.wsgi.middleware import MemoryMiddleware

    return MemoryMiddleware(app, guard=guard)


def _is_asgi3(app: Any) -> bool:
    """The test of uvicorn's interface "auto": the middleware must not make an ASGI 2 app look like an ASGI 3 app."""
    call = app if inspect.isfunction(app) else type(app).__call__
    return inspect.iscoroutinefunction(call)


def _is_tornados(app: Any) -> bool:
    """The test of gunicorn's tornado class, which treats every other app as WSGI."""
    from tornado.web import Application
    from tornado.wsgi import WSGIContainer

    return isinstance(app, (Application, WSGIContainer))


def _is_wsgi(app: Any) -> bool:
    """Whether `app` can be called with an environ and start_response, and returns a body, not a coroutine."""
    is_async = inspect.iscoroutinefunction(app) or inspect.iscoroutinefunction(getattr(type(app), "__call__", None))  # noqa: B004
    return _takes(app, 2) and not is_async


def _takes(app: Any, arguments: int) -> bool:
    """Whether `app` can be called with this many arguments; True also if it is written in C and has no signature."""
    if not callable(app):
        return False
    try:
        # a decorated function may have a different signature than the one that it wraps
        inspect.signature(app, follow_wrapped=False).bind(*[None] * arguments)
    except TypeError:
        return False
    except ValueError:
        pass
    return True


def tick_with(worker: Any, guard: Guard) -> None:
    """Run the guard's tick at every heartbeat, so that it measures also while no requests come."""
    notify = worker.notify

    def ticking() -> None:
        notify()
        attempt("ready", "gunicorn", guard.ready)  # the first heartbeat comes from the class's loop, so the worker serves
        guard.tick()

    worker.notify = ticking
    kind = kind_of(worker)
    if kind == "sync":
        _wait_less(worker, guard)
    elif kind == "uvicorn":
        worker.config.timeout_notify = min(HEARTBEAT, worker.config.timeout_notify)
    elif kind == "tornado":
        guard.ready()  # its first heartbeat comes after it has served for a second: by then it may hold anything


def _wait_less(worker: Any, guard: Guard) -> None:
    """Wake an idle sync worker when the guard has something to check, as if it had waited for `timeout` / 2 in vain.

    Otherwise it sleeps for `timeout` / 2: meanwhile a thread of its app may fill the memory, and an order has to wait.
    """
    wait = worker.wait

    def waiting(timeout: float) -> Any:
        return wait(min(timeout, guard.pause))

    worker.wait = waiting
