"""A pool whose workers wait for their replacements when they are told to, not when they please."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from serving import ASGI_CLASSES, Gunicorn, until

#: An app with a model of its own: from here to a soft limit of 240 MiB it is not far, so a worker that is above it has not grown fast,
#: and waits. Its boot can be made to take long, and to fail.
BIG = """
import os, threading, time
import apps

if os.path.exists("held"):
    os.write(1, b"a worker is held\\n")
    while os.path.exists("held"):
        time.sleep(0.01)
if os.path.exists("broken"):
    raise RuntimeError("a broken deploy")
apps.fill(232 << 20)
wsgi = apps.wsgi

async def asgi(scope, receive, send):
    if scope["type"] == "lifespan" and os.path.exists("fails"):
        await receive()
        threading.Thread(target=time.sleep, args=(1.2,)).start()  # it is a while between its end and its death
        await send({"type": "lifespan.startup.failed", "message": "no database"})
    else:
        await apps.asgi(scope, receive, send)
"""

#: Of 4 MiB/s a worker: one that grew by a quarter of its limit during a boot would not wait.
SLOW_LEAK = "/leak?kib=256&s=0.12"


def big(serve, worker_class: str = "gthread", workers: int = 2, settings: str = "", **policy: object) -> Gunicorn:
    """A gunicorn whose workers have some 233 MiB, and are over their limit with 240."""
    app = "big:asgi" if worker_class in ASGI_CLASSES else "big:wsgi"
    policy = {"soft_limit": "240MiB", "min_lifetime": 0, "jitter": 0, "sustain": 0.5, **policy}
    return serve(worker_class, workers, app=app, files={"big.py": BIG}, settings=settings, **policy).serving(workers)


def states(gunicorn: Gunicorn) -> Counter[str]:
    """How many workers are in each state."""
    return Counter(worker.state for worker in gunicorn.pool().workers)


def waiting(gunicorn: Gunicorn, mib: int = 241) -> int:
    """Take a worker over its limit, and wait until it waits for its replacement. The worker's pid."""
    before = {worker.pid for worker in gunicorn.pool().workers if worker.state == "waiting"}
    assert gunicorn.get(f"/fill?mib={mib}")[0] == 200
    found = until(
        lambda: [worker.pid for worker in gunicorn.pool().workers if worker.state == "waiting" and worker.pid not in before],
        "a worker waits for its replacement",
    )
    return found[0]


def held(gunicorn: Gunicorn) -> Path:
    """While this file exists, no worker gets through its boot."""
    file = gunicorn.folder / "held"
    file.touch()
    return file


def surging(gunicorn: Gunicorn) -> tuple[Path, int]:
    """In the middle of it: a worker waits, its replacement boots until the file is removed. The file, the waiting worker's pid."""
    file = held(gunicorn)
    pid = waiting(gunicorn)
    gunicorn.wait_for("a worker is held")
    assert states(gunicorn)["starting"] == 1
    return file, pid
