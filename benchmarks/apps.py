"""The apps under load. Path /leak keeps 256 KiB for ever, touched; every other path answers and keeps nothing."""

from __future__ import annotations

from typing import Any

LEAK = 256 << 10
kept: list[bytes] = []

_HEADERS = [("Content-Type", "text/plain"), ("Content-Length", "3")]
_RAW_HEADERS = [(b"content-type", b"text/plain"), (b"content-length", b"3")]


def leak() -> None:
    """Keep some memory more. Filled with a byte that is not zero: pages of zeros would be mapped lazily, and cost nothing."""
    kept.append(b"x" * LEAK)


def wsgi(environ: dict[str, Any], start_response: Any) -> list[bytes]:
    """The WSGI app."""
    if environ["PATH_INFO"] == "/leak":
        leak()
    start_response("200 OK", list(_HEADERS))
    return [b"ok\n"]


async def asgi(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """The same as an ASGI app."""
    if scope["type"] == "lifespan":
        await _lifespan(receive, send)
        return
    if scope["path"] == "/leak":
        leak()
    await send({"type": "http.response.start", "status": 200, "headers": list(_RAW_HEADERS)})
    await send({"type": "http.response.body", "body": b"ok\n"})


async def _lifespan(receive: Any, send: Any) -> None:
    while (message := await receive())["type"] != "lifespan.shutdown":
        await send({"type": f"{message['type']}.complete"})
    await send({"type": "lifespan.shutdown.complete"})
