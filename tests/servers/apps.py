"""The apps that the servers under test serve: the same paths as WSGI and as ASGI. Only the standard library."""

from __future__ import annotations

import asyncio
import mmap
import os
import sys
import tempfile
import threading
import time
from urllib.parse import parse_qs

KEPT = []
PART = b"0123456789abcdef" * 4096


def held() -> int:
    """Resident bytes of this worker that have no file behind them, as its limits count."""
    with open("/proc/self/statm", "rb") as statm:
        _, resident, shared, *_ = statm.read().split()
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")


def leak(kib: int) -> None:
    """Keep so much more, for ever."""
    KEPT.append(b"x" * (kib << 10))


def fill(size: int, after: float = 0) -> None:
    """Grow until so many bytes are held, and not any further; begin `after` seconds."""
    time.sleep(after)
    while held() < size:
        leak(1024)


def map_pages(size: int, kind: str) -> None:
    """Map so many bytes and keep them: pages of a file on a disk to `read`, `dirty` ones, or `shared` memory."""
    reads = kind == "read"
    with tempfile.TemporaryFile(dir="/var/tmp") as file:
        file.write(bytes(size) if reads else b"")  # fresh: not on the disk yet
        file.truncate(size)
        pages = mmap.mmap(-1 if kind == "shared" else file.fileno(), size, prot=mmap.PROT_READ | (0 if reads else mmap.PROT_WRITE))
    for at in range(0, size, mmap.PAGESIZE):
        if reads:
            _ = pages[at]
        else:
            pages[at] = 1
    KEPT.append(pages)


def answer(path: str, query: str) -> bytes:
    """The body for a path that needs no server; KeyError for any other."""
    asked = {name: values[-1] for name, values in parse_qs(query).items()}
    if path == "/leak":
        leak(int(asked["kib"]))
    if path == "/fill":
        fill(int(asked["mib"]) << 20)
    if path == "/later":
        threading.Thread(target=fill, args=(int(asked["mib"]) << 20, 0.5), daemon=True).start()
    if path == "/map":
        map_pages(int(asked["mib"]) << 20, asked["kind"])
    if path == "/hog":
        fill(sys.maxsize)
    if path == "/raise":
        raise ValueError("the app's own error")
    bodies = {"/pid": str(os.getpid()), "/memory": str(held())}
    return bodies.get(path, f"{path}?{query}").encode()


def seconds(path: str, query: str) -> float:
    """How long an answer takes."""
    return float(parse_qs(query).get("s", ["2" if path == "/slow" else "0"])[-1])


def wsgi(environ, start_response):
    """As WSGI."""
    path, query = environ["PATH_INFO"], environ.get("QUERY_STRING", "")
    if path == "/file":
        start_response("200 OK", [("Content-Type", "application/octet-stream")])
        return environ["wsgi.file_wrapper"](open(query, "rb"))
    if path in ("/stream", "/drip"):
        start_response("200 OK", [("Content-Type", "text/plain")])
        return dripping(0.05 if path == "/drip" else 0.001)
    while path == "/held" and os.path.exists("request-held"):
        time.sleep(0.01)
    if pause := seconds(path, query):
        time.sleep(pause)
    body = answer(path, query)
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(body)))])
    return [body]


def dripping(pause: float):
    """40 parts, one after the other."""
    for _ in range(40):
        time.sleep(pause)
        yield PART


async def asgi(scope, receive, send):
    """As ASGI."""
    if scope["type"] == "http":
        await respond(scope, send)
    else:
        await (lifespan if scope["type"] == "lifespan" else echo)(receive, send)


async def respond(scope, send):
    """One request."""
    path, query = scope["path"], scope["query_string"].decode()
    headers = [(b"content-type", b"text/plain")]
    if path in ("/stream", "/drip"):
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for _ in range(40):
            await asyncio.sleep(0.05 if path == "/drip" else 0.001)
            await send({"type": "http.response.body", "body": PART, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
        return
    if path == "/sse":
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        while True:
            await send({"type": "http.response.body", "body": b"data: event\n\n", "more_body": True})
            await asyncio.sleep(0.05)
    while path == "/held" and os.path.exists("request-held"):
        await asyncio.sleep(0.01)
    if pause := seconds(path, query):
        await asyncio.sleep(pause)
    body = answer(path, query)
    headers.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})
    if path == "/background":
        await asyncio.sleep(1.5)
        tell("background work is done")


async def echo(receive, send):
    """A websocket."""
    while (message := await receive())["type"] != "websocket.disconnect":
        accepts = message["type"] == "websocket.connect"
        await send({"type": "websocket.accept"} if accepts else {"type": "websocket.send", "text": message["text"]})


async def lifespan(receive, send):
    """Start and end."""
    while (message := await receive())["type"] != "lifespan.shutdown":
        await send({"type": f"{message['type']}.complete"})
    tell("lifespan's shutdown")
    await send({"type": "lifespan.shutdown.complete"})


def tell(what: str) -> None:
    """A line of this worker's, for the log: in one write, beside those of others."""
    os.write(1, f"[{os.getpid()}] {what}\n".encode())


if os.environ.get("APPS_FAIL"):
    sys.stderr.write("the app fails to import\n")
    import there_is_no_such_module  # noqa: F401
