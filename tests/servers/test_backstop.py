"""A worker that stays above its hard limit with memory that the kernel does not refuse it is killed from outside, and replaced."""

from __future__ import annotations

import threading
import time
from contextlib import closing
from http.client import HTTPException

import pytest
from serving import until

#: An app one of whose requests maps shared memory, which RLIMIT_DATA does not count, and then stays inside.
APP = """
import os, time
import apps

def stay():
    apps.map_pages(300 << 20, "shared")
    while not os.path.exists("let-go"):
        time.sleep(0.02)  # also in the event loop

def wsgi(environ, start_response):
    if environ["PATH_INFO"] == "/export":
        stay()
    return apps.wsgi(environ, start_response)

async def asgi(scope, receive, send):
    if scope["type"] == "http" and scope["path"] == "/export":
        stay()
    await apps.asgi(scope, receive, send)
"""

POLICY = {"soft_limit": "100MiB", "hard_limit": "200MiB", "min_lifetime": 0, "jitter": 0}


def export(server, answers: list[object]) -> threading.Thread:
    """Ask for it; what comes of it is put into `answers`."""

    def ask() -> None:
        with closing(server.connect(timeout=60)) as connection:
            try:
                connection.request("GET", "/export")
                answers.append(connection.getresponse().status)
            except (OSError, HTTPException) as error:
                answers.append(type(error).__name__)

    thread = threading.Thread(target=ask)
    thread.start()
    return thread


@pytest.mark.parametrize("kind", ["sync", "uvicorn"])
def test_one_request_that_maps_too_much_ends_with_its_worker_and_nothing_else(serve, serve_uvicorn, kind: str) -> None:
    """Within seconds, not with the server's own timeout; the line names the request, and another worker takes the place."""
    files = {"exporting.py": APP}
    if kind == "uvicorn":
        server = serve_uvicorn(app="exporting:asgi", files=files, **POLICY).serving()
    else:
        server = serve(kind, app="exporting:wsgi", files=files, settings="timeout = 100", **POLICY).serving()
    before, answers, began = set(server.workers()), [], time.monotonic()

    asking = export(server, answers)
    (line,) = server.wait_for(" is killed: it holds ")
    asking.join()

    assert answers != [200]
    assert time.monotonic() - began < 30
    assert " > hard limit 200 MiB for 2." in line
    assert "in flight: GET /export (" in line
    until(lambda: len(before & set(server.workers())) == 1, "one of two is another")
    server.serving()
    assert server.get("/pid")[0] == 200
    assert server.pool().totals.by_reason["killed"] == 1
    assert len(server.lines(" is killed: it holds ")) == 1


def test_nobody_is_killed_in_a_dry_run(serve) -> None:
    """It is said."""
    server = serve("sync", app="exporting:wsgi", files={"exporting.py": APP}, settings="timeout = 100", dry_run=True, **POLICY).serving()
    before, answers = set(server.workers()), []

    asking = export(server, answers)
    server.wait_for(" would be killed (dry run): it holds ")

    assert set(server.workers()) == before
    assert answers == []
    (server.folder / "let-go").touch()
    asking.join()
    assert answers == [200]


def test_a_celery_child_is_killed_inside_its_task_which_says_so(celery) -> None:
    """No task of this node has a limit of its own; the other child goes on, and another takes the place."""
    node = celery(soft_limit="150MiB", hard_limit="250MiB").ready()
    until(lambda: len(node.pool().workers) == 2, "both are there")

    kind, args, good = node.ask(
        "bad = proj.share.delay(350); good = [proj.sleep.delay(0.05) for _ in range(10)]; "
        "error = bad.get(timeout=60, propagate=False); "
        "result = [type(error).__name__, list(error.args), [one.get(timeout=60) for one in good]]"
    )

    assert (kind, args[0], args[2], good) == ("MemoryLimitExceeded", "proj.share", 250 << 20, [0.05] * 10)
    assert args[1] > 350 << 20
    (line,) = node.lines(" is killed: it holds ")
    assert "in flight: proj.share[" in line
    assert node.ask("result = proj.leak.delay(7, 1).get(timeout=30)") == 7
    assert node.pool().totals.by_reason["killed"] == 1
