"""Apps whose requests end their worker, for deaths.py: as WSGI and as ASGI."""

from __future__ import annotations

import os
import signal
import time
from typing import Any


def _end(path: str) -> None:
    if path == "/exit":
        os._exit(7)
    if path == "/hang":
        os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(60)  # another thread may take the signal, and this one go on for a moment
    held = []
    while path == "/hog":
        held.append(b"x" * (1 << 20))


def wsgi(environ: dict[str, Any], start_response: Any) -> list[bytes]:
    """Nothing, if the worker outlives the request."""
    _end(environ["PATH_INFO"])
    start_response("200 OK", [("Content-Length", "2")])
    return [b"ok"]


async def asgi(scope: Any, receive: Any, send: Any) -> None:
    """The same."""
    if scope["type"] != "http":
        return
    _end(scope["path"])
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})
