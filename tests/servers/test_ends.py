"""How workers end: each end is called what it was, in the log at once, on the scoreboard and in the metrics."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
from typing import Any

import pytest
from serving import WSGI_CLASSES, Server, until
from uvicorning import health_check


@pytest.fixture(params=["sync", "gthread", "uvicorn_worker.UvicornWorker", "uvicorn"])
def server(request, serve, serve_uvicorn) -> Server:
    """A pool of two whose requests may end their worker."""
    kind = request.param
    if kind == "uvicorn":
        return serve_uvicorn(*health_check(2), app="ending_apps:asgi", soft_limit="500MiB").serving(2)
    app = "ending_apps:wsgi" if kind in WSGI_CLASSES else "ending_apps:asgi"
    return serve(kind, 2, app=app, settings="timeout = 2\n", soft_limit="500MiB").serving(2)


def ask(server: Server, path: str) -> None:
    """A request that is not answered."""
    with contextlib.suppress(OSError, http.client.HTTPException):
        server.get(path)


def ended(server: Server, pid: int, words: str) -> str:
    """The one line about this worker's end, once it is there."""
    server.wait_for(f"worker {pid} (slot ", seconds=30)
    until(lambda: pid not in server.workers() and len(server.workers()) == 2, "it is replaced")
    (line,) = [line for line in server.lines(f"worker {pid} (slot ") if " recycling" not in line]
    assert words in line
    return line


def gone(server: Server, path: str) -> int:
    """The worker that this request has ended."""
    before = set(server.workers())
    ask(server, path)
    return until(lambda: before - set(server.workers()), "a worker is gone", 30).pop()


def test_each_end_is_called_what_it_was(server):
    """And what the worker was doing is told, also of one that its server has ended."""
    told = [
        (ended(server, gone(server, "/exit"), "exited by itself with status 7"), "GET /exit ("),
        (ended(server, gone(server, "/crash"), "crashed with SIGSEGV: no OOM kill"), "GET /crash ("),
        (ended(server, gone(server, "/abort"), "crashed with SIGABRT: no OOM kill"), "GET /abort ("),
        (ended(server, gone(server, "/hang"), "was ended by its server, because it had not answered in time"), "GET /hang ("),
    ]
    victim = server.serving(2).workers()[0]
    os.kill(victim, signal.SIGKILL)
    told.append((ended(server, victim, "was ended by somebody's SIGKILL: no OOM kill"), "nothing was in flight"))

    assert [line for line, doing in told if doing not in line] == []
    pool = server.serving(2).pool()
    counts = {verdict: count for verdict, count in pool.ends.items() if count}
    # on a busy machine a server may end a worker that is merely slow
    assert counts.pop("timeout") >= 1
    assert counts == {"exited": 1, "crashed": 2, "signal": 1}
    assert [death.verdict for death in pool.deaths if death.verdict != "timeout"] == ["signal", "crashed", "crashed", "exited"]
    assert all(death.line in server.log() for death in pool.deaths)


def test_ends_that_are_in_order_are_counted_and_not_told(serve, serve_uvicorn):
    """A reload, one worker less, a shutdown; recycles have their own lines."""
    for server in (serve("gthread", 2, soft_limit="200MiB", min_lifetime=0), serve_uvicorn(soft_limit="200MiB", min_lifetime=0)):
        server.serving(2)
        server.signal(signal.SIGHUP)
        until(lambda server=server: server.pool().ends["server"] >= 2, "both are replaced", 30)
        server.serving(2)
        server.signal(signal.SIGTTOU)
        until(lambda server=server: len(server.workers()) == 1, "one worker less", 30)
        server.get("/fill?mib=240")
        until(lambda server=server: server.pool().ends["recycled"] == 1, "it is recycled", 30)

        ends: dict[str, Any] = server.pool().ends
        assert {verdict for verdict, count in ends.items() if count} == {"server", "recycled"}
        assert server.pool().deaths == []
        assert server.stop() == 0
        assert server.lines("no OOM kill") == []


@pytest.mark.parametrize("function", ["died", "hangs", "fails"])
@pytest.mark.parametrize("kind", ["gthread", "uvicorn"])
def test_who_asks_is_told(serve, serve_uvicorn, kind, function):
    """Of each death; a function that hangs or fails hurts nobody."""
    policy = {"soft_limit": "500MiB", "on_death": f"alerts:{function}"}
    server = serve_uvicorn(app="ending_apps:asgi", **policy) if kind == "uvicorn" else serve(kind, 2, app="ending_apps:wsgi", **policy)
    told = server.serving(2).folder / "died"
    pids = []
    for _ in range(3):
        # by the scoreboard: the server has a child more while a function is called
        workers = until(lambda: len(now := [one.pid for one in server.pool().workers if one.state.serves]) == 2 and now, "two serve", 30)
        pids.append(workers[0])
        os.kill(pids[-1], signal.SIGSEGV)
        until(lambda: pids[-1] not in [worker.pid for worker in server.pool().workers], "it is gone")

    lines = until(lambda: told.exists() and len(lines := told.read_text().splitlines()) == 3 and lines, "all are told of", 30)

    assert sorted(lines) == sorted(f"crashed {pid}" for pid in pids)
    assert server.get("/")[0] == 200
    if function == "fails":
        server.wait_for("on_death has failed for worker ", 3)
        assert len(server.lines("RuntimeError: no alert?for you")) == 3
    assert server.lines("oomsafe failed in") == []
    assert server.stop() == 0


def test_a_pool_that_was_killed_is_explained_by_the_next(serve, tmp_path):
    """Once, from its folder on disk; Kubernetes shows the termination log of a container that is gone."""
    log, state = tmp_path / "termination-log", tmp_path / "state"
    log.touch()
    state.mkdir(mode=0o700)
    more = {"env": {"OOMSAFE_STATE": str(state)}, "soft_limit": "500MiB", "termination_log": str(log), "name": "shop"}
    first = serve("sync", 2, app="ending_apps:wsgi", **more).serving(2)
    victim = gone(first, "/exit")
    until(lambda: f"worker {victim} (slot " in log.read_text(), "the termination log tells", 30)
    until(lambda: any(f"worker {victim} (slot ".encode() in note.read_bytes() for note in state.glob("notes/*")), "the note tells", 30)
    first.signal(signal.SIGKILL)
    first.ended()
    assert f"worker {victim} (slot " in log.read_text()
    log.write_text("")

    second = serve("sync", 2, app="ending_apps:wsgi", **more).serving(2)
    (line,) = second.lines("the pool before this one ended without a goodbye")
    assert f"worker {victim} (slot " in line
    assert second.stop() == 0
    assert (log.read_text(), list(state.glob("notes/*"))) == ("", [])

    third = serve("sync", 2, app="ending_apps:wsgi", **more).serving(2)
    assert third.lines("the pool before this one") == []


def test_ends_of_celery_s_children(celery):
    """By hand, a crash, a time limit, a memory limit: four lines, each right, and what the node was told to do is in order."""
    node = celery(soft_limit="1GiB").ready()
    told = []

    def child() -> int:
        workers = until(lambda: len(now := [one.pid for one in node.pool().workers if one.state.serves]) == 2 and now, "both serve", 30)
        return workers[0]

    for number, words in (
        (signal.SIGKILL, "was ended by somebody's SIGKILL: no OOM kill"),
        (signal.SIGSEGV, "crashed with SIGSEGV: no OOM kill"),
    ):
        pid = child()
        os.kill(pid, number)
        node.wait_for(f"worker {pid} (slot ", seconds=30)
        told.append(words)
    assert (
        node.ask("result = proj.sleep.apply_async((60,), time_limit=1).get(timeout=60, propagate=False).__class__.__name__")
        == "TimeLimitExceeded"
    )
    node.wait_for("was ended by its server, because its task had passed its time limit", seconds=30)
    assert node.ask("result = proj.balloon.delay('c').get(timeout=60, propagate=False).__class__.__name__") == "MemoryLimitExceeded"
    child()

    until(lambda: node.pool().ends["limit"], "it is counted", 30)
    assert [len(node.lines(words)) for words in told] == [1, 1]
    assert {verdict: count for verdict, count in node.pool().ends.items() if count} == {"signal": 1, "crashed": 1, "timeout": 1, "limit": 1}
    assert "proj.sleep[" in next(death.line for death in node.pool().deaths if death.verdict == "timeout")
    os.kill(node.process.pid, signal.SIGTERM)
    node.process.wait(30)
    assert node.lines("oomsafe failed in") == []
    late = [line for line in node.log().partition("Warm shutdown")[2].splitlines() if "(slot " in line]
    assert late == []  # children that end with their node end in order
