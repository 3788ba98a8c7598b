"""Django's middleware, in Django's own handlers, sync and async: in flight until the response is closed, and otherwise not there."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
from asgiref.sync import iscoroutinefunction
from django.core.handlers.asgi import ASGIHandler
from django.http import HttpResponse
from django.test import AsyncRequestFactory, RequestFactory
from django.test.utils import override_settings
from unit.django_project import OURS, async_get, call, get, new_guard, routes, scope, seen
from unit.scripted import MIB

from oomsafe.django import MemoryMiddleware
from oomsafe.worker.guard import Guard
from oomsafe.worker.meter import Work


@pytest.fixture(autouse=True)
def guard() -> Guard:
    """This process's, as a server's adapter would have made it."""
    return new_guard()


BOTH = pytest.mark.parametrize("client", [get, async_get], ids=["sync", "async"])


@BOTH
@pytest.mark.parametrize(
    ("url", "route", "status"),
    [
        ("/", "GET /", 200),
        ("/users/1/", "GET /users/<int:user>/", 200),
        ("/coroutines/1/", "GET /coroutines/<int:user>/", 200),
        ("/api/v1", r"GET /api/v(?P<user>\d)$", 200),
        ("/missing", "GET /missing", 404),
        ("/failing", "GET /failing", 500),
        ("/nothing", "unmatched", 404),
        ("/users/x/", "unmatched", 404),
    ],
)
def test_routes(guard: Guard, client: Callable[..., Any], url: str, route: str, status: int) -> None:
    """A request is counted under its method and URL pattern, never its path, whichever kind of view meets whichever kind of handler."""
    response = client(url)

    assert (response.status_code, routes(guard)) == (status, {route: 1})
    assert guard.meter.clock.in_flight == 0


@BOTH
def test_in_flight(guard: Guard, client: Callable[..., Any]) -> None:
    """Under its method and path, while the view runs; what the process grows by meanwhile is the request's."""
    client("/users/1/")

    assert seen == ["GET /users/1/"]
    assert guard.meter.first == (2 * MIB, b"GET /users/1/")


@pytest.mark.parametrize(("client", "url"), [(get, "/users/1/"), (async_get, "/coroutines/1/")], ids=["sync", "async"])
def test_no_thread_is_taken(guard: Guard, monkeypatch: pytest.MonkeyPatch, client: Callable[..., Any], url: str) -> None:
    """Django has nothing to adapt: a middleware of only one kind costs each request of the other a thread's turn."""
    begin, threads = guard.meter.begin, []

    def noting(name: bytes) -> Work:
        threads.append(threading.current_thread())
        return begin(name)

    monkeypatch.setattr(guard.meter, "begin", noting)
    client(url)

    assert threads == [threading.current_thread()]


def test_a_stream(guard: Guard) -> None:
    """In flight until it is closed, not until the view returns."""
    response = get("/stream")
    before = routes(guard)

    assert b"".join(response.streaming_content) == b"12"
    assert (before, seen, routes(guard)) == ({}, ["GET /stream"] * 2, {"GET /stream": 1})


def test_a_stream_that_nobody_reads(guard: Guard) -> None:
    """A client that leaves: the server closes, and the request has ended, once."""
    response = get("/stream")
    response.close()
    response.close()

    assert (seen, routes(guard), guard.meter.clock.in_flight) == ([], {"GET /stream": 1}, 0)


def test_an_async_stream(guard: Guard) -> None:
    """In flight until it is closed, under Django's own ASGI handler."""
    sent = call(ASGIHandler(), scope("/async-stream"))

    assert b"".join(message.get("body", b"") for message in sent) == b"12"
    assert (seen, routes(guard)) == (["GET /async-stream"] * 2, {"GET /async-stream": 1})


@pytest.mark.filterwarnings("ignore:Unclosed file:ResourceWarning")  # Django's own: it does not close the request's body either
def test_an_async_stream_that_fails(guard: Guard) -> None:
    """Django's ASGI handler does not close its response: the request ends when the response is forgotten."""
    with pytest.raises(ZeroDivisionError):
        call(ASGIHandler(), scope("/broken-stream"))
    gc.collect()

    assert (routes(guard), guard.meter.clock.in_flight) == ({"GET /broken-stream": 1}, 0)


@BOTH
def test_a_view_that_exits(guard: Guard, client: Callable[..., Any]) -> None:
    """No response ever comes: the same exception, and the request has ended."""
    with pytest.raises(SystemExit):
        client("/exiting")

    assert (routes(guard), guard.meter.clock.in_flight) == ({"GET /exiting": 1}, 0)


def test_an_async_request_that_is_cancelled(guard: Guard) -> None:
    """The client is gone: the cancellation passes, and the request has ended."""

    async def gone(request: Any) -> HttpResponse:
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(MemoryMiddleware(gone)(AsyncRequestFactory().get("/x")))  # type: ignore[arg-type]

    assert (routes(guard), guard.meter.clock.in_flight) == ({"unmatched": 1}, 0)


def test_django_takes_it_for_what_it_is() -> None:
    """Async where what it wraps is: Django looks at that when it puts its own handling of exceptions round it."""

    async def view(request: Any) -> None: ...

    assert [iscoroutinefunction(MemoryMiddleware(get_response)) for get_response in (view, lambda request: None)] == [True, False]


def test_no_response(guard: Guard) -> None:
    """A middleware after us that returns None is Django's to blame: the request has ended."""
    assert MemoryMiddleware(lambda request: None)(RequestFactory().get("/x")) is None
    assert guard.meter.clock.in_flight == 0


@override_settings(MIDDLEWARE=[OURS, OURS], OOMSAFE={"headers": True})
@BOTH
def test_listed_twice(guard: Guard, client: Callable[..., Any]) -> None:
    """Counted once, and headers once."""
    response = client("/timed")

    assert (guard.meter.counters.work, response.headers["Server-Timing"].count("mem;")) == (1, 1)
