"""oomsafe's lines are written where the server's are, though the app silences every logger that it does not name."""

from __future__ import annotations

import json

import pytest
from celerying import Start
from serving import ASGI_CLASSES, app_for, until

#: As an app does at import, with the default disable_existing_loggers=True: of the app's own lines, which go elsewhere.
CONFIG = {
    "version": 1,
    "handlers": {"app": {"class": "logging.FileHandler", "filename": "app.log"}},
    "root": {"handlers": ["app"], "level": "WARNING"},
}
SILENCING = f"import logging.config\nlogging.config.dictConfig({CONFIG!r})\n"


#: What the tests wait for, and gunicorn says nothing of when the app is preloaded.
LISTENING = """
timeout = 2
def when_ready(server):
    print("Listening at: http://127.0.0.1:%d" % server.LISTENERS[0].sock.getsockname()[1], flush=True)
"""


@pytest.mark.parametrize(("worker_class", "preload"), [("sync", True), (ASGI_CLASSES[1], False)])
def test_gunicorn(serve, worker_class, preload):
    """In the worker; with the app preloaded, in the arbiter too: each line once."""
    app = app_for(worker_class)
    files = {"silencing.py": f"{SILENCING}from {app.replace(':', ' import ')} as app"}
    settings = f"preload_app = {preload}\n{LISTENING}"
    gunicorn = serve(worker_class, 1, app="silencing:app", files=files, settings=settings, soft_limit="90MiB", min_lifetime=0).serving(1)
    (pid,) = gunicorn.workers()

    gunicorn.get("/fill?mib=96")

    (line,) = gunicorn.wait_for(f"worker {pid} (slot 0) recycling: ")
    assert "[INFO]" in line  # by gunicorn's own handler
    assert len(gunicorn.lines("oomsafe guards 1 worker")) == 1
    until(lambda: pid not in gunicorn.workers(), "the worker is replaced")
    assert (gunicorn.folder / "app.log").read_text() == ""


@pytest.mark.parametrize(
    "how", [{"app": "silencing:asgi"}, {"app": "silencing:protected", "start": ("-m", "uvicorn")}], ids=["ours", "plain"]
)
def test_uvicorn(serve_uvicorn, how):
    """With a supervisor of ours, and with the middleware alone."""
    # what the tests wait for, and uvicorn's workers don't say any more
    started = "print('Application startup complete', flush=True)"
    files = {"silencing.py": f"{SILENCING}{started}\nfrom uvicorn_apps import asgi, protected"}
    uvicorn = serve_uvicorn(files=files, soft_limit="130MiB", min_lifetime=0, **how).up()
    pid = until(lambda: len(uvicorn.workers()) == 2 and uvicorn.workers(), "two workers")[0]

    uvicorn.grow(pid, 140)

    (line,) = uvicorn.wait_for(" recycling: ")
    assert f" {pid} " in line
    assert line.startswith("INFO:  ")  # by uvicorn's own handler
    assert (uvicorn.folder / "app.log").read_text() == ""


def test_celery(celery: Start):
    """MainProcess and the children."""
    node = celery("redis", soft_limit="100MiB", min_lifetime=0, env={"LOGGING": json.dumps(CONFIG)}).ready()

    assert node.ask("result = [proj.leak.delay(n, 40 << 10).get(timeout=60) for n in range(4)]") == list(range(4))

    until(lambda: node.lines(" recycling: ") and node.lines("oomsafe guards 2 workers"), "the lines are there")
    assert len(node.lines("oomsafe guards")) == 1
    assert len(set(node.lines(" recycling: "))) == len(node.lines(" recycling: "))
