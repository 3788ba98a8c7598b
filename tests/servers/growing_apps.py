"""An app that leaks, each time in another place. The path says where; the query, how much."""

from __future__ import annotations

import functools
import os
import threading
from typing import Any

CACHE: dict[str, list[int]] = {}


class Registry:
    """Its instances are never forgotten."""

    seen: list[Any] = []  # noqa: RUF012  that is the fault


class Remembered:
    """What the closure keeps."""

    def __init__(self, number: int) -> None:
        self.number = [number]


class Waiting:
    """Kept by an instance."""


class Store:
    """Of which a module has one."""

    def __init__(self) -> None:
        self.waiting: list[Waiting] = []


STORE = Store()
forever = threading.Event()
kept: list[bytes] = []


@functools.lru_cache(maxsize=None)  # noqa: UP033  as people write it
def computed(number: int) -> list[int]:
    """One result for each number that was ever asked for."""
    return [number] * 20


def _hiding() -> dict[str, Any]:
    hidden: list[Remembered] = []
    return {"keep": lambda number: hidden.append(Remembered(number))}


#: The closure is two steps away from a name.
hiding = [_hiding()]


def act(path: str, count: int) -> None:
    """Leak so much there."""
    for number in range(count):
        if path == "/named":
            CACHE[f"secret-{len(CACHE)}"] = [number] * 20
        elif path == "/attribute":
            Registry.seen.append([number] * 20)
        elif path == "/instance":
            STORE.waiting.append(Waiting())
        elif path == "/cache":
            computed(computed.cache_info().currsize)
        elif path == "/closure":
            hiding[0]["keep"](number)
        elif path == "/descriptors":
            os.open("/dev/null", os.O_RDONLY)
            kept.append(bytes(1 << 20) + b"x")
        elif path == "/threads":
            threading.Thread(target=forever.wait, daemon=True).start()
            kept.append(bytes(1 << 20) + b"x")


def wsgi(environ, start_response):
    """Under gunicorn."""
    act(environ["PATH_INFO"], int(environ["QUERY_STRING"] or 0))
    start_response("200 OK", [("Content-Length", "2")])
    return [b"ok"]


async def asgi(scope, receive, send):
    """Under uvicorn."""
    if scope["type"] == "lifespan":
        while (message := await receive())["type"] != "lifespan.shutdown":
            await send({"type": f"{message['type']}.complete"})
        await send({"type": "lifespan.shutdown.complete"})
        return
    act(scope["path"], int(scope["query_string"] or 0))
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})
