"""The scenarios' app: /leak?kib=N keeps so much for ever, /fill?mib=N grows to so much, /hog takes all; s=N makes it take N seconds."""

from __future__ import annotations

import asyncio
import mmap
import os
import sys
import threading
import time
from urllib.parse import parse_qs

#: Loaded with the app: with preload_app it is the supervisor's.
KEPT: list[bytes] = [b"x" * (int(os.environ.get("BALLAST_MIB", "0")) << 20)]


def map_for_ever() -> None:
    """Map a page and unmap it, over and over: the process's mappings are never at rest."""
    while True:
        mmap.mmap(-1, 1 << 20).close()
        time.sleep(0)


def resident() -> int:
    """This process's resident bytes."""
    with open("/proc/self/statm", "rb") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def fill(size: int) -> None:
    """Grow to `size` bytes, and not any further."""
    while resident() < size:
        KEPT.append(b"x" * (1 << 20))


def answer(path: str, query: str) -> tuple[float, bytes]:
    """How long it takes, and the body."""
    if os.environ.pop("MAPPING", None):  # here: a thread of the supervisor's would not live on in its forks
        threading.Thread(target=map_for_ever, daemon=True).start()
    asked = {key: float(values[-1]) for key, values in parse_qs(query).items()}
    if path == "/leak":
        KEPT.append(b"x" * (int(asked["kib"]) << 10))
    if path == "/fill":
        fill(int(asked["mib"]) << 20)
    if path == "/hog":
        fill(sys.maxsize)
    return asked.get("s", 0), str(os.getpid()).encode()


def wsgi(environ, start_response):
    """As WSGI."""
    seconds, body = answer(environ["PATH_INFO"], environ.get("QUERY_STRING", ""))
    time.sleep(seconds)
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(body)))])
    return [body]


async def asgi(scope, receive, send):
    """As ASGI."""
    if scope["type"] == "lifespan":
        while (message := await receive())["type"] == "lifespan.startup":
            await send({"type": "lifespan.startup.complete"})
        await send({"type": f"{message['type']}.complete"})
        return
    seconds, body = answer(scope["path"], scope["query_string"].decode())
    await asyncio.sleep(seconds)
    headers = [(b"content-type", b"text/plain"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})
