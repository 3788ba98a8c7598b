"""How uvicorn is started with guarded workers: its own command line, and run() in a script."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
from versions import loads_first

SCRIPT = """
import oomsafe.uvicorn

if __name__ == "__main__":
    oomsafe.uvicorn.run("uvicorn_apps:asgi", port=0, workers=2, soft_limit="130MiB", min_lifetime=0, headers={headers})
"""


@pytest.mark.parametrize(("headers", "expected"), [([("x-y", "z")], ("z", False)), (True, (None, True))])
def test_run_takes_settings_of_both(serve_uvicorn, headers, expected):
    """A list as `headers` is uvicorn's, a switch is ours."""
    uvicorn = serve_uvicorn(app="", start=("script.py",), files={"script.py": SCRIPT.format(headers=headers)}).serving()

    _, got, _ = uvicorn.get("/")

    assert (got.get("x-y"), "x-memory-rss" in got) == expected
    assert uvicorn.lines(": soft limit 130 MiB each")
    pid = uvicorn.workers()[0]
    uvicorn.grow(pid, 134)
    uvicorn.wait_for(f"worker {pid} (slot ")
    uvicorn.serving()


def test_a_wsgi_app_is_recycled_too(serve_uvicorn):
    """Behind uvicorn's own adapter."""
    uvicorn = serve_uvicorn("--interface", "wsgi", app="uvicorn_apps:wsgi", soft_limit="130MiB", min_lifetime=0).serving()
    pid = uvicorn.workers()[0]

    uvicorn.grow(pid, 134)

    uvicorn.wait_for(f"worker {pid} (slot ")
    assert uvicorn.serving().get("/")[0] == 200
    assert pid not in uvicorn.workers()


def test_a_setting_that_cannot_be_right_is_one_line(serve_uvicorn):
    """And nothing starts."""
    uvicorn = serve_uvicorn(soft_limit="300")

    assert uvicorn.ended() == 1
    (line,) = uvicorn.log().splitlines()
    assert line.startswith("oomsafe: OOMSAFE_SOFT_LIMIT='300' has no unit")


def test_help_is_uvicorns_own():
    """Every option of uvicorn is one of ours."""
    ours, theirs = (
        subprocess.run([sys.executable, "-m", name, "--help"], capture_output=True, text=True, timeout=60, check=True).stdout
        for name in ("oomsafe.uvicorn", "uvicorn")
    )

    assert ours.splitlines()[1:] == theirs.splitlines()[1:]
    assert "--workers" in ours


#: What apps do that import sse-starlette (and with it anything that speaks MCP), and what others could.
PATCHING = """
import uvicorn.main
import uvicorn.supervisors.multiprocess
from uvicorn.main import Multiprocess, Server
import apps

theirs = Server.handle_exit

def handle_exit(self, *signal):
    apps.tell("a patched handle_exit")
    theirs(self, *signal)

Server.handle_exit = handle_exit

class Derived(Server):
    pass

assert isinstance(Derived(uvicorn.Config("apps:asgi")), uvicorn.Server)
assert issubclass(Multiprocess, uvicorn.supervisors.Multiprocess)
assert isinstance(uvicorn.supervisors.multiprocess.Process, type)

async def asgi(scope, receive, send):
    await apps.asgi(scope, receive, send)
    return "something" if scope["type"] == "http" and scope["path"] == "/returns" else None
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_what_others_patch_stays_a_class(serve_uvicorn, workers):
    """The app boots, and what it has patched has its effect."""
    uvicorn = serve_uvicorn(workers=workers, app="patching:asgi", files={"patching.py": PATCHING}, soft_limit="200MiB")
    uvicorn = uvicorn.up() if workers == 1 else uvicorn.serving()

    assert uvicorn.get("/pid")[0] == 200
    assert uvicorn.stop() in (0, -signal.SIGTERM)
    # a worker of several, and of an older uvicorn every process, has taken its handler by the time that it loads its app, without us too
    assert len(uvicorn.lines("a patched handle_exit")) == (workers == 1 and loads_first())


def test_an_app_that_returns_something(serve_uvicorn):
    """uvicorn says so, as it does without us."""
    uvicorn = serve_uvicorn(app="patching:asgi", files={"patching.py": PATCHING}, soft_limit="200MiB").serving()

    assert uvicorn.get("/returns")[0] == 200

    uvicorn.wait_for("ASGI callable should return None, but returned 'something'")


TWICE = """
import oomsafe.uvicorn

if __name__ == "__main__":
    for _ in range(2):
        oomsafe.uvicorn.run("uvicorn_apps:asgi", port=0, workers=2, soft_limit="130MiB")
"""


def test_two_runs_in_one_process(serve_uvicorn):
    """The second has a scoreboard of its own, where the first one's was."""
    uvicorn = serve_uvicorn(app="", start=("script.py",), files={"script.py": TWICE}).serving(2)

    uvicorn.process.send_signal(signal.SIGINT)
    uvicorn.wait_for("oomsafe guards 2 workers", times=2)
    uvicorn.look_anew()

    assert uvicorn.serving(2).lines("no scoreboard") == []
