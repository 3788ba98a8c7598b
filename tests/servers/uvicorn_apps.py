"""What uvicorn serves under test: the ASGI app of apps.py, with a lifespan, a websocket, an endless stream, and boots that fail.

A file in the working directory has its effect at the next boot: `slow` has the seconds that it takes;
`import-fails` and `lifespan-fails` say by their names what they do, with `hangs-and-fails` it does not even answer before.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import time

import apps

from oomsafe.asgi import MemoryMiddleware


def tell(what):
    """A line of this worker's, for the log: in one write, beside those of others."""
    os.write(2, f"[{os.getpid()}] {what}\n".encode())


wsgi = apps.wsgi


async def asgi(scope, receive, send):
    """The app."""
    if scope["type"] == "lifespan":
        await lifespan(receive, send)
    elif scope["type"] == "websocket":
        await echo(receive, send)
    elif scope["path"] == "/sse":
        await events(send)
    else:
        if scope["path"] == "/leak":
            await asyncio.sleep(apps.seconds(scope["query_string"].decode()) if b"s=" in scope["query_string"] else 0)
        await apps.respond(scope, send)


async def lifespan(receive, send):
    """Start, or fail to, and end."""
    await receive()
    if os.path.exists("lifespan-fails"):
        await send({"type": "lifespan.startup.failed", "message": "there is a file lifespan-fails"})
        return
    await send({"type": "lifespan.startup.complete"})
    await receive()
    tell("lifespan.shutdown")
    await send({"type": "lifespan.shutdown.complete"})


async def echo(receive, send):
    """A websocket."""
    while (message := await receive())["type"] != "websocket.disconnect":
        accepts = message["type"] == "websocket.connect"
        await send({"type": "websocket.accept"} if accepts else {"type": "websocket.send", "text": message["text"]})


async def events(send):
    """Without an end."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
    while True:
        await send({"type": "http.response.body", "body": b"data: event\n\n", "more_body": True})
        await asyncio.sleep(0.05)


# so that a little growth is a small share, whatever Python and its libraries take
apps.fill(100 << 20)

#: For a uvicorn that oomsafe does not supervise: the policy is in the environment.
protected = MemoryMiddleware(asgi)

if os.path.exists("slow"):
    with open("slow") as slow:
        time.sleep(float(slow.read() or 0))
if os.path.exists("import-fails"):
    import there_is_no_such_module  # noqa: F401
if os.path.exists("hangs-and-fails"):
    tell("hangs and fails")
    ctypes.PyDLL(None).sleep(2)  # with the GIL
    os._exit(3)
