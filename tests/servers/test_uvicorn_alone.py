"""uvicorn without a supervisor of ours: one process, a reloader, and a plain uvicorn with the middleware in the app."""

from __future__ import annotations

import os
import re
import signal

import pytest
from clients import Load
from serving import ask, ask_until_the_last, until

PLAIN = {"start": ("-m", "uvicorn"), "app": "uvicorn_apps:protected"}

#: An app with a SIGTERM handler of its own, as some set in their lifespan.
HANDLER = """
import signal
import uvicorn_apps

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        signal.signal(signal.SIGTERM, lambda *_: None)
    await uvicorn_apps.protected(scope, receive, send)
"""

#: A program that runs a Server by itself: Config takes its number of workers from WEB_CONCURRENCY, and there is one.
PROGRAM = """
import uvicorn

uvicorn.Server(uvicorn.Config("uvicorn_apps:protected", port=0, access_log=False)).run()
"""

#: What a process says that goes over its limit and may not end.
WARNING = "should be recycled, and nothing here can"


def test_a_single_process_is_measured_and_stays(serve_uvicorn):
    """It says once that it should be recycled."""
    uvicorn = serve_uvicorn(workers=1, soft_limit="130MiB", min_lifetime=0, headers=True).up()

    assert int(uvicorn.get("/fill?mib=134")[1]["x-memory-rss"]) >= 134 << 20
    uvicorn.wait_for(WARNING)

    (line,) = uvicorn.lines("oomsafe guards this process")
    assert "soft limit 130 MiB, budget " in line
    assert "nothing here would start another" in line
    assert [uvicorn.get(f"/leak?kib=64&n={n}")[0] for n in range(20)] == [200] * 20
    assert int(uvicorn.get("/pid")[2]) == uvicorn.pid
    assert len(uvicorn.lines(WARNING)) == 1
    assert uvicorn.stop() in (0, -signal.SIGTERM)


@pytest.mark.parametrize("how", [{}, PLAIN])
def test_a_single_process_that_may_end_answers_what_it_has_taken(serve_uvicorn, how):
    """OOMSAFE_SINGLE=exit says that something restarts it: it ends as if it had been asked to."""
    uvicorn = serve_uvicorn(workers=1, soft_limit="130MiB", min_lifetime=0, single="exit", **how).up()
    idle, busy = uvicorn.connect_to(uvicorn.pid), uvicorn.connect_to(uvicorn.pid)
    busy.request("GET", "/slow?s=1.5")

    assert ask(idle, "/fill?mib=134")[0] == 200
    uvicorn.wait_for(" recycling: ")
    last = ask_until_the_last(idle, "/pid")
    response = busy.getresponse()

    assert last == (200, "close", b"%d" % uvicorn.pid)
    assert "above its soft limit it ends, and something else must restart it" in uvicorn.lines("oomsafe guards this process")[0]
    assert (response.status, response.read()) == (200, b"/slow?s=1.5")
    busy.close()
    assert uvicorn.ended() == 0
    assert uvicorn.lines("lifespan.shutdown")


def test_a_reloaded_app_is_measured_and_stays(serve_uvicorn):
    """Its reloader waits for a file to change, and would bring up no other."""
    uvicorn = serve_uvicorn("--reload", workers=1, soft_limit="130MiB", min_lifetime=0, headers=True).up()
    pid = int(uvicorn.get("/pid")[2])

    assert int(uvicorn.get("/fill?mib=134")[1]["x-memory-rss"]) >= 134 << 20
    uvicorn.wait_for(WARNING)

    assert int(uvicorn.get("/pid")[2]) == pid != uvicorn.pid
    assert uvicorn.lines("oomsafe failed") == []


def test_an_idle_worker_of_a_plain_uvicorn_that_grows(serve_uvicorn):
    """Nobody comes, and it looks at itself all the same."""
    uvicorn = serve_uvicorn(workers=2, soft_limit="130MiB", min_lifetime=0, reclaim=False, **PLAIN).up()

    assert uvicorn.get("/later?mib=140")[0] == 200

    uvicorn.wait_for(" recycling: ", seconds=10)


def test_a_plain_uvicorn_loses_nothing_either(serve_uvicorn):
    """Its workers drain by themselves, and its supervisor brings up others; the middleware is all there is of ours."""
    uvicorn = serve_uvicorn(**PLAIN, soft_limit="130MiB", min_lifetime=0).up()

    with Load(uvicorn, "/leak?kib=256") as load:
        lines = uvicorn.wait_for(" recycling: ", times=5, seconds=90)

    assert load.failed == []
    assert load.served > 100
    pids = [int(match[1]) for line in lines if (match := re.search(r"worker (\d+) ", line))]
    assert len(set(pids)) == len(lines)
    until(lambda: not set(pids[:3]) & set(uvicorn.workers()), "they have ended")


#: All workers that are there grow at once; those that come later don't. Their boot lasts until a file is removed.
TOGETHER = """
import os, threading, time
import apps
from uvicorn_apps import protected

def grow():
    while not os.path.exists("grow"):
        time.sleep(0.01)
    apps.fill(160 << 20)

if os.path.exists("grow"):
    print("a replacement boots", flush=True)
    while os.path.exists("held"):
        time.sleep(0.01)
else:
    threading.Thread(target=grow, daemon=True).start()
"""


def test_the_workers_of_a_plain_uvicorn_take_turns(serve_uvicorn):
    """Nobody tells them who may go: the second stays until the other's replacement has had the time to boot."""
    how = {**PLAIN, "app": "together:protected", "files": {"together.py": TOGETHER}}
    uvicorn = serve_uvicorn(**how, soft_limit="130MiB", min_lifetime=0).up()
    old = set(uvicorn.workers())
    (uvicorn.folder / "held").touch()

    with Load(uvicorn, "/leak?kib=0&s=0.02") as load:
        until(lambda: load.served > 100, "each has been measured before it grows")
        (uvicorn.folder / "grow").touch()
        uvicorn.wait_for("a replacement boots")
        served = load.served
        until(lambda: load.served > served + 200, "the other one serves meanwhile")
        gone = old - set(uvicorn.workers())
        (uvicorn.folder / "held").unlink()
        until(lambda: not old & set(uvicorn.workers()), "both are replaced", 40)

    assert len(gone) == 1
    assert load.failed == []


def test_a_plain_uvicorn_is_recycled_whatever_handles_its_signals(serve_uvicorn):
    """Its worker finds its Server without SIGTERM's handler, and ends without the signal."""
    how = {**PLAIN, "app": "handler:app", "files": {"handler.py": HANDLER}}
    uvicorn = serve_uvicorn(**how, soft_limit="130MiB", min_lifetime=0).up()

    assert uvicorn.get("/fill?mib=134", Connection="close")[0] == 200
    # it looks at itself when a request ends, and waits until its sibling has had the time to boot
    (line,) = until(lambda: uvicorn.get("/pid", Connection="close") and uvicorn.lines(" recycling: "), "it is recycled")

    (pid,) = re.findall(r"worker (\d+) ", line)
    until(lambda: int(pid) not in uvicorn.workers(), "it has ended")
    assert uvicorn.lines(f"[{pid}] lifespan.shutdown")


def test_a_plain_single_uvicorn_is_measured_and_stays(serve_uvicorn):
    """Nobody would bring up another."""
    uvicorn = serve_uvicorn(**PLAIN, workers=1, soft_limit="130MiB", min_lifetime=0).up()

    assert uvicorn.get("/fill?mib=134")[0] == 200
    uvicorn.wait_for(WARNING)
    assert [uvicorn.get(f"/leak?kib=64&n={n}")[0] for n in range(20)] == [200] * 20

    assert int(uvicorn.get("/pid")[2]) == uvicorn.pid
    assert len(uvicorn.lines(WARNING)) == 1
    assert os.path.exists(f"/proc/{uvicorn.pid}")


def test_a_server_in_a_program_stays_whatever_number_of_workers_the_environment_wants(serve_uvicorn):
    """It was ended at its soft limit, as one of several: and there was no other, nor anybody to bring one up."""
    env = {"WEB_CONCURRENCY": "4"}
    how = {"start": ("program.py",), "app": "", "files": {"program.py": PROGRAM}, "env": env}
    uvicorn = serve_uvicorn(**how, soft_limit="130MiB", min_lifetime=0).up()

    assert uvicorn.get("/fill?mib=134")[0] == 200
    uvicorn.wait_for(WARNING)

    assert [uvicorn.get(f"/leak?kib=64&n={n}")[0] for n in range(20)] == [200] * 20
    assert "nothing here would start another" in uvicorn.lines("oomsafe guards this process")[0]
