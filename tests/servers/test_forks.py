"""A request that does to its worker what nobody expects: it forks into the server's loop, or closes descriptors that are not its own."""

from __future__ import annotations

import signal

import pytest
from serving import app_for, until

from oomsafe.kernel.session import session_of

FORKING = """
import asyncio, os, signal, sys, time
import apps

def forks():
    pid = os.fork()
    if not pid:
        apps.fill(150 << 20)  # it is larger than its worker may be
        apps.tell("a fork comes back")
        signal.alarm(60)  # should the test be gone
    return pid

def wsgi(environ, start_response):
    if environ["PATH_INFO"] == "/fork" and not forks():
        sys.exit(0)  # gunicorn takes this for an error of the request's
    if environ["PATH_INFO"] == "/close":
        closes(environ.get("QUERY_STRING"))
    return apps.wsgi(environ, start_response)

async def asgi(scope, receive, send):
    if scope["type"] == "http" and scope["path"] == "/close":
        closes(scope["query_string"].decode())
    await apps.asgi(scope, receive, send)

KEPT = []

def closes(reuse):
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink("/proc/self/fd/" + name).endswith("/statm"):
                os.close(int(name))
        except OSError:
            pass
    for _ in range(6 if reuse else 0):
        KEPT.append(os.open("/proc/%s/statm" % os.getppid() if reuse == "statm" else "/etc/passwd", os.O_RDONLY))
"""


@pytest.mark.parametrize("worker_class", ["sync", "gevent"])
def test_a_fork_decides_nothing_for_its_parent(serve, worker_class):
    """Its child goes on in the server's loop, and has grown over the limit: it is counted nowhere, and nobody is recycled for it."""
    files = {"forking.py": FORKING}
    server = serve(worker_class, app="forking:wsgi", files=files, settings="timeout = 4", soft_limit="120MiB", min_lifetime=0).serving()
    for _ in range(10):
        assert server.get("/pid")[0] == 200
    until(lambda: server.pool().totals.work == 10, "they are counted")
    workers = set(server.workers())

    status = server.get("/fork")[0]
    server.wait_for("a fork comes back")
    stray = until(lambda: server.session() - workers - {server.pid}, "the fork is there")
    until(lambda: not any(map(session_of, stray)), "the fork has seen that it is no worker of the master's, and ended")
    seen = [server.pool().totals.work]
    for _ in range(10):
        assert server.get("/pid")[0] == 200
    until(lambda: server.pool().totals.work == 21, "the requests are counted, and the one that forked once")

    assert status in (200, 500)  # both of them answer
    assert seen[0] in (10, 11)
    assert set(server.workers()) == workers
    assert [worker.state for worker in server.pool().workers] == ["serving"] * 2
    assert (server.lines("recycling"), server.lines("oomsafe failed")) == ([], [])


@pytest.mark.parametrize(("worker_class", "reuse"), [("sync", ""), ("gevent", "other"), ("gthread", "statm"), ("asgi", "statm")])
def test_a_worker_whose_descriptor_is_closed_protects_itself(serve, worker_class, reuse):
    """It reads its memory on one that it opens anew, and says so once."""
    app = app_for(worker_class).replace("apps", "forking")
    server = serve(worker_class, 1, app=app, files={"forking.py": FORKING}, settings="timeout = 4", soft_limit="120MiB", min_lifetime=0)
    server.serving(1)
    (pid,) = server.workers()

    assert server.get(f"/close?{reuse}")[0] == 200
    server.wait_for("opens it again")
    while not server.lines(f"worker {pid} (slot 0) recycling"):
        assert server.get("/leak?kib=4096")[0] == 200

    server.serving(1)
    assert len(server.lines("opens it again")) == 1
    assert server.stop() in (0, -signal.SIGTERM)
