"""A pool of one worker that drains: whoever is connected is connected to it."""

from __future__ import annotations

import http.client
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest
from serving import Gunicorn, until

#: Both asyncio classes, on both loops, and both of uvicorn's HTTP parsers.
ASYNCIO = [
    pytest.param("asgi", 'asgi_loop = "asyncio"', id="asgi-asyncio"),
    pytest.param("asgi", 'asgi_loop = "uvloop"', id="asgi-uvloop"),
    pytest.param("uvicorn_worker.UvicornWorker", "", id="uvicorn-uvloop-httptools"),
    pytest.param("uvicorn_worker.UvicornH11Worker", "", id="uvicorn-asyncio-h11"),
]

#: Those that keep connections and have several requests in flight: all but sync.
CONCURRENT = [pytest.param("gthread", "", id="gthread"), pytest.param("gevent", "", id="gevent"), *ASYNCIO]


def alone(serve, worker_class: str, settings: str = "", **policy: object) -> Gunicorn:
    """A gunicorn with one worker: whoever connects is connected to it, until it drains and nobody is."""
    policy = {"soft_limit": "80MiB", "min_lifetime": 0, "jitter": 0, "surge": False, **policy}
    return serve(worker_class, 1, settings=settings, **policy).serving(1)


def drain(gunicorn: Gunicorn) -> int:
    """Take its worker over its limit, and wait until it drains. The worker's pid."""
    (pid,) = gunicorn.workers()
    assert gunicorn.get("/fill?mib=84", Connection="close")[0] == 200
    gunicorn.wait_for(f"worker {pid} (slot 0) recycling: ")
    return pid


@contextmanager
def sent(gunicorn: Gunicorn, path: str) -> Iterator[http.client.HTTPConnection]:
    """A connection with a request that the worker has begun to answer."""
    with closing(gunicorn.connect()) as connection:
        connection.request("GET", path)
        name = f"GET {path.partition('?')[0]}"
        until(lambda: any(name == work.name for worker in gunicorn.pool().workers for work in worker.in_flight), f"{path} is in flight")
        yield connection


@contextmanager
def kept(gunicorn: Gunicorn) -> Iterator[http.client.HTTPConnection]:
    """A connection that has had an answer."""
    with closing(gunicorn.connect()) as connection:
        connection.request("GET", "/")
        assert connection.getresponse().read()
        yield connection


def ended(gunicorn: Gunicorn, pid: int, seconds: float = 20) -> None:
    """Wait for the end of a worker, and see that it ended by itself."""
    until(lambda: pid not in gunicorn.workers(), f"worker {pid} ends", seconds)
    assert not gunicorn.lines("WORKER TIMEOUT")
    assert not gunicorn.lines(f"(pid:{pid}) was sent")
