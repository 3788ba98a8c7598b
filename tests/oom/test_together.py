"""Several requests of a pool ask for all the memory at once: one is refused in time, and the kernel kills nobody."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest
from serving import ask, until

from oomsafe.kernel.process import held_of
from oomsafe.kernel.sandbox import Sandbox

# they take the machine's memory cgroups, kernel log and processors: one after the other
pytestmark = pytest.mark.xdist_group("oom")

MIB = 1 << 20

#: Two workers at their hard limit are more than the pool has.
LIMIT, POLICY = 480 * MIB, {"hard_limit": "300MiB", "soft_limit": "250MiB", "budget": "95%"}


def together(connections: list[http.client.HTTPConnection], path: str) -> list[Any]:
    """Ask on each of these connections at the same moment: statuses, or errors."""
    answers: list[Any] = []
    start = threading.Barrier(len(connections))

    def ask(connection: http.client.HTTPConnection) -> None:
        with closing(connection):
            start.wait()
            try:
                connection.request("GET", path)
                response = connection.getresponse()
                response.read()
                answers.append(response.status)
            except (OSError, http.client.HTTPException) as error:
                answers.append(repr(error))

    asking = [threading.Thread(target=ask, args=(connection,)) for connection in connections]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    return answers


@pytest.fixture
def pool(cgroup: Any, serve: Any, serve_uvicorn: Any) -> Callable[..., tuple[Any, Sandbox]]:
    """pool(server): three workers, and their cgroup."""

    def start(server: str, limit: int = LIMIT, **policy: Any) -> tuple[Any, Sandbox]:
        sandbox = cgroup(limit)
        app = f"limited_apps:{'asgi' if server in ('asgi', 'uvicorn') else 'wsgi'}"
        how = {**POLICY, **policy, "wrap": sandbox.command, "app": app}
        return (serve_uvicorn(workers=3, **how) if server == "uvicorn" else serve(server, 3, **how)), sandbox

    return start


SERVERS = ["sync", "gthread", "gevent", "asgi", "uvicorn"]


@pytest.mark.parametrize("kind", ["small", "slow", "dict"])
@pytest.mark.parametrize("server", SERVERS)
def test_two_at_once(pool: Any, server: str, kind: str) -> None:
    """Both get 503: one at its hard limit, or both, because that is more than the pool has."""
    found, sandbox = pool(server)
    for _ in range(3):
        found.serving(3)  # a worker whose heap is full of holes after a refusal is replaced
        # a sync worker keeps no connection, and has one request at a time
        connections = [found.connect() if server == "sync" else found.connected_to(worker) for worker in found.workers()[:2]]

        answers = together(connections, f"/{kind}")

        assert (answers, sandbox.cgroup.oom_kills()) == ([503, 503], 0)
        assert found.get("/hello")[2] == b"hello"
    until(lambda: sum(found.pool().totals.aborts_by_reason.values()) == 6, "they are counted")
    assert found.pool().totals.aborts_by_reason["pool"] > 0
    assert found.lines(" has asked for more memory than its pool has left (")


@pytest.mark.parametrize("server", SERVERS[1:])
def test_a_leak_is_refused_nothing(pool: Any, server: str) -> None:
    """Small requests make two workers grow fast, until little is left: where balloons as large would be refused."""
    found, sandbox = pool(server, soft_limit="290MiB", budget="100%")
    found.serving(3)
    answers: list[int] = []

    def holds() -> int:
        return sum(held_of(pid) or 0 for pid in (found.pid, *found.workers()))

    def leak(connection: http.client.HTTPConnection) -> None:
        with closing(connection):
            while holds() < LIMIT - 70 * MIB and not any(found.pool().totals.recycles):
                answers.append(ask(connection, "/leak")[0])
                time.sleep(0.005)  # if it leaks faster than workers boot, they are replaced sooner

    threads = [threading.Thread(target=leak, args=(found.connected_to(worker),)) for worker in found.workers()[:2]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert ({*answers}, sandbox.cgroup.oom_kills()) == ({200}, 0)
    assert not any(found.pool().totals.aborts)


@pytest.mark.parametrize("server", ["sync", "asgi"])
def test_one_that_finds_its_memory(pool: Any, server: str) -> None:
    """It is far above its share, and grows fast, but what it needs is there: nobody is refused, whatever small ones do beside it.

    Of what is there 30 to 60 MiB are left then: at its pace it could fill them before it is measured again.
    """
    # a piece of 1 MiB may stay free in a heap that small ones grow in, and then a later request finds as much less
    found, sandbox = pool(server, 350 * MIB, env={"MALLOC_MMAP_THRESHOLD_": str(128 << 10)})
    found.serving(3)

    ended, beside = threading.Event(), []

    def innocent() -> None:
        while not ended.is_set():
            beside.append(found.get("/work")[0])

    threads = [threading.Thread(target=innocent) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        answers = [found.get("/fits")[0] for _ in range(10)]
    finally:
        ended.set()
        for thread in threads:
            thread.join()

    assert (answers, {*beside}, sandbox.cgroup.oom_kills()) == ([200] * 10, {200}, 0)
