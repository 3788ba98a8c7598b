"""A process that no supervisor of ours looks after has its row in `oomsafe status`, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from celerying import Start
from serving import Gunicorn, Server, until
from uvicorning import Uvicorn

from oomsafe.kernel.process import is_alive
from oomsafe.scoreboard.places import board_of

PLAIN = ("-m", "uvicorn")

#: A plain WSGI server, whose app may fork for a request: the fork comes through the middleware, too.
WSGI = """
import atexit, os
from wsgiref.simple_server import make_server
import oomsafe.wsgi

def inner(environ, start_response):
    if environ["PATH_INFO"] == "/fork":
        pid = os.fork()
        if not pid:
            app({**environ, "PATH_INFO": "/"}, lambda *_: None)
            atexit._run_exitfuncs()  # as at any process's end
            os._exit(0)
        os.waitpid(pid, 0)
        start_response("200 OK", [])
        return [b"%d" % pid]
    start_response("200 OK", [])
    return [b"yes"]

app = oomsafe.wsgi.MemoryMiddleware(inner)

if __name__ == "__main__":
    server = make_server("127.0.0.1", 0, app)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()
"""

DJANGO = """
from django.conf import settings
settings.configure(ROOT_URLCONF="site1", SECRET_KEY="x", MIDDLEWARE=["oomsafe.django.MemoryMiddleware"], OOMSAFE={"name": "the site"})
from django.core.wsgi import get_wsgi_application
from django.http import HttpResponse
from django.urls import path
urlpatterns = [path("", lambda request: HttpResponse("yes"))]
application = get_wsgi_application()

if __name__ == "__main__":
    from wsgiref.simple_server import make_server
    server = make_server("127.0.0.1", 0, application)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()
"""


#: Python has no handler of its own for a signal that is ignored when it starts, as SIGINT is below a shell's &.
HEARS = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"


class Program(Server):
    """A Python file that serves."""

    LISTENS = "http://"

    def __init__(self, folder: Path, text: str, name: str, env: dict[str, str]) -> None:
        (folder / name).write_text(HEARS + text)
        super().__init__(folder, [sys.executable, name], env)


def row(pid: int) -> dict[str, Any]:
    """What `oomsafe status` shows of the process, for a machine, as soon as it does."""
    path = until(lambda: board_of(pid), f"{pid} has a row")
    asked = [sys.executable, "-m", "oomsafe.cli", "status", "--scoreboard", path]
    ended = subprocess.run([*asked, "--json"], capture_output=True, text=True, timeout=60, check=True)
    (pool,) = json.loads(ended.stdout)["pools"]
    (worker,) = pool["workers"]
    assert (pool["server"], pool["supervisor"], worker["pid"]) == ("single process", pid, pid)
    assert worker["figures"]["rss"] > 5 << 20
    text = subprocess.run(asked, capture_output=True, text=True, timeout=60, check=True).stdout
    assert f"a child of {pool['parent']} (" in text.replace("\n", " ")
    return {**pool, **worker}


def boards() -> list[str]:
    """All that lie where boards lie."""
    folder = Path(f"/dev/shm/oomsafe-{os.geteuid()}")
    return [path.name for path in folder.glob("*.board*")]


def left_by(pid: int) -> list[str]:
    """What it has left there."""
    return [name for name in boards() if name.startswith(f"{pid}-")]


def test_a_guarded_uvicorn_of_one_process(serve_uvicorn: Callable[..., Uvicorn]) -> None:
    """From its boot to its end by a signal."""
    uvicorn = serve_uvicorn(workers=1, soft_limit="500MiB").up()

    found = row(uvicorn.pid)

    assert (found["name"], found["state"], found["figures"]["soft"] <= 500 << 20) == ("uvicorn_apps:asgi", "serving", True)
    assert found["parent"] == os.getpid()
    assert found["limit"] > found["budget"] > 0
    assert uvicorn.lines("oomsafe guards this process (uvicorn_apps:asgi): soft limit")
    uvicorn.stop()
    assert left_by(uvicorn.pid) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_a_plain_uvicorn_with_the_middleware(serve_uvicorn: Callable[..., Uvicorn], workers: int) -> None:
    """Each of several has a row of its own, which says whose child it is."""
    uvicorn = serve_uvicorn(workers=workers, start=PLAIN, app="uvicorn_apps:protected", soft_limit="500MiB").up()
    pids = [uvicorn.pid] if workers == 1 else until(lambda: len(uvicorn.workers()) == workers and uvicorn.workers(), "all are there")

    rows = [row(pid) for pid in pids]

    assert {found["name"] for found in rows} == {"uvicorn_apps:protected"}
    assert {found["parent"] for found in rows} == {os.getpid() if workers == 1 else uvicorn.pid}
    uvicorn.stop()
    assert [left_by(pid) for pid in pids] == [[]] * workers


@pytest.mark.parametrize(("text", "name"), [(WSGI, ""), (DJANGO, "the site")], ids=["wsgi", "django"])
def test_a_plain_wsgi_server(started: Callable[..., Any], text: str, name: str) -> None:
    """From its first request on; by SIGINT it ends as Python does."""
    program = started(lambda folder: Program(folder, text, "site1.py", {"OOMSAFE_SOFT_LIMIT": "500MiB"}))
    program.wait_for("http://")
    assert board_of(program.pid) is None
    program.get("/")

    assert row(program.pid)["name"] == name
    program.signal(signal.SIGINT)
    program.ended()
    assert left_by(program.pid) == []


def test_a_fork_has_none_and_takes_none_with_it(started: Callable[..., Any]) -> None:
    """It comes through the middleware and exits; its parent's row stays, as it was."""
    program = started(lambda folder: Program(folder, WSGI, "site1.py", {"OOMSAFE_SOFT_LIMIT": "500MiB"}))
    program.wait_for("http://")
    program.get("/")

    for _ in range(3):
        status, _, body = program.get("/fork")
        assert status == 200
        assert left_by(int(body)) == []

    assert row(program.pid)["pid"] == program.pid


def test_workers_of_a_plain_gunicorn(serve: Callable[..., Gunicorn]) -> None:
    """Each is a row of its own; SIGTERM to the master leaves nothing."""
    gunicorn = serve("sync", install=False, app="site1:app", files={"site1.py": WSGI}, env={"OOMSAFE_SOFT_LIMIT": "500MiB"})
    pids = until(lambda: len(gunicorn.workers()) == 2 and gunicorn.workers(), "both are there")
    until(lambda: gunicorn.get("/")[0] == 200 and all(board_of(pid) for pid in pids), "both have answered")

    assert {row(pid)["parent"] for pid in pids} == {gunicorn.pid}
    gunicorn.stop()
    assert [left_by(pid) for pid in pids] == [[], []]


@pytest.mark.parametrize("pool", ["solo", "threads"])
def test_a_celery_node_of_one_process(celery: Start, pool: str) -> None:
    """Under its hostname."""
    node = celery(argv=("-P", pool, "-n", "shop@here"), soft_limit="500MiB").ready()

    assert row(node.pid)["name"] == "shop@here"
    assert node.lines("oomsafe guards this process (shop@here): soft limit")
    os.kill(node.pid, signal.SIGTERM)
    until(lambda: not is_alive(node.pid, 0), "it has ended")
    assert left_by(node.pid) == []


def test_one_that_was_killed_is_swept_by_the_next(started: Callable[..., Any]) -> None:
    """Nothing can run then; status does not show it, and the next process that has a row, here or in another test, removes it."""
    killed, other = (started(lambda folder: Program(folder, WSGI, "site1.py", {})) for _ in range(2))
    killed.wait_for("http://")
    killed.get("/")
    assert len(left_by(killed.pid)) == 1
    killed.process.kill()
    killed.ended()
    assert board_of(killed.pid) is None

    other.wait_for("http://")
    other.get("/")

    assert left_by(killed.pid) == []


def test_without_any_folder_it_goes_without(started: Callable[..., Any], tmp_path: Path) -> None:
    """Nothing is said of it, and the process is guarded all the same."""
    hidden = "import oomsafe.scoreboard.places as places; places.folders = lambda: iter(['/proc/oomsafe-0'])\n"
    program = started(lambda folder: Program(folder, hidden + WSGI, "site1.py", {"OOMSAFE_SOFT_LIMIT": "500MiB"}))
    program.wait_for("http://")

    assert program.get("/")[0] == 200

    assert left_by(program.pid) == []
    assert "Traceback" not in program.log()
    assert "scoreboard" not in program.log()
