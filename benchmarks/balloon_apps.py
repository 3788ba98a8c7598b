"""Apps with three kinds of requests: one that is small, one that needs 2 MiB for a moment, and balloons that grow without an end.

Serve them in a memory cgroup only.
"""

from __future__ import annotations

import json
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

MIB = 1 << 20


def answer(path: str, token: str) -> bytes:
    """The body: JSON with the request's token, so that a client can check it."""
    if path == "/work":
        pages = bytearray(2 * MIB)  # written to, so it is really there
        return json.dumps({"token": token, "size": len(pages), "numbers": list(range(10_000))}).encode()
    if path == "/blocks":
        blocks = []
        while True:
            blocks.append(bytearray(MIB))
    if path == "/dict":
        table: dict[int, str] = {}
        while True:
            table[len(table)] = str(len(table)) * 3
    return json.dumps({"token": token}).encode()


def wsgi(environ: dict[str, Any], start_response: Any) -> list[bytes]:
    """For sync, gthread, gevent and uWSGI."""
    body = answer(environ["PATH_INFO"], environ.get("QUERY_STRING", ""))
    start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
    return [body]


async def coroutine(request: Request) -> Response:
    """In the event loop."""
    return Response(answer(request.url.path, request.url.query), media_type="application/json")


def function(request: Request) -> Response:
    """In a thread of the pool."""
    return Response(answer(request.url.path, request.url.query), media_type="application/json")


asgi = Starlette(routes=[Route("/{name:path}", coroutine)])
threads = Starlette(routes=[Route("/{name:path}", function)])
