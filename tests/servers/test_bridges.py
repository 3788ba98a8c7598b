"""A WSGI app, guarded by itself, that an ASGI server serves over a bridge: counted once, and over when it is over."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
from needs import need
from serving import Server, until

#: The bridges never close a body, but for a2wsgi's.
BRIDGED = """
import importlib.util, warnings
warnings.simplefilter("ignore")
import apps
import oomsafe.wsgi

wsgi = oomsafe.wsgi.MemoryMiddleware(apps.wsgi, headers=True)

def starlette(app):
    from starlette.middleware.wsgi import WSGIMiddleware
    return WSGIMiddleware(app)

def uvicorn(app):
    from uvicorn.middleware.wsgi import _WSGIMiddleware
    return _WSGIMiddleware(app)

def a2wsgi(app):
    from a2wsgi import WSGIMiddleware
    return WSGIMiddleware(app)

bridge = {bridge}(wsgi)

async def asgi(scope, receive, send):
    if scope["type"] == "lifespan":
        await apps.lifespan(receive, send)
    else:
        await bridge(scope, receive, send)
"""


def files(bridge: str) -> dict[str, str]:
    """The app, with one of the bridges."""
    need(bridge != "a2wsgi" or find_spec("a2wsgi") is not None, "a2wsgi is not installed")
    return {"bridged.py": BRIDGED.format(bridge=bridge)}


def is_as_without(server: Server) -> None:
    """What a client has asked is what was counted, nothing is in flight, and each header stands once."""
    for path in ["/leak?kib=64", "/stream"] * 5:
        connection = server.connect()
        connection.request("GET", path)
        response = connection.getresponse()
        names = [name.lower() for name, _ in response.getheaders()]
        response.read()
        connection.close()
        assert (response.status, names.count("x-memory-rss"), names.count("server-timing")) == (200, 1, 1)
    until(lambda: server.pool().totals.work == 10, "10 requests are counted, and no more")
    assert [worker.in_flight for worker in server.pool().workers] == [[]] * 2


def grows_and_goes(server: Server, pid: int) -> None:
    """Over its limit it has nothing to wait for: it does not drain for its whole grace period of 60 s."""
    while f"worker {pid} (slot " not in server.log():
        assert server.get("/leak?kib=4096")[0] == 200
    until(lambda: pid not in server.workers(), "it has ended", 20)
    server.serving()


@pytest.mark.parametrize(
    ("worker_class", "bridge"), [("asgi", "starlette"), ("asgi", "a2wsgi"), ("uvicorn_worker.UvicornWorker", "uvicorn")]
)
def test_under_gunicorn(serve, worker_class, bridge):
    """Its asyncio classes wait for what is in flight."""
    policy = {"soft_limit": "150MiB", "min_lifetime": 0, "grace_period": 60}
    server = serve(worker_class, app="bridged:asgi", files=files(bridge), **policy).serving()

    is_as_without(server)
    grows_and_goes(server, int(server.get("/pid")[2]))


@pytest.mark.parametrize("bridge", ["uvicorn", "a2wsgi"])
def test_under_uvicorn(serve_uvicorn, bridge):
    """The same with its own supervisor."""
    server = serve_uvicorn(app="bridged:asgi", files=files(bridge), soft_limit="150MiB", min_lifetime=0, grace_period=60).serving()

    is_as_without(server)
    grows_and_goes(server, server.workers()[0])
