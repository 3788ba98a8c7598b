"""An idle worker, far below its limit, gives back the memory that malloc keeps: where that has paid before, and only then."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
from serving import Server, until

from oomsafe.demo.server_process import environment
from oomsafe.kernel.process import start_time
from oomsafe.policy.reclaim import IDLE_FOR

MIB = 1 << 20


def rss(pid: int) -> int:
    """What a process holds, as the kernel sees it, in bytes."""
    with open(f"/proc/{pid}/statm") as statm:
        return int(statm.read().split()[1]) * 4096


def grown(server: Server, path: str) -> int:
    """Ask for this until a worker has grown by it; that worker's pid."""

    def asked() -> int | None:
        server.get(path)
        return next((worker.pid for worker in server.pool().workers if rss(worker.pid) > 100 * MIB), None)

    pid = until(asked, "a worker has grown", 40)
    assert pid is not None
    return pid


def replaced(server: Server, path: str) -> int:
    """Have a worker grow, and an operator recycle it; the pid of one that serves after it, and has grown as much."""
    before = grown(server.serving(2), path)
    argv = [sys.executable, "-m", "oomsafe", "recycle", str(before), "--wait", "30"]
    ended = subprocess.run(argv, capture_output=True, text=True, timeout=60, env=environment(path=[]), check=False)
    assert ended.returncode == 0, ended.stderr
    until(lambda: len(server.pool().retired) == 1, "its memory is on the scoreboard")
    until(lambda: before not in [worker.pid for worker in server.serving(2).pool().workers], "it is gone")
    return grown(server, path)


SERVERS = ("sync", "gthread", "uvicorn")


@pytest.fixture(params=SERVERS)
def one(request: pytest.FixtureRequest, serve: Callable[..., Server], serve_uvicorn: Callable[..., Server]) -> Callable[..., Server]:
    """A server with two workers."""
    more = {"soft_limit": "1GiB", "min_lifetime": 0}
    if request.param == "uvicorn":
        return lambda **policy: serve_uvicorn(app="keeping_apps:asgi", workers=2, **more, **policy)
    return lambda **policy: serve(request.param, 2, app="keeping_apps:wsgi", **more, **policy)


def test_what_malloc_keeps_is_given_back(one: Callable[..., Server]) -> None:
    """The worker before it has shown that a trim pays; then half of what it holds is gone when it has been idle, seen from outside."""
    server = one()
    pid = replaced(server, "/pages?150000")
    held, born = rss(pid), start_time(pid)
    assert held > 100 * MIB

    until(lambda: rss(pid) < held - 60 * MIB, "the idle worker gives memory back", 40)

    lines = server.wait_for("which is idle, reclaimed")
    assert any(f"worker {pid} " in line for line in lines)
    assert (start_time(pid), server.get("/")[0]) == (born, 200)


def idle_for_long(server: Server, pid: int) -> None:
    """Wait until the worker has had time enough for an attempt, by what it publishes itself."""
    since = server.worker(pid).published or 0.0
    until(lambda: (server.worker(pid).published or 0.0) > since + 2 * IDLE_FOR, "it has been idle", 60)


@pytest.mark.parametrize(("path", "policy"), [("/small?450000", {}), ("/pages?150000", {"reclaim": False})])
def test_where_a_trim_has_nothing_to_give_none_is_tried(serve: Callable[..., Server], path: str, policy: dict[str, bool]) -> None:
    """Python's allocator keeps what it keeps; and reclaim=False is off."""
    server = serve("sync", 2, app="keeping_apps:wsgi", soft_limit="1GiB", min_lifetime=0, **policy)
    pid = replaced(server, path)
    held = rss(pid)

    idle_for_long(server, pid)

    assert server.pool().totals.reclaims == 0
    assert rss(pid) > held - 10 * MIB


def test_what_no_longer_pays_is_tried_no_more(serve: Callable[..., Server]) -> None:
    """Trims have paid in this pool, but what this worker keeps next is Python's: it tries once, and then not as soon again."""
    server = serve("sync", 2, app="keeping_apps:wsgi", soft_limit="1GiB", min_lifetime=0)
    pid = replaced(server, "/pages?150000")
    until(lambda: server.worker(pid).counters.reclaims == 1, "it gives back what malloc kept", 40)
    until(lambda: server.get("/small?450000") and rss(pid) > 100 * MIB, "it has grown again", 40)
    until(lambda: server.worker(pid).counters.reclaims == 2, "it tries with what Python keeps", 60)
    work = server.worker(pid).counters.work
    until(lambda: server.get("/small?10") and server.worker(pid).counters.work > work, "it has had work", 40)

    idle_for_long(server, pid)

    assert server.worker(pid).counters.reclaims == 2
    assert rss(pid) > 100 * MIB
