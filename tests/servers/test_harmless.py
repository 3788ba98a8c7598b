"""What must not make things worse: a supervisor that is gone, a fork that fails, clients who send one heavy request each."""

from __future__ import annotations

import os
import re
import signal

import pytest
from clients import Load
from serving import until
from surging import big, states, waiting
from versions import keeps

STAYS = "stays, whatever it holds and however long it has served: its supervisor is gone, or has stood"

#: While there is a file "full" no process can be started, as in a cgroup whose pids.max is met; gunicorn forks by os.fork.
FORKS = """
import os
fork = os.fork

def forking():
    if os.path.exists("full"):
        raise BlockingIOError(11, "Resource temporarily unavailable")
    return fork()

os.fork = forking
"""

#: The same for uvicorn's command line: multiprocessing starts by this.
SPAWNS = """
import os
import sys
from multiprocessing import util

spawn = util.spawnv_passfds

def spawning(*arguments):
    if os.path.exists("full"):
        raise BlockingIOError(11, "Resource temporarily unavailable")
    return spawn(*arguments)

if __name__ == "__main__":
    util.spawnv_passfds = spawning
    from oomsafe.uvicorn.launch import main
    sys.argv[0] = "uvicorn"
    main()
"""


@pytest.mark.parametrize("how", [{}, {"start": ("-m", "uvicorn"), "app": "uvicorn_apps:protected"}], ids=["ours", "plain"])
def test_who_has_lost_the_supervisor_stays(serve_uvicorn, how):
    """It was killed: the workers go over their limit, and all of them go on answering. Each says it once."""
    uvicorn = serve_uvicorn("--workers", "2", soft_limit="112MiB", min_lifetime=0, jitter=0, **how).up()
    workers = until(lambda: len(uvicorn.workers()) == 2 and uvicorn.workers(), "two workers")
    grown = [uvicorn.connect_to(pid) for pid in workers]
    uvicorn.signal(signal.SIGKILL)
    uvicorn.ended()

    for connection in grown:
        connection.request("GET", "/fill?mib=140")
        assert connection.getresponse().read()
    uvicorn.wait_for(STAYS, times=2)

    answers = [int(uvicorn.get("/pid")[2]) for _ in range(40)]
    assert set(answers) <= set(workers)
    assert len(uvicorn.lines(STAYS)) == 2
    assert uvicorn.lines(" recycling: ") == []


def test_a_supervisor_that_stands_still_recycles_nobody(serve):
    """And when it goes on, so does recycling."""
    gunicorn = big(serve, "gthread", sustain=0)
    gunicorn.signal(signal.SIGSTOP)
    try:
        assert gunicorn.get("/fill?mib=241")[0] == 200
        gunicorn.wait_for(STAYS)
        assert len(gunicorn.workers()) == 2
    finally:
        gunicorn.signal(signal.SIGCONT)

    gunicorn.wait_for(" recycling: ")
    gunicorn.serving()


@pytest.mark.parametrize("surge", [True, False])
def test_gunicorn_outlives_forks_that_fail(serve, surge):
    """Who is over its limit stays, or is missing for a while; the master and the others serve on, and then all is as it was."""
    gunicorn = big(serve, "gthread" if keeps("gthread") else "sync", settings=FORKS, surge=surge)
    (gunicorn.folder / "full").touch()
    with Load(gunicorn, "/leak?kib=0&s=0.02", clients=2) as load:
        if surge:
            pid = waiting(gunicorn)
        else:
            assert gunicorn.get("/fill?mib=241")[0] == 200
            gunicorn.wait_for(" recycling: ")
        gunicorn.wait_for("a worker can't be started (BlockingIOError(11, 'Resource temporarily unavailable')): those that serve stay")
        if surge:
            assert pid in gunicorn.workers()
        (gunicorn.folder / "full").unlink()
        gunicorn.wait_for(" recycling: ")
        gunicorn.serving()

    assert load.failed == []
    assert gunicorn.process.poll() is None
    until(lambda: len(gunicorn.workers()) == 2, "as many as before")
    assert gunicorn.lines("oomsafe failed") == []


@pytest.mark.parametrize("killed", [False, True])
def test_uvicorn_outlives_spawns_that_fail(serve_uvicorn, killed):
    """Its own, after a worker was killed, and those of a replacement."""
    uvicorn = serve_uvicorn(
        files={"failing_spawns.py": SPAWNS}, start=("failing_spawns.py",), soft_limit="112MiB", min_lifetime=0, jitter=0, sustain=1
    ).serving()
    (uvicorn.folder / "full").touch()
    pid, other = uvicorn.workers()
    if killed:
        os.kill(pid, signal.SIGKILL)
    else:
        uvicorn.grow(pid, 114)
    uvicorn.wait_for("a worker can't be started (BlockingIOError(11, 'Resource temporarily unavailable')): those that serve stay")
    assert {int(uvicorn.get("/pid")[2]) for _ in range(10)} <= {pid, other}

    (uvicorn.folder / "full").unlink()
    until(lambda: pid not in uvicorn.workers() and len(uvicorn.workers()) == 2, "it is replaced", 40)
    uvicorn.serving()
    assert uvicorn.process.poll() is None
    assert uvicorn.lines("oomsafe failed") == []


def test_heavy_requests_neither_recycle_for_ever_nor_end_the_limit(serve):
    """The fourth worker that stays at what a heavy request took stays; when it leaks on top of that, it is recycled."""
    gunicorn = big(serve, "gthread", workers=1, soft_limit="260MiB", sustain=1.2)
    for times in (1, 2, 3):
        assert gunicorn.get("/fill?mib=300")[0] == 200
        gunicorn.wait_for(" recycling: ", times=times)
        until(lambda: states(gunicorn) == {"serving": 1}, "the next one serves")
    (pid,) = until(lambda: len(gunicorn.workers()) == 1 and gunicorn.workers(), "and it alone")

    assert gunicorn.get("/fill?mib=300")[0] == 200
    (line,) = gunicorn.wait_for("a worker has settled at ")
    assert re.search(
        r"of [\d.]+ MiB that they had grown by, [0-9]%(?: to [0-9]%)? was free memory; its limit is 3\d\d MiB for as long as it", line
    )
    until(lambda: gunicorn.worker(pid).figures.soft > 360 << 20, "its limit is above what it holds")
    assert gunicorn.get("/fill?mib=380")[0] == 200

    lines = gunicorn.wait_for(" recycling: ", times=4)
    assert f"worker {pid} (slot " in lines[-1]
