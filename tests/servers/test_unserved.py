"""When all workers get far too large at once, and memory is not short: somebody serves at any time, however long a boot takes."""

from __future__ import annotations

import pytest
from clients import Load, Watch
from serving import ASGI_CLASSES, CLASSES, Server, until
from surging import BIG, held, states
from uvicorning import health_check
from versions import loses_none

#: All workers that are there grow at once, so fast and so far that none of them seems to have the time to wait.
GROWING = """
import os, threading, time
import apps
from big import asgi, wsgi

def grow():
    while not os.path.exists("grow"):
        time.sleep(0.01)
    apps.fill(330 << 20)

if not os.path.exists("grow"):
    threading.Thread(target=grow, daemon=True).start()
"""

FILES = {"big.py": BIG, "growing.py": GROWING}
POLICY = {"soft_limit": "240MiB", "min_lifetime": 0, "jitter": 0, "sustain": 0}

#: Answers after which every worker has had several looks at its memory.
ENOUGH = 200


@pytest.fixture(params=[*CLASSES, "uvicorn"])
def pool(request, serve, serve_uvicorn):
    """Two workers of each server."""
    if request.param == "uvicorn":
        # a boot that is held answers no ping, and uvicorn would kill it
        return serve_uvicorn(*health_check(60), app="growing:asgi", files=FILES, **POLICY).serving()
    loses_none(request.param)
    app = "growing:asgi" if request.param in ASGI_CLASSES else "growing:wsgi"
    return serve(request.param, 2, app=app, files=FILES, **POLICY).serving()


def able(pool: Server) -> int:
    """How many workers take requests."""
    counts = states(pool)
    return counts["serving"] + counts["waiting"]


def test_somebody_serves_while_the_replacements_boot(pool):
    """Boots last until a file is removed: before that, no request can be answered but by a worker that has grown."""
    old = set(pool.workers())
    file = held(pool)

    with Watch(lambda: able(pool)) as watch, Load(pool, "/leak?kib=0&s=0.02") as load:
        (pool.folder / "grow").touch()
        pool.wait_for("a worker is held")
        served = load.served
        until(lambda: able(pool) == 0 or load.served > served + ENOUGH, "one of them serves on, or all have gone")
        left = able(pool)
        file.unlink()
        until(lambda: not old & set(pool.workers()), "both are replaced", 40)
        pool.serving()

    assert left >= 1
    assert min(watch.seen) >= 1
    assert load.failed == []
