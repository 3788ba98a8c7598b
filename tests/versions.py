"""What the installed versions of the servers have. What one lacks is skipped, whatever is required: no machine would help."""

from __future__ import annotations

import inspect

import celery
import gunicorn
import pytest
import starlette
import starlette.routing
import uvicorn
from celery.app.defaults import NAMESPACES
from gunicorn.arbiter import Arbiter
from gunicorn.config import Config
from gunicorn.workers import SUPPORTED_WORKERS

#: The first gunicorn whose gthread worker, when it ends, still answers what comes on a kept-alive connection.
GTHREAD_KEEPS = (27, 0, 1)


def provided(condition: bool, reason: str) -> None:
    """Go on if `condition` holds; else skip with `reason`."""
    if not condition:
        pytest.skip(reason)


def has_class(worker_class: str) -> None:
    """gunicorn's own asgi class came with 24."""
    provided(worker_class != "asgi" or "asgi" in SUPPORTED_WORKERS, f"gunicorn {gunicorn.__version__} has no asgi worker")


def no_control_socket() -> list[str]:
    """The option that turns gunicorn's control socket off: all of a user's gunicorns share one, where they have one."""
    return ["--no-control-socket"] if "control_socket_disable" in Config().settings else []


def keeps(worker_class: str) -> bool:
    """Whether a worker that ends answers all that came to it; see loses_none()."""
    return worker_class != "gthread" or gunicorn.version_info >= GTHREAD_KEEPS


def loses_none(worker_class: str) -> None:
    """An older gthread worker that ends closes connections that were promised to be kept alive, and does not wait for the rest."""
    provided(keeps(worker_class), f"gunicorn {gunicorn.__version__}'s gthread worker drops connections when it ends")


def serves_streams_at_once() -> None:
    """Before 27, gunicorn's asgi class serves the streams of an HTTP/2 connection one after the other, if any."""
    has_class("asgi")
    from gunicorn.asgi.protocol import ASGIProtocol

    at_once = hasattr(ASGIProtocol, "_start_http2_stream")
    provided(at_once, f"gunicorn {gunicorn.__version__} serves one HTTP/2 stream at a time")


def reaps_later() -> None:
    """Before 24, a dead worker is reaped inside a signal's handler, at once."""
    provided(hasattr(Arbiter, "signal_chld"), f"gunicorn {gunicorn.__version__} leaves no dead worker unreaped")


def loads_first() -> bool:
    """Whether uvicorn loads the app of a single process before it takes the signals' handlers."""
    return "load_app" in inspect.getsource(uvicorn.run)


def names_routes() -> None:
    """Whether Starlette puts the route that it took into the scope."""
    names = 'scope["route"]' in inspect.getsource(starlette.routing)
    provided(names, f"Starlette {starlette.__version__} does not say which route it took")


def spawns() -> None:
    """Whether Celery's prefork pool can spawn its children."""
    provided("pool_start_method" in NAMESPACES["worker"], f"Celery {celery.__version__} has no worker_pool_start_method")


def takes_commands_of_others() -> None:
    """Whether `celery inspect` and `celery control` know more than Celery's own commands."""
    provided(celery.VERSION >= (5, 4), f"Celery {celery.__version__}'s command line knows its own commands only")


def runs_once(pool: str) -> None:
    """Before 5.5 a node of greenlets that is shut down warmly leaves the last two tasks to the broker, and runs them too."""
    once = pool != "gevent" or celery.VERSION >= (5, 5)
    provided(once, f"Celery {celery.__version__}'s gevent pool runs tasks twice when it is shut down warmly")


def ends_dirty_workers() -> None:
    """Before 25.1 a dirty worker that ends takes its arbiter's socket with it."""
    provided(gunicorn.version_info >= (25, 1), f"gunicorn {gunicorn.__version__}'s dirty workers can't be ended one by one")


def runs_uvloop(worker_class: str) -> None:
    """An older aiohttp asks uvloop for a loop before it has made one."""
    from aiohttp.worker import GunicornUVLoopWebWorker

    asks = "except RuntimeError" not in inspect.getsource(GunicornUVLoopWebWorker)
    provided(not (asks and "UVLoop" in worker_class), "this aiohttp's uvloop class does not start with this uvloop")
