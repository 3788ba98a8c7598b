"""The kernel kills: a worker with oomsafe, the master without. Real kills in a real memory cgroup."""

from __future__ import annotations

import http.client
import os
import signal
import subprocess
from pathlib import Path

import pytest
from clients import Load
from needs import need
from serving import Gunicorn, memory_of, until

from oomsafe.kernel.process import held_of
from oomsafe.kernel.sandbox import Sandbox
from oomsafe.policy.victims import badness
from oomsafe.scoreboard import layout
from oomsafe.scoreboard.margin import margin_of
from oomsafe.scoreboard.view import view_of_one

# they take the machine's memory cgroups, kernel log and processors: one after the other
pytestmark = pytest.mark.xdist_group("oom")

MIB = 1 << 20
LIMIT = 300 * MIB

#: What the preloading master has for itself, in MiB: with 300 in all a worker can't get as big as the
#: master, not even half as big.
BALLASTS = (150, 190)

PRELOAD = "preload_app = True\n"


@pytest.fixture
def pool(cgroup, serve):
    """Three workers, and a master that outweighs each of them, in a cgroup of 300 MiB: pool(ballast, **policy)."""

    def start(ballast: int, **more: object) -> tuple[Gunicorn, Sandbox]:
        sandbox = cgroup(LIMIT)
        env = {"BALLAST_MIB": str(ballast)}
        gunicorn = serve("sync", 3, app="ballast:wsgi", settings=PRELOAD, env=env, wrap=sandbox.command, **more)
        gunicorn.wait_for("Booting worker", 3)
        return gunicorn, sandbox

    return start


def hog(gunicorn: Gunicorn) -> None:
    """A request that takes memory until the kernel kills."""
    with pytest.raises((OSError, http.client.HTTPException)):
        gunicorn.get("/hog")


@pytest.mark.parametrize("ballast", BALLASTS)
def test_the_kernel_kills_a_worker_and_never_the_master(pool, ballast):
    """Twenty of twenty kills hit a worker; after each the same master serves with three workers."""
    gunicorn, sandbox = pool(ballast, soft_limit="280MiB")
    for kill in range(1, 21):
        gunicorn.serving(3)
        before = set(gunicorn.workers())

        hog(gunicorn)

        until(lambda before=before: before - set(gunicorn.workers()), "a worker is gone")
        assert gunicorn.process.poll() is None, f"kill {kill} hit the master"
        assert sandbox.cgroup.oom_kills() == kill
        assert gunicorn.get("/")[0] == 200
    assert gunicorn.serving(3).pool().supervisor == gunicorn.pid
    assert len(gunicorn.lines("was sent SIGKILL! Perhaps out of memory?")) == 20
    assert gunicorn.lines(" recycling: ") == []
    told = gunicorn.lines("was killed by the kernel's OOM killer (confirmed: ")
    assert len(told) == gunicorn.pool().ends["oom_confirmed"] == 20
    assert [line for line in told if "; in flight: GET /hog (" not in line or "GET /hog took " not in line] == []
    assert len(gunicorn.pool().deaths) == 8


@pytest.mark.parametrize("ballast", BALLASTS)
def test_without_a_raised_score_the_master_dies(pool, ballast):
    """The same pool with worker_oom_score_adj=0: so the test above can tell."""
    gunicorn, sandbox = pool(ballast, soft_limit="280MiB", worker_oom_score_adj=0)
    gunicorn.serving(3)
    margin = margin_of(gunicorn.pool())
    assert margin is not None and margin < -100 * MIB
    hog(gunicorn)
    assert gunicorn.ended() == -signal.SIGKILL
    assert sandbox.cgroup.oom_kills() > 0


@pytest.mark.parametrize("ballast", BALLASTS)
def test_plain_gunicorn_loses_its_master(pool, ballast):
    """What oomsafe is for."""
    gunicorn, sandbox = pool(ballast, install=False)
    hog(gunicorn)
    assert gunicorn.ended() == -signal.SIGKILL
    assert sandbox.cgroup.oom_kills() > 0


def test_a_fresh_worker_ranks_above_the_biggest_master(pool):
    """By the kernel's own formula, before anything has grown: the master's memory is made up for."""
    gunicorn, _ = pool(BALLASTS[-1], soft_limit="280MiB")
    gunicorn.serving(3)
    points = {pid: badness(resident(pid), score(pid), LIMIT) for pid in (gunicorn.pid, *gunicorn.workers())}
    master = points.pop(gunicorn.pid)
    assert resident(gunicorn.pid) > 2 * max(map(resident, points))
    assert min(points.values()) > master
    assert margin_of(gunicorn.pool()) == pytest.approx(min(points.values()) - master, abs=8 * MIB)


GROWING = """
def nworkers_changed(server, new, old):
    if old and new > old:
        server.grown = b"x" * (120 << 20)
"""


def test_workers_are_raised_again_when_their_master_outgrows_them(cgroup, serve):
    """What was enough at the fork is not, when the master has grown by 120 MiB of 300 since."""
    gunicorn = serve("sync", 2, soft_limit="280MiB", settings=GROWING, wrap=cgroup(LIMIT).command).serving(2)
    old = gunicorn.workers()
    assert [score(pid) - score(gunicorn.pid) for pid in old] == [300, 300]

    gunicorn.signal(signal.SIGTTIN)
    until(lambda: resident(gunicorn.pid) > 120 * MIB, "the master has grown")

    def outranks(pid: int) -> bool:
        return badness(resident(pid), score(pid), LIMIT) > badness(resident(gunicorn.pid), score(gunicorn.pid), LIMIT)

    until(lambda: len(gunicorn.workers()) == 3 and all(map(outranks, gunicorn.workers())), "each worker ranks above the master")
    assert all(score(pid) > score(gunicorn.pid) + 400 for pid in old)


def test_a_killed_worker_leaves_its_request_on_the_scoreboard(pool):
    """What it was doing can be read until the master has reaped it; then its slot is given to another."""
    gunicorn, _ = pool(BALLASTS[0], soft_limit="280MiB")
    workers = {worker.pid: worker.slot for worker in gunicorn.serving(3).pool().workers}
    path = next(path for path in Path("/dev/shm").glob(f"oomsafe-*/{gunicorn.pid}-*.board"))
    gunicorn.signal(signal.SIGSTOP)

    hog(gunicorn)

    killed = until(lambda: [pid for pid in workers if state(pid) == "Z"], "a worker is dead, and nobody has reaped it")[0]
    at = layout.HEADER_SIZE + workers[killed] * layout.SLOT_SIZE
    slot = memory_of(str(path))[at : at + layout.SLOT_SIZE]
    (worker,) = view_of_one(slot).workers
    assert (worker.pid, [work.name for work in worker.in_flight]) == (killed, ["GET /hog"])
    gunicorn.signal(signal.SIGCONT)
    gunicorn.serving(3)
    assert all(not worker.in_flight for worker in gunicorn.pool().workers)


def test_the_kernels_report_names_the_worker(pool):
    """Pids there are those of the initial namespace; the name is the worker's own, and tells which one it was."""
    need(dmesg() is not None, "dmesg can't be read")
    gunicorn, _ = pool(BALLASTS[0], soft_limit="280MiB")
    gunicorn.serving(3)
    names = {Path(f"/proc/{pid}/comm").read_text().strip() for pid in gunicorn.workers()}
    assert len(names) == 3
    assert all(name.startswith("oomsafe-w") for name in names)
    before = {name: told(name) for name in names}

    hog(gunicorn)

    until(lambda: any(told(name) > before[name] for name in names), "the kernel's report names one of the workers")


def test_auto_is_a_share_of_the_cgroups_limit(cgroup, serve):
    """90 % of the limit, less the master, by the number of workers; the log says where the limit comes from."""
    sandbox = cgroup(LIMIT)
    gunicorn = serve("sync", 2, wrap=sandbox.command).serving(2)
    pool = gunicorn.pool()
    assert (pool.limit, pool.budget) == (LIMIT, LIMIT * 9 // 10)
    (line,) = gunicorn.lines("oomsafe guards 2 workers")
    assert f"of 300 MiB (cgroup v{sandbox.cgroup.version} {sandbox.cgroup.path})" in line
    assert "(auto)" in line
    for worker in pool.workers:
        share = (pool.budget - (held_of(gunicorn.pid) or 0)) / 2
        # jitter lowers it by up to a tenth; the master has grown by a little since
        assert 0.89 * share < worker.figures.soft <= share + 2 * MIB


def test_over_its_budget_nobody_waits_for_a_replacement(cgroup, serve):
    """The cgroup holds two workers at their limit, and not while they wait for a boot: the worst goes at once, and the other stays."""
    sandbox = cgroup(460 * MIB)
    slow = "import time\nfrom apps import wsgi\ntime.sleep(2)\n"
    gunicorn = serve(
        "gthread", 2, app="slow:wsgi", files={"slow.py": slow}, soft_limit="200MiB", min_lifetime=0, jitter=0, wrap=sandbox.command
    ).serving(2)

    with Load(gunicorn, "/leak?kib=512&s=0.02", clients=4) as load:
        gunicorn.wait_for(" recycling: ", times=4, seconds=60)

    assert load.failed == []
    # by its supervisor's word, or by itself where it grows faster than that comes
    assert gunicorn.lines("may go before its replacement is there: ") or gunicorn.lines("ends without waiting for its supervisor")
    assert (sandbox.cgroup.oom_kills(), gunicorn.lines("SIGKILL")) == (0, [])


@pytest.mark.parametrize("worker_class", ["gthread", "gevent", "uvicorn_worker.UvicornWorker"])
def test_a_draining_worker_is_the_first_choice(serve, worker_class):
    """Its oom_score_adj is 300 higher while it ends a slow request."""
    gunicorn = serve(worker_class, 1, soft_limit="80MiB", min_lifetime=0).serving(1)
    (pid,) = gunicorn.workers()
    assert score(pid) - score(gunicorn.pid) == 300  # of a machine's memory a small master is nothing
    slow = gunicorn.connect()
    slow.request("GET", "/slow?s=2")
    until(lambda: gunicorn.worker(pid).in_flight, "the slow request is in flight")

    gunicorn.get("/fill?mib=84")

    until(lambda: score(pid) - score(gunicorn.pid) == 600, "the score of the draining worker is raised")
    assert slow.getresponse().read() == b"/slow?s=2"
    slow.close()


def resident(pid: int) -> int:
    """A process's resident memory in bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def score(pid: int) -> int:
    """A process's oom_score_adj."""
    return int(Path(f"/proc/{pid}/oom_score_adj").read_text())


def state(pid: int) -> str:
    """R, S, Z and so on; X when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
    except OSError:
        return "X"


def dmesg() -> str | None:
    """The kernel's log; None when it may not be read."""
    result = subprocess.run(["dmesg"], capture_output=True, text=True, check=False)
    return result.stdout if result.returncode == 0 else None


def told(name: str) -> int:
    """How many kills of a process with this name the kernel's log tells of."""
    return sum("Killed process" in line and f"({name}) total-vm:" in line for line in (dmesg() or "").splitlines())
