"""What uvicorn serves under test: the ASGI app of apps.py, with a lifespan that tells, and boots that are slow or fail.

A file in the working directory has its effect at the next boot: `slow` has the seconds that it takes;
`import-fails` and `lifespan-fails` say by their names what they do, with `hangs-and-fails` it does not even answer before.
"""

from __future__ import annotations

import ctypes
import os
import time

import apps

from oomsafe.asgi import MemoryMiddleware

wsgi = apps.wsgi


async def asgi(scope, receive, send):
    """The app."""
    await (lifespan(receive, send) if scope["type"] == "lifespan" else apps.asgi(scope, receive, send))


async def lifespan(receive, send):
    """Start, or fail to, and end."""
    await receive()
    if os.path.exists("lifespan-fails"):
        await send({"type": "lifespan.startup.failed", "message": "there is a file lifespan-fails"})
        return
    await send({"type": "lifespan.startup.complete"})
    await receive()
    apps.tell("lifespan.shutdown")
    await send({"type": "lifespan.shutdown.complete"})


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
    apps.tell("hangs and fails")
    ctypes.PyDLL(None).sleep(2)  # with the GIL
    os._exit(3)
