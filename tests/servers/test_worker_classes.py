"""Worker classes that are not gunicorn's common ones, and apps that are not WSGI: what can't be wrapped is left alone."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest
from clients import Load
from serving import Gunicorn, ask, ask_until_the_last, until
from versions import runs_uvloop

AIOHTTP = """
import apps
from aiohttp import web

async def answer(request):
    await apps.asyncio.sleep(apps.seconds(request.path, request.query_string))
    return web.Response(body=apps.answer(request.path, request.query_string))

async def streamed(request):
    response = web.StreamResponse()
    await response.prepare(request)
    await response.write(request.path_qs.encode())
    await response.write_eof()
    return response

app = web.Application()
app.router.add_get("/streamed", streamed)
app.router.add_get("/{path:.*}", answer)

async def factory():
    return app

async def runner():
    return web.AppRunner(app)
"""

TORNADO = """
import apps
import tornado.web
import tornado.wsgi

class Answer(tornado.web.RequestHandler):
    async def get(self):
        await apps.asyncio.sleep(apps.seconds(self.request.path, self.request.query))
        self.write(apps.answer(self.request.path, self.request.query))

app = tornado.web.Application([(".*", Answer)])
contained = tornado.wsgi.WSGIContainer(apps.wsgi)
"""

#: Of people's own: without one of gunicorn's known classes above them.
OWN = """
import select
import signal
from pathlib import Path
from gunicorn.workers.base import Worker

class Meinheld(Worker):
    \"""It hands its app to a server that only takes its own, and has a way of its own to end.\"""

    def handle_exit(self, sig, frame):
        self.ending = True

    def run(self):
        assert type(self.wsgi).__module__ == "builtins", self.wsgi  # a plain function
        self.ending = False
        while self.alive and not self.ending:
            self.notify()
            ready, _, _ = select.select(self.sockets, [], [], 0.2)
            for listener in ready:
                try:
                    client, _ = listener.accept()
                except BlockingIOError:
                    continue
                client.setblocking(True)
                environ = {"PATH_INFO": client.recv(65536).split()[1].decode().partition("?")[0], "QUERY_STRING": "mib=84"}
                body = b"".join(self.wsgi(environ, lambda *_: None))
                client.sendall(b"HTTP/1.1 200 OK\\r\\nConnection: close\\r\\nContent-Length: %d\\r\\n\\r\\n" % len(body) + body)
                client.close()

class Deaf(Meinheld):
    \"""Nothing ends it but SIGKILL.\"""

    def init_signals(self):
        super().init_signals()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

from gunicorn.workers.sync import SyncWorker as Sync

class Derived(Sync):
    pass

class SyncWorker(Meinheld):
    \"""Not gunicorn's.\"""
"""

#: worker class, app, what the one line says; None: its requests are counted, and nothing is said.
LEFT = "requests are not counted"
KINDS = [
    ("aiohttp.GunicornWebWorker", "aiohttp_app:app", LEFT),
    ("aiohttp.GunicornWebWorker", "aiohttp_app:factory", LEFT),
    ("aiohttp.GunicornWebWorker", "aiohttp_app:runner", LEFT),
    ("aiohttp.GunicornUVLoopWebWorker", "aiohttp_app:app", LEFT),
    ("tornado", "tornado_app:app", LEFT),
    ("tornado", "tornado_app:contained", LEFT),
    ("tornado", "apps:wsgi", None),
    ("gevent_pywsgi", "apps:wsgi", None),
    ("own.Derived", "apps:wsgi", None),
]
#: They serve one request at a time.
BLOCKING = ("apps:wsgi", "tornado_app:contained")
FILES = {"aiohttp_app.py": AIOHTTP, "tornado_app.py": TORNADO, "own.py": OWN}


@pytest.fixture
def start(serve):
    """Start gunicorn with a class and an app of the above."""

    def starting(worker_class: str, workers: int, app: str, settings: str = "", **policy: object) -> Gunicorn:
        policy = {"soft_limit": "90MiB", "min_lifetime": 0, **policy}
        return serve(worker_class, workers, app=app, files=FILES, settings=settings, **policy).serving(workers)

    return starting


@pytest.mark.parametrize(("worker_class", "app", "said"), KINDS)
def test_it_serves_and_is_recycled_without_losing_a_request(start, worker_class, app, said):
    """Under load of slow and of quick requests, on kept-alive connections too, and its score is the workers'."""
    runs_uvloop(worker_class)
    gunicorn = start(worker_class, 2, app)
    kib, pause = (1024, 0.02) if app in BLOCKING else (256, 0.3)
    first = gunicorn.workers()
    scores = {Path(f"/proc/{pid}/oom_score_adj").read_text() for pid in first}
    assert scores == {"300\n"}

    with Load(gunicorn, f"/leak?kib={kib}&s=0.01") as load, Load(gunicorn, f"/slow?s={pause}") as slow:
        gunicorn.wait_for(" recycling: ", times=2, seconds=60)
        until(lambda: not set(first) & set(gunicorn.workers()), "those of the start are gone", 30)

    assert load.failed + slow.failed == []
    assert load.served > 50
    counted = gunicorn.serving().pool().totals.work
    assert (counted == 0) == (said is not None)
    assert len(gunicorn.lines(LEFT)) == (0 if said is None else 1)
    assert gunicorn.lines("oomsafe failed") == []


@pytest.mark.parametrize("name", ["Meinheld", "SyncWorker"])
def test_a_class_of_peoples_own_keeps_its_app_and_ends_in_its_own_way(start, name):
    """Whatever its name is. It is measured, scored and recycled, by what gunicorn itself would end it with."""
    gunicorn = start(f"own.{name}", 1, "apps:wsgi", soft_limit="80MiB")
    (pid,) = gunicorn.workers()
    assert Path(f"/proc/{pid}/oom_score_adj").read_text() == "300\n"
    (line,) = gunicorn.lines(LEFT)
    assert f"(what {name} serves is not known to be WSGI or ASGI): memory is measured, and workers are recycled" in line

    assert gunicorn.get("/fill")[2] == b"/fill?mib=84"

    gunicorn.wait_for("after 0 requests (they are not counted)")
    until(lambda: pid not in gunicorn.workers(), "it ends")
    assert gunicorn.serving(1).get("/pid")[2] == b"%d" % gunicorn.workers()[0]
    assert len(gunicorn.lines(LEFT)) == 1


def test_a_class_that_can_t_be_ended_is_only_measured(start):
    """It says so when it starts, and when it is over its limit; it goes on serving."""
    gunicorn = start("own.Deaf", 1, "apps:wsgi", soft_limit="80MiB")
    (pid,) = gunicorn.workers()
    (line,) = gunicorn.lines(LEFT)
    assert "and workers are not recycled (Deaf does not handle SIGTERM): memory is measured" in line

    assert gunicorn.get("/fill")[0] == 200

    gunicorn.wait_for("should be recycled, and nothing here can")
    assert gunicorn.get("/pid")[2] == b"%d" % pid
    assert gunicorn.worker(pid).state == "serving"
    assert gunicorn.workers() == [pid]
    os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("worker_class", ["sync", "gthread", "gevent"])
def test_an_async_app_under_a_wsgi_class_fails_as_it_does_without_us(serve, worker_class):
    """It is no WSGI app: it is left alone, and the server's own error is all that there is, but for one line."""
    answers = [serve(worker_class, 1, app="apps:asgi", install=install) for install in (False, True)]
    plain, guarded = (gunicorn.get("/") for gunicorn in answers)
    assert plain[0] == guarded[0] == 500
    assert len(answers[1].lines("requests are not counted (the app is not WSGI)")) == 1
    assert not answers[1].lines("oomsafe/wsgi")
    errors = [re.findall(r"^TypeError: .*", gunicorn.log(), re.MULTILINE) for gunicorn in answers]
    assert errors[0] == errors[1] != []


@pytest.mark.parametrize("worker_class", ["aiohttp.GunicornWebWorker", "tornado"])
def test_an_idle_connection_holds_the_worker_until_it_is_told(start, worker_class):
    """A client that keeps its connection gets its next answer from the draining worker, and hears that it is the last."""
    gunicorn = start(worker_class, 1, "aiohttp_app:app" if worker_class != "tornado" else "tornado_app:app", soft_limit="80MiB")
    (pid,) = gunicorn.workers()
    idle = gunicorn.connect()
    assert ask(idle, "/pid")[2] == b"%d" % pid
    assert gunicorn.get("/fill?mib=84")[0] == 200
    until(lambda: gunicorn.worker(pid).state == "draining", "it drains")

    streamed = "/streamed?n=1" if worker_class != "tornado" else "/?n=1"
    status, last, body = ask_until_the_last(idle, streamed)

    assert (status, last, body) == (200, "close", streamed.encode())
    until(lambda: pid not in gunicorn.workers(), "it ends", 4)
    idle.close()
