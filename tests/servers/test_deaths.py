"""Ends of all kinds: workers, masters and apps that die, and what is left behind."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from clients import Load, Watch
from serving import CLASSES, board_of, memory_of, until
from versions import reaps_later

from oomsafe.policy.state import State
from oomsafe.scoreboard import layout


def slots_in_use(path: str) -> int:
    """How many slots of a scoreboard are not free."""
    raw = memory_of(path)
    offsets = range(layout.HEADER_SIZE, len(raw), layout.SLOT_SIZE)
    return sum(layout.read_state(raw, at) is not State.FREE for at in offsets)


@pytest.mark.parametrize("worker_class", ["sync", "gthread"])
def test_a_killed_worker_is_replaced_and_its_counts_stay(serve, worker_class):
    """Its slot is free again, and no total ever falls."""
    gunicorn = serve(worker_class, soft_limit="100MiB").serving()
    board = board_of(gunicorn.pid)

    with Watch(lambda: gunicorn.pool().totals.work) as watch, Load(gunicorn, "/?"):
        for _ in range(4):
            victim = gunicorn.serving().workers()[0]
            before = gunicorn.worker(victim).counters.work
            until(lambda victim=victim, before=before: gunicorn.worker(victim).counters.work > before, "the worker works")
            os.kill(victim, signal.SIGKILL)
            until(lambda victim=victim: victim not in gunicorn.workers(), "the victim is gone")
        gunicorn.serving()

    assert watch.seen == sorted(watch.seen)
    assert watch.seen[-1] > 0
    assert slots_in_use(board) == 2
    assert gunicorn.get("/")[0] == 200
    gunicorn.signal(signal.SIGTTOU)
    until(lambda: slots_in_use(board) == 1, "the slot of a worker that nobody follows is free")


DIES_UNREAPED = """
import os, signal, time

def nworkers_changed(server, new, old):
    if old and new > old:
        victim = min(server.WORKERS)
        os.kill(victim, signal.SIGKILL)
        while open(f"/proc/{victim}/stat").read().rpartition(") ")[2][0] != "Z":
            time.sleep(0.01)
"""


def test_a_slot_given_anew_is_not_released_when_its_former_owner_is_reaped(serve):
    """A worker may be dead, and not reaped yet, when the next one is forked: each living one keeps a slot of its own."""
    reaps_later()
    gunicorn = serve(soft_limit="100MiB", settings=DIES_UNREAPED).serving(2)
    for workers in (3, 4, 5):
        gunicorn.signal(signal.SIGTTIN)
        gunicorn.wait_for("was sent SIGKILL", workers - 2)
        pool = gunicorn.serving(workers).pool()
        assert {worker.pid for worker in pool.workers} == set(gunicorn.workers())
        assert len({worker.slot for worker in pool.workers}) == workers


@pytest.mark.parametrize("worker_class", ["sync", "gthread", "gevent", "asgi"])
def test_workers_follow_a_killed_master_and_the_next_start_sweeps(serve, worker_class):
    """The scoreboard that nobody could remove is gone after the next start."""
    gunicorn = serve(worker_class, soft_limit="100MiB", settings="timeout = 8").serving()
    board = board_of(gunicorn.pid)
    gunicorn.signal(signal.SIGKILL)
    gunicorn.ended()
    until(lambda: not gunicorn.session(), "the workers have ended by themselves")

    serve("sync", 1, soft_limit="100MiB").serving(1)

    assert board
    assert not os.path.exists(board)


@pytest.mark.parametrize("worker_class", CLASSES)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGQUIT])
def test_a_master_that_is_told_to_end_removes_its_scoreboard(serve, worker_class, number):
    """And ends with 0."""
    gunicorn = serve(worker_class, soft_limit="100MiB").serving()
    board = board_of(gunicorn.pid)
    assert board
    gunicorn.signal(number)
    assert gunicorn.ended() == 0
    assert not os.path.exists(board)
    assert "Traceback" not in gunicorn.log()


@pytest.mark.parametrize("worker_class", CLASSES)
def test_with_preload_app_workers_are_guarded(serve, worker_class):
    """The app is loaded before there is any hook of ours; each worker wraps it for itself."""
    gunicorn = serve(worker_class, soft_limit="100MiB", min_lifetime=0, settings="preload_app = True").serving()
    assert gunicorn.get("/fill?mib=104")[0] == 200
    gunicorn.wait_for(" recycling: ")
    assert gunicorn.serving().get("/")[0] == 200


@pytest.mark.parametrize(
    ("settings", "env", "app", "status"),
    [("", {"APPS_FAIL": "1"}, "apps:wsgi", 3), ("preload_app = True", {"APPS_FAIL": "1"}, "apps:wsgi", 1), ("", {}, "apps:nothing", 4)],
)
def test_an_app_that_does_not_load_ends_gunicorn_as_ever(serve, settings, env, app, status):
    """With gunicorn's own exit status, the same as without us, and nothing left behind."""
    # with two workers gunicorn may meet the second one's failure while it halts, and exit with 1
    plain = serve("sync", 1, settings=settings, env=env, app=app, install=False)
    guarded = serve("sync", 1, settings=settings, env=env, app=app, soft_limit="100MiB")
    assert plain.ended() == status
    assert guarded.ended() == status
    assert not list(Path("/dev/shm").glob(f"oomsafe-*/{guarded.pid}-*.board"))


BREAK = """
from oomsafe.supervisor.supervisor import Supervisor

def broken(*arguments, **keywords):
    raise RuntimeError("broken by the test")

Supervisor.{} = broken
"""


@pytest.mark.parametrize(
    ("method", "hook"),
    [("__init__", "on_starting"), ("reserve", "pre_fork"), ("enlist", "post_fork"), ("seat", "post_worker_init"),
     ("release", "child_exit"), ("change", "nworkers_changed"), ("tick", "tick")],
)  # fmt: skip
def test_a_failure_of_ours_is_logged_and_gunicorn_goes_on(serve, method, hook):
    """Whichever of our hooks fails: one line for each process that met it, and the service stays up."""
    gunicorn = serve("sync", 2, soft_limit="100MiB", settings=BREAK.format(method))
    gunicorn.wait_for("Booting worker", 2)
    for _ in range(2):
        gunicorn.signal(signal.SIGTTIN)
        until(lambda: len(gunicorn.workers()) == 3, "a third worker")
        victim = gunicorn.workers()[0]
        os.kill(victim, signal.SIGKILL)
        until(lambda victim=victim: len(gunicorn.workers()) == 3 and victim not in gunicorn.workers(), "the victim is replaced")
        gunicorn.signal(signal.SIGTTOU)
        until(lambda: len(gunicorn.workers()) == 2, "back to two workers")
        assert gunicorn.get("/")[0] == 200

    lines = gunicorn.wait_for(f"oomsafe failed in {hook} ")
    assert all("broken by the test" in line for line in lines)
    if hook not in ("post_fork", "post_worker_init"):  # in the master
        assert len(lines) == 1
    assert gunicorn.stop() == 0
