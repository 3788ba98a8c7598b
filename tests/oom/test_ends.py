"""Real kernel kills: each is confirmed at once with what the worker was doing, and none that was not the kernel's."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import signal
import threading
import time

import pytest
from serving import Server, until

# they take the machine's memory cgroups, kernel log and processors: one after the other
pytestmark = pytest.mark.xdist_group("oom")

MIB = 1 << 20

#: As in a container, where there is no kernel log to read.
NO_LOG = 'import oomsafe.supervisor.deaths as deaths\ndeaths.Deaths.__init__.__kwdefaults__["victims"] = lambda since: None\n'


def hog(server: Server) -> None:
    """A request that takes memory until the kernel kills."""
    with contextlib.suppress(OSError, http.client.HTTPException):
        server.get("/hog")


def confirmed(server: Server) -> list[str]:
    """The lines about kills that are the kernel's for certain."""
    return server.lines("was killed by the kernel's OOM killer (confirmed: ")


@pytest.mark.parametrize("kind", ["uvicorn_worker.UvicornWorker", "uvicorn"])
def test_each_kill_is_confirmed_at_once(cgroup, serve, serve_uvicorn, kind):
    """With the request that did it, what that took, and what to do."""
    sandbox = cgroup(400 * MIB)
    policy = {"soft_limit": "380MiB", "jitter": 0}
    app = {"app": "ending_apps:asgi", "wrap": sandbox.command}
    server = serve_uvicorn(**app, **policy) if kind == "uvicorn" else serve(kind, 2, **app, **policy)
    for _ in range(10):
        server.serving(2)
        before = sandbox.cgroup.oom_kills()
        hog(server)
        # now and then it takes the idle worker, too, before the memory of the other one is free
        kills = until(lambda before=before: found if (found := sandbox.cgroup.oom_kills()) > before else 0, "the kernel kills")
        counted = time.monotonic()
        until(lambda kills=kills: len(confirmed(server)) >= kills, "it is told", pause=0.005)
        assert time.monotonic() - counted < 2.0  # at once, and not at the end of some minute; beside other tests

    kills, lines = sandbox.cgroup.oom_kills(), confirmed(server)
    assert len([line for line in lines if "; in flight: GET /hog (" in line and "GET /hog took " in line]) == 10
    assert len([line for line in lines if "; nothing was in flight; " in line]) == kills - 10
    assert {verdict: count for verdict, count in server.pool().ends.items() if count} == {"oom_confirmed": kills}


@pytest.mark.parametrize("log", [True, False])
def test_of_four_that_die_together_only_the_kernel_s_are_confirmed(cgroup, serve, log):
    """Two die by kill -9 while the kernel kills others: without a log to read, nothing is confirmed that might be wrong."""
    sandbox = cgroup(500 * MIB)
    server = serve("sync", 4, app="ending_apps:wsgi", settings="" if log else NO_LOG, wrap=sandbox.command, soft_limit="480MiB", jitter=0)
    by_hand = set()
    for _ in range(5):
        before, kills = set(server.serving(4).workers()), sandbox.cgroup.oom_kills()
        hogs = [threading.Thread(target=hog, args=(server,)) for _ in range(2)]
        for thread in hogs:
            thread.start()
        until(lambda kills=kills: sandbox.cgroup.oom_kills() > kills, "the kernel kills", pause=0)
        idle = [worker.pid for worker in server.pool().workers if not worker.in_flight and worker.pid in before][:2]
        for pid in idle:
            os.kill(pid, signal.SIGKILL)
        by_hand |= set(idle)
        for thread in hogs:
            thread.join()
        until(lambda idle=idle: not set(idle) & set(server.workers()), "they are gone")
    server.serving(4)
    until(lambda: sum(server.pool().ends.values()) >= sandbox.cgroup.oom_kills() + len(by_hand), "all are told")

    sure = {int(pid) for line in confirmed(server) for pid in re.findall(r"worker (\d+) \(slot", line)}
    assert sure & by_hand == set()
    assert len(sure) == sandbox.cgroup.oom_kills() or not log
    assert len(by_hand) >= 5
