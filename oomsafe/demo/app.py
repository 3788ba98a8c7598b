"""The demo's apps: a real leak, where each request keeps 256 KiB forever, as an unbounded cache does; one request that asks for 2 GiB; and
one that leaks nothing, but leaves its worker with memory that Python's allocator can't give back.

Both answer with their query string, so that the client can check each answer.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

LEAK = 256 * 1024

#: What a task of the Celery demo keeps, in bytes; there are fewer tasks than requests.
TASK_LEAK = 1024 * 1024

#: The bytes that a request of BALLOON_PATH asks for, in rows of this many.
BALLOON, ROW = 2 << 30, 1 << 20

BALLOON_PATH = "/export"

#: A request of this path makes so many small objects, and one in so many of them stays until the next such request.
FRAGMENT_PATH, OBJECTS, SURVIVES = "/report", 300_000, 20

_cache: list[bytes] = []
_recent: list[dict[str, int]] = []


def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    """A WSGI app that leaks."""
    _leak()
    return _answer(environ, start_response)


def balloon(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    """A WSGI app that does not leak, and balloons at BALLOON_PATH."""
    if environ["PATH_INFO"] == BALLOON_PATH:
        export()
    return _answer(environ, start_response)


def fragment(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    """A WSGI app that does not leak, and fragments its memory."""
    report()
    return _answer(environ, start_response)


async def fragment_asgi(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """The fragmenting one as an ASGI app."""
    if scope["type"] != "lifespan":
        report()
    await _asgi_answer(scope, receive, send)


def report() -> None:
    """Build something large, and remember a little of it until the next time."""
    rows = [{"row": number} for number in range(OBJECTS)]
    _recent[:] = rows[::SURVIVES]


async def asgi(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """The leaking one as an ASGI app."""
    if scope["type"] != "lifespan":
        _leak()
    await _asgi_answer(scope, receive, send)


async def balloon_asgi(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """The ballooning one as an ASGI app."""
    if scope["type"] != "lifespan" and scope["path"] == BALLOON_PATH:
        export()
    await _asgi_answer(scope, receive, send)


def export() -> list[bytearray]:
    """Gather everything before the first row is sent, as exports do."""
    rows = []
    for _ in range(BALLOON // ROW):
        rows.append(bytearray(ROW))  # a comprehension would give its rows back before anybody sees the error
    return rows


def _leak() -> None:
    _cache.append(bytes([len(_cache) % 256]) * LEAK)


def _answer(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    body = environ.get("QUERY_STRING", "").encode("latin-1")
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(body)))])
    return [body]


async def _asgi_answer(scope: dict[str, Any], receive: Any, send: Any) -> None:
    if scope["type"] == "lifespan":
        while (message := await receive())["type"] == "lifespan.startup":
            await send({"type": "lifespan.startup.complete"})
        await send({"type": f"{message['type']}.complete"})
        return
    body = scope["query_string"]
    headers = [(b"content-type", b"text/plain"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})
