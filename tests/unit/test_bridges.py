"""A WSGI app inside of an ASGI server, and the other way round, over the bridges that people use: counted once, ended, announced once."""

from __future__ import annotations

import asyncio
import importlib.util
import io
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from wsgiref.util import setup_testing_defaults

import asgiref.wsgi
import flask
import pytest
from django.core.handlers.wsgi import WSGIHandler
from needs import need
from unit.django_project import new_guard
from unit.scripted import CGROUP, MIB, Memory
from uvicorn.middleware import wsgi as of_uvicorn

import oomsafe.asgi
import oomsafe.wsgi
from oomsafe.policy.limits import Capacity
from oomsafe.policy.settings import Policy
from oomsafe.worker import current
from oomsafe.worker.guard import Guard

Bridge = Callable[[Any], Any]


def starlettes(app: Any) -> Any:
    """Starlette's, with which FastAPI's documentation mounts Flask."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("starlette.middleware.wsgi").WSGIMiddleware(app)


def uvicorns(app: Any) -> Any:
    """uvicorn's own, for --interface wsgi where there is no a2wsgi."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return of_uvicorn._WSGIMiddleware(app)


def a2wsgis(app: Any) -> Any:
    """The one that both refer to."""
    return _a2wsgi().WSGIMiddleware(app)


def _a2wsgi() -> Any:
    need(importlib.util.find_spec("a2wsgi") is not None, "a2wsgi is not installed")
    return importlib.import_module("a2wsgi")


BRIDGES = pytest.mark.parametrize("bridge", [starlettes, uvicorns, a2wsgis, asgiref.wsgi.WsgiToAsgi], ids=lambda one: one.__name__)


@pytest.fixture
def guard() -> Guard:
    """This process's."""
    guard = Guard(Policy(soft_limit="900MiB"), unit="requests", capacity=Capacity(1000 * MIB, CGROUP), memory=Memory(50 * MIB))
    current._guard = guard
    return guard


def get(app: Any, path: str = "/x") -> tuple[list[bytes], bytes]:
    """One request to an ASGI app: the names of its response's headers, its body."""
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "GET", "scheme": "http", "path": path,
        "raw_path": path.encode(), "query_string": b"", "root_path": "", "headers": [], "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }  # fmt: skip
    asyncio.run(app(scope, receive, send))
    return [name.lower() for name, _ in sent[0]["headers"]], b"".join(message.get("body", b"") for message in sent)


def listing(_: Any, start_response: Any) -> list[bytes]:
    """A body that is a list."""
    start_response("200 OK", [])
    return [b"1", b"2"]


def streaming(_: Any, start_response: Any) -> Iterator[bytes]:
    """A body that is a generator."""
    start_response("200 OK", [])
    yield b"1"
    yield b"2"


def breaking(_: Any, start_response: Any) -> Iterator[bytes]:
    """A body that fails."""
    start_response("200 OK", [])
    yield b"1"
    raise ZeroDivisionError


@BRIDGES
@pytest.mark.parametrize("app", [listing, streaming])
def test_it_ends_though_nobody_closes(guard: Guard, bridge: Bridge, app: Any) -> None:
    """The bridges of Starlette, uvicorn and asgiref never close a body."""
    bridged = bridge(oomsafe.wsgi.MemoryMiddleware(app, guard=guard))

    bodies = [get(bridged)[1] for _ in range(20)]

    assert bodies == [b"12"] * 20
    assert (guard.meter.counters.work, guard.meter.in_flight, len(guard.meter._cells)) == (20, 0, 16)


@pytest.mark.parametrize("bridge", [starlettes, uvicorns])
def test_it_ends_with_what_fails(guard: Guard, bridge: Bridge) -> None:
    """In the middle of the response."""
    # an old Starlette raises it in a group
    with pytest.raises(Exception) as raised:
        get(bridge(oomsafe.wsgi.MemoryMiddleware(breaking, guard=guard)))

    assert [type(error) for error in getattr(raised.value, "exceptions", [raised.value])] == [ZeroDivisionError]
    assert (guard.meter.counters.work, guard.meter.in_flight) == (1, 0)


@BRIDGES
@pytest.mark.parametrize("outer", [True, False], ids=["both-announce", "inner-announces"])
def test_it_is_counted_once(guard: Guard, bridge: Bridge, outer: bool) -> None:
    """The ASGI middleware round the server's app, the WSGI middleware in the app: one request, its headers once, its own route."""
    app = flask.Flask("test")
    app.add_url_rule("/x/<name>", view_func=lambda name: name)
    bridged = oomsafe.asgi.MemoryMiddleware(bridge(oomsafe.wsgi.MemoryMiddleware(app, headers=True)), headers=outer)

    answers = [get(bridged, f"/x/{number}") for number in range(10)]

    assert {names.count(b"x-memory-rss") for names, _ in answers} == {1}
    assert [body for _, body in answers] == [b"%d" % number for number in range(10)]
    assert (guard.meter.counters.work, guard.meter.in_flight) == (10, 0)
    assert {route: sum(row[1:]) for route, row in guard.meter.counters.routes.items()} == {"GET /x/<name>": 10}


@BRIDGES
def test_start_response_that_another_has_wrapped(guard: Guard, bridge: Bridge) -> None:
    """Then the scope can't be found on it; but where a server's adapter counts all, it is counted."""
    guard.at_the_door = True
    inner = oomsafe.wsgi.MemoryMiddleware(listing, guard=guard)
    bridged = oomsafe.asgi.MemoryMiddleware(bridge(lambda environ, start: inner(environ, lambda *given: start(*given))), guard=guard)

    assert get(bridged)[1] == b"12"
    assert (guard.meter.counters.work, guard.meter.in_flight) == (1, 0)


@BRIDGES
def test_djangos_is_counted_once(bridge: Bridge) -> None:
    """Django's own middleware does not see start_response."""
    guard = new_guard()
    guard.at_the_door = True
    bridged = oomsafe.asgi.MemoryMiddleware(bridge(WSGIHandler()), guard=guard)

    get(bridged, "/")

    assert (guard.meter.counters.work, guard.meter.in_flight) == (1, 0)


def test_an_asgi_app_in_a_wsgi_server(guard: Guard) -> None:
    """The other way round there is one bridge."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x"})

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    bridged = _a2wsgi().ASGIMiddleware(oomsafe.asgi.MemoryMiddleware(app, headers=True), loop=loop)
    wrapped = oomsafe.wsgi.MemoryMiddleware(bridged, headers=True)
    seen: list[list[str]] = []
    for _ in range(10):
        environ: dict[str, Any] = {"PATH_INFO": "/x", "wsgi.input": io.BytesIO()}
        setup_testing_defaults(environ)
        body: Any = wrapped(environ, lambda _, headers, __=None: seen.append([name for name, _ in headers]))
        assert b"".join(body) == b"x"
        body.close()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()

    assert {sum(name.lower() == "x-memory-rss" for name in names) for names in seen} == {1}
    assert (guard.meter.counters.work, guard.meter.in_flight) == (10, 0)
