"""A Django project, its views, and the two sides of its handlers, for tests of Django's middleware."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any
from wsgiref.util import setup_testing_defaults

import django
from django.conf import settings
from django.http import Http404, HttpResponse, StreamingHttpResponse
from django.test import AsyncClient, AsyncRequestFactory, Client
from django.urls import include, path, re_path
from unit.scripted import CGROUP, MIB, Memory

from oomsafe.policy.limits import Capacity
from oomsafe.policy.settings import Policy
from oomsafe.worker import current
from oomsafe.worker.guard import Guard

OURS = "oomsafe.django.MemoryMiddleware"

seen: list[str] = []
memory = Memory(50 * MIB)


def plain(request: Any, user: int = 0) -> HttpResponse:
    """A view that takes 2 MiB."""
    look()
    memory.be(52 * MIB)
    return HttpResponse("hello")


async def coroutine(request: Any, user: int) -> HttpResponse:
    """The same, async."""
    return plain(request, user)


def timed(request: Any) -> HttpResponse:
    """A view that says how long it took."""
    return HttpResponse("hello", headers={"Server-Timing": "db;dur=3"})


def missing(request: Any) -> HttpResponse:
    """A view that finds nothing."""
    raise Http404


def failing(request: Any) -> HttpResponse:
    """A view that raises."""
    raise ZeroDivisionError


def exiting(request: Any) -> HttpResponse:
    """A view in which the worker is told to end."""
    raise SystemExit


def stream(request: Any) -> StreamingHttpResponse:
    """Two parts."""

    def body() -> Iterator[bytes]:
        for part in (b"1", b"2"):
            look()
            yield part

    return StreamingHttpResponse(body())


async def async_stream(request: Any) -> StreamingHttpResponse:
    """Two parts, async."""

    async def body() -> AsyncIterator[bytes]:
        for part in (b"1", b"2"):
            look()
            yield part

    return StreamingHttpResponse(body())


async def broken_stream(request: Any) -> StreamingHttpResponse:
    """One part, and a failure."""

    async def body() -> AsyncIterator[bytes]:
        yield b"1"
        raise ZeroDivisionError

    return StreamingHttpResponse(body())


urlpatterns = [
    path("", plain),
    path("users/<int:user>/", plain),
    path("coroutines/<int:user>/", coroutine),
    path("api/", include([re_path(r"^v(?P<user>\d)$", plain)])),
    path("timed", timed),
    path("missing", missing),
    path("failing", failing),
    path("exiting", exiting),
    path("stream", stream),
    path("async-stream", async_stream),
    path("broken-stream", broken_stream),
]

settings.configure(
    SECRET_KEY="x",
    ALLOWED_HOSTS=["*"],
    ROOT_URLCONF=__name__,
    LOGGING_CONFIG=None,
    MIDDLEWARE=[OURS],
    CACHES={"default": {"BACKEND": "django.core.cache.backends.locmem.LocMemCache"}},
)
django.setup()


def new_guard() -> Guard:
    """Make this process's guard, as a server's adapter would."""
    seen.clear()
    memory.be(50 * MIB)
    guard = Guard(Policy(soft_limit="900MiB", jitter=0), unit="requests", capacity=Capacity(1000 * MIB, CGROUP), memory=memory)
    current.set_guard(guard)
    return guard


def look() -> None:
    """Note what is in flight."""
    guard = current.get_guard()
    assert guard is not None
    seen.extend(piece.name for piece in guard.pool().workers[0].in_flight)


def routes(guard: Guard) -> dict[str, int]:
    """How many requests of each route have ended."""
    return {name: sum(row[1:]) for name, row in guard.meter.counters.routes.items()}


def get(url: str, **headers: str) -> Any:
    """The response, from Django's WSGI side; closed unless it streams."""
    return Client(raise_request_exception=False).get(url, headers=headers)


def async_get(url: str, **headers: str) -> Any:
    """The same from its ASGI side."""
    return asyncio.run(AsyncClient(raise_request_exception=False).get(url, headers=headers))


def scope(url: str) -> dict[str, Any]:
    """An ASGI request, as a server makes it."""
    return dict(AsyncRequestFactory().get(url).scope)


def call(app: Any, request: dict[str, Any]) -> list[dict[str, Any]]:
    """What an ASGI app sends."""
    sent: list[dict[str, Any]] = []
    unread = [{"type": "http.request", "body": b"", "more_body": False}]

    async def receive() -> dict[str, Any]:
        if not unread:
            await asyncio.Event().wait()  # the client stays
        return unread.pop()

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    asyncio.run(app(request, receive, send))
    return sent


def serve(app: Any, url: str) -> list[tuple[str, str]]:
    """A whole request to a WSGI app, as a server makes it: the headers."""
    request = {"PATH_INFO": url}
    setup_testing_defaults(request)
    started: list[Any] = []
    body = app(request, lambda *arguments: started.extend(arguments))
    b"".join(body)
    body.close()
    headers: list[tuple[str, str]] = started[1]
    return headers
