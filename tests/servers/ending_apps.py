"""Apps whose requests end their worker in several ways, as WSGI and as ASGI."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import time
from typing import Any


def _end(path: str) -> None:
    if path == "/exit":
        os._exit(7)
    if path == "/crash":
        ctypes.string_at(0)
    if path == "/abort":
        os.abort()
    if path == "/hog":
        held = []
        while True:
            held.append(b"x" * (1 << 20))
    if path == "/hang":
        os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(60)  # another thread may take the signal, and this one go on for a moment


def wsgi(environ: dict[str, Any], start_response: Any) -> list[bytes]:
    """The pid of the worker, if that outlives the request."""
    _end(environ["PATH_INFO"])
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [str(os.getpid()).encode()]


async def asgi(scope: Any, receive: Any, send: Any) -> None:
    """The same."""
    if scope["type"] == "lifespan":
        while (await receive())["type"] != "lifespan.shutdown":
            await send({"type": "lifespan.startup.complete"})
        await send({"type": "lifespan.shutdown.complete"})
        return
    await asyncio.sleep(0)
    _end(scope["path"])
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": str(os.getpid()).encode()})
