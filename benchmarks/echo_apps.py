"""The apps that recycling.py and unserved.py load: each answer's body is the query string of its request, so that it can be checked.

/leak keeps $LEAK_BYTES more for ever, touched. /page keeps $PAGE_BYTES for ever, once a process and $PAGES times in all: files in
the working directory count them. The body of a POST is read before the answer. To import this module takes $BOOT_SECONDS. /slow takes
$SLOW_SECONDS. /loop names the event loop; other paths only answer.
"""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any

LEAK = int(os.environ.get("LEAK_BYTES", "0"))
PAGE, PAGES = int(os.environ.get("PAGE_BYTES", "0")), int(os.environ.get("PAGES", "0"))
SLOW = float(os.environ.get("SLOW_SECONDS", "0"))

kept: list[bytes] = []
page: list[bytes] = []

time.sleep(float(os.environ.get("BOOT_SECONDS", "0")))


def leak() -> None:
    """Filled with a byte that is not zero: pages of zeros would be mapped lazily, and cost nothing."""
    kept.append(b"x" * LEAK)


def open_page() -> None:
    """Keep it, unless it has been kept often enough."""
    if not page and any(_claimed(f"page-{number}") for number in range(PAGES)):
        page.append(b"x" * PAGE)


def _claimed(name: str) -> bool:
    try:
        os.close(os.open(name, os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError:
        return False
    return True


def wsgi(environ: dict[str, Any], start_response: Any) -> list[bytes]:
    """The WSGI app."""
    path, body = environ["PATH_INFO"], environ["QUERY_STRING"].encode("latin-1")
    if length := int(environ.get("CONTENT_LENGTH") or 0):
        environ["wsgi.input"].read(length)
    if path == "/leak":
        leak()
    elif path == "/page":
        open_page()
    elif path == "/slow":
        time.sleep(SLOW)
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(body)))])
    return [body]


async def asgi(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """The same as an ASGI app."""
    if scope["type"] == "lifespan":
        await _lifespan(receive, send)
        return
    path, body = scope["path"], scope["query_string"]
    if scope["method"] == "POST":
        while (await receive()).get("more_body"):
            pass
    if path == "/leak":
        leak()
    elif path == "/slow":
        await asyncio.sleep(SLOW)
    elif path == "/page":
        open_page()
    elif path == "/loop":
        body = type(asyncio.get_running_loop()).__module__.encode()
    headers = [(b"content-type", b"text/plain"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _lifespan(receive: Any, send: Any) -> None:
    while (message := await receive())["type"] != "lifespan.shutdown":
        await send({"type": f"{message['type']}.complete"})
    await send({"type": "lifespan.shutdown.complete"})
