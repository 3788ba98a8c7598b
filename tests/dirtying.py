"""gunicorn with dirty workers, for the tests of them: an HTTP app whose requests are actions of a dirty app."""

from __future__ import annotations

import os
import time

from serving import Gunicorn, Server, until
from versions import provided

from oomsafe.kernel.process import children_of
from oomsafe.scoreboard.board import Scoreboard
from oomsafe.scoreboard.places import board_of
from oomsafe.scoreboard.view import PoolView

#: The dirty app has a model of 60 MiB; its boot can be held up, and made to fail.
HEAVY = """
import os, time
import apps
from gunicorn.dirty import DirtyApp

class Heavy(DirtyApp):
    def init(self):
        if os.path.exists("held"):
            os.write(1, b"a dirty worker is held\\n")
        while os.path.exists("held"):
            time.sleep(0.01)
        if os.path.exists("broken"):
            raise RuntimeError("a broken model")
        apps.fill(60 << 20)

    def grow(self, mib):
        apps.fill(mib << 20)
        return os.getpid()

    def act(self, kib=0, seconds=0):
        apps.leak(kib)
        time.sleep(seconds)
        return os.getpid()

    def hog(self):
        apps.fill(1 << 62)
"""

HTTP = """
from urllib.parse import parse_qs
from gunicorn.dirty import get_dirty_client
import apps

def wsgi(environ, start_response):
    path, query = environ["PATH_INFO"], environ.get("QUERY_STRING", "")
    if path == "/metrics":
        from oomsafe.metrics.prometheus import metrics_app
        return metrics_app(environ, start_response)
    if not path.startswith("/dirty/"):
        return apps.wsgi(environ, start_response)
    asked = {name: float(values[-1]) if name == "seconds" else int(values[-1]) for name, values in parse_qs(query).items() if name != "n"}
    pid = get_dirty_client().execute("heavy:Heavy", path[7:], **asked)
    body = (f"{path}?{query}" if "n=" in query else str(pid)).encode()
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]
"""

FILES = {"heavy.py": HEAVY, "front.py": HTTP}


def has_dirty_workers() -> None:
    """They came with gunicorn 25."""
    try:
        import gunicorn.dirty  # noqa: F401
    except ImportError:
        provided(False, "gunicorn before 25 has no dirty workers")


def dirty(serve, dirty_workers: int = 1, *, settings: str = "", **more) -> Gunicorn:
    """A gunicorn of two gthread workers and so many dirty ones, all of which serve."""
    has_dirty_workers()
    # a gunicorn that starts kills the dirty arbiter of another by the same name
    settings += (
        f"\nproc_name = 'oomsafe-{os.getpid()}-{time.monotonic_ns()}'\ndirty_apps = ['heavy:Heavy']\ndirty_workers = {dirty_workers}\n"
    )
    policy = {"soft_limit": "100MiB", "min_lifetime": 0, "jitter": 0, **more}
    gunicorn = serve("gthread", 2, app="front:wsgi", files=FILES, settings=settings, **policy).serving(2)
    until(lambda: [worker.state for worker in dirty_pool(gunicorn).workers] == ["serving"] * dirty_workers, "the dirty workers serve")
    return gunicorn


def dirty_arbiter(gunicorn: Server) -> int:
    """The pid of the dirty arbiter."""
    return int(gunicorn.wait_for("Spawned dirty arbiter (pid: ")[-1].partition("(pid: ")[2].partition(")")[0])


def dirty_workers(gunicorn: Server) -> list[int]:
    """The pids of the dirty workers."""
    return children_of(dirty_arbiter(gunicorn))


def dirty_pool(gunicorn: Server) -> PoolView:
    """The dirty pool, as its scoreboard shows it."""
    arbiter = dirty_arbiter(gunicorn)
    return Scoreboard.snapshot(until(lambda: board_of(arbiter), "the dirty pool has a scoreboard"))
