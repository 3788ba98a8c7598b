"""Apps whose memory grows, each in another way, and only one of them leaks. The path says how."""

from __future__ import annotations

import functools
import itertools
from typing import Any

kept: list[Any] = []


def dicts(count: int) -> None:
    """A leak of small objects."""
    kept.append([{"a": number} for number in range(count)])


def blobs(count: int) -> None:
    """A leak of large ones."""
    kept.extend(bytes(1 << 20) + b"x" for _ in range(count))


def small(count: int) -> None:
    """No leak: one in twenty stays, and pymalloc's arenas with it."""
    kept.append([{"a": number} for number in range(count)][::20])


def blocks(count: int) -> None:
    """No leak: one in five stays, and with it its page, which malloc can't give back."""
    kept.append([bytes(700) for _ in range(count)][::5])


def pages(count: int) -> None:
    """No leak: one in two hundred stays, and the pages between are free, which malloc keeps until it is trimmed."""
    kept[:] = [[bytes(700) for _ in range(count)][::200]]


def model(size: int) -> None:
    """No leak: it is loaded once, with the first request."""
    if not kept:
        kept.append(bytes(size << 20) + b"x")


asked = itertools.count()


def late(size: int) -> None:
    """No leak: it is loaded once, with a request that comes when the worker has served for a while."""
    if next(asked) == 15:
        model(size)


cached: dict[int, bytes] = {}


def cache(bound: int) -> None:
    """No leak: a cache that is full after so many requests."""
    cached[len(cached) % bound] = bytes(4 << 20) + b"x"


@functools.lru_cache(maxsize=50_000)
def thumbnail(_: int) -> bytes:
    """As images that are made once."""
    return bytes(20_000) + b"x"


numbers = itertools.count()


def thumbnails(count: int) -> None:
    """No leak: a cache that would be full far beyond the worker's limit."""
    for _ in range(count):
        thumbnail(next(numbers))


WAYS = {
    "/dicts": dicts,
    "/blobs": blobs,
    "/small": small,
    "/blocks": blocks,
    "/model": model,
    "/cache": cache,
    "/late": late,
    "/pages": pages,
    "/thumbnails": thumbnails,
}


def act(path: str, query: str) -> bytes:
    """The answer."""
    if path in WAYS:
        WAYS[path](int(query or 0))
    return b"ok"


def wsgi(environ, start_response):
    """Under gunicorn."""
    body = act(environ["PATH_INFO"], environ["QUERY_STRING"])
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]


async def asgi(scope, receive, send):
    """Under uvicorn."""
    if scope["type"] == "lifespan":
        while (message := await receive())["type"] != "lifespan.shutdown":
            await send({"type": f"{message['type']}.complete"})
        await send({"type": "lifespan.shutdown.complete"})
        return
    body = act(scope["path"], scope["query_string"].decode())
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", str(len(body)).encode())]})
    await send({"type": "http.response.body", "body": body})
