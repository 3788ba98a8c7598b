"""The demo's app, with a real leak: each request keeps 256 KiB forever, as an unbounded cache does."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

LEAK = 256 * 1024

#: What a task of the Celery demo keeps, in bytes; there are fewer tasks than requests.
TASK_LEAK = 1024 * 1024

_cache: list[bytes] = []


def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    """A WSGI app that answers with its query string, so that the client can check each answer."""
    _cache.append(bytes([len(_cache) % 256]) * LEAK)
    body = environ.get("QUERY_STRING", "").encode("latin-1")
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(body)))])
    return [body]


async def asgi(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """The same as an ASGI app."""
    if scope["type"] == "lifespan":
        while (message := await receive())["type"] == "lifespan.startup":
            await send({"type": "lifespan.startup.complete"})
        await send({"type": f"{message['type']}.complete"})
        return
    _cache.append(bytes([len(_cache) % 256]) * LEAK)
    body = scope["query_string"]
    headers = [(b"content-type", b"text/plain"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})
