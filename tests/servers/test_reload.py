"""Signals that change a running pool: HUP, TTIN, TTOU, USR2."""

from __future__ import annotations

import os
import signal

import pytest
from serving import CLASSES, Gunicorn, board_of, conf, until

from oomsafe.kernel.process import children_of, held_of

MIB = 1 << 20


def soft_limits(gunicorn: Gunicorn) -> list[int | None]:
    """The soft limits of the workers on the scoreboard."""
    return [worker.figures.soft for worker in gunicorn.pool().workers]


def reload(gunicorn: Gunicorn, workers: int = 2) -> None:
    """SIGHUP, and wait until all workers are new ones, and serve."""
    before = set(gunicorn.workers())
    gunicorn.signal(signal.SIGHUP)
    until(lambda: len(gunicorn.workers()) == workers and not before & set(gunicorn.workers()), "all workers are new")
    gunicorn.serving(workers)


@pytest.mark.parametrize("worker_class", CLASSES)
def test_hup_puts_a_new_policy_in_force(serve, worker_class):
    """The limits of the file as it is now are logged, and hold for the workers."""
    gunicorn = serve(worker_class, soft_limit="100MiB", jitter=0).serving()
    assert soft_limits(gunicorn) == [100 * MIB] * 2
    for _ in range(7):
        gunicorn.get("/")

    gunicorn.conf.write_text(conf(worker_class, soft_limit="90MiB", hard_limit="200MiB", max_unavailable=2, jitter=0))
    reload(gunicorn)

    before, after = gunicorn.wait_for("oomsafe guards 2 workers", 2)
    assert "soft limit 100 MiB each" in before
    assert "soft limit 90.0 MiB each, hard limit 200 MiB" in after
    assert soft_limits(gunicorn) == [90 * MIB] * 2
    assert gunicorn.pool().turns == 2
    assert gunicorn.pool().totals.work == 7  # also what the old workers had not published yet


@pytest.mark.parametrize("keyword", ["soft_limit='90'", "soft_limt='90MiB'"])
def test_hup_with_a_bad_policy_keeps_the_old_one(serve, keyword):
    """One clear line; the service goes on, and a corrected file is taken."""
    gunicorn = serve(soft_limit="100MiB", jitter=0).serving()
    good = gunicorn.conf.read_text()
    gunicorn.conf.write_text(good.replace("soft_limit='100MiB'", keyword))

    reload(gunicorn)

    (line,) = gunicorn.lines("the policy stays as it was")
    assert line.startswith("oomsafe: ")
    assert keyword.split("=")[0] in line
    assert "Traceback" not in gunicorn.log()
    assert gunicorn.get("/")[0] == 200
    assert soft_limits(gunicorn) == [100 * MIB] * 2

    gunicorn.conf.write_text(good.replace("100MiB", "90MiB"))
    reload(gunicorn)
    assert soft_limits(gunicorn) == [90 * MIB] * 2


def test_hup_reads_the_users_file_anew_without_an_install_line(serve):
    """-c python:oomsafe.gunicorn.conf with ./gunicorn.conf.py beside it, which gunicorn would have found by itself."""
    argv = ["-c", "python:oomsafe.gunicorn.conf"]
    env = {"OOMSAFE_SOFT_LIMIT": "100MiB", "OOMSAFE_JITTER": "0"}
    hook = "def post_fork(server, worker):\n    server.log.info('the user is {}')\n"
    gunicorn = serve(argv=argv, env=env, files={"gunicorn.conf.py": conf(install=False, settings=hook.format("old"))}).serving()
    assert gunicorn.lines("the user is old")

    (gunicorn.folder / "gunicorn.conf.py").write_text(conf(install=False, workers=3, settings=hook.format("new")))
    reload(gunicorn, 3)

    assert len(gunicorn.wait_for("the user is new", 3)) == 3
    assert gunicorn.lines(": soft limit 100 MiB each")
    assert soft_limits(gunicorn) == [100 * MIB] * 3


def test_auto_limits_follow_ttin_and_ttou(serve):
    """A share of the budget: with a third worker each has less, without it more again. Each has a slot of its own."""
    gunicorn = serve("gthread", budget="400MiB", jitter=0).serving(2)

    def shared_by(workers: int) -> bool:
        # what the master has grown by since a worker was forked is not in that worker's share
        wanted = (400 * MIB - (held_of(gunicorn.pid) or 0)) / workers
        limits = soft_limits(gunicorn)
        return len(limits) == workers and all(limit and abs(limit - wanted) < 2 * MIB for limit in limits)

    until(lambda: shared_by(2), "two workers share the budget")
    gunicorn.signal(signal.SIGTTIN)
    until(lambda: shared_by(3), "three workers share the budget")
    assert len({worker.slot for worker in gunicorn.serving(3).pool().workers}) == 3
    gunicorn.signal(signal.SIGTTOU)
    until(lambda: shared_by(2), "two workers share the budget again")
    assert gunicorn.serving(2).pool().workers_wanted == 2


def test_usr2_gives_the_new_master_a_scoreboard_of_its_own(serve):
    """Both are there while both run; the old one goes with the old master, and the new master serves on."""
    gunicorn = serve(soft_limit="100MiB").serving()
    old = gunicorn.pool()
    old_board = board_of(gunicorn.pid)
    gunicorn.signal(signal.SIGUSR2)
    gunicorn.wait_for("Listening at: ", 2)
    new = next(pid for pid in gunicorn.workers() if pid not in {worker.pid for worker in old.workers})
    new_board = until(lambda: board_of(new), "the new master has a scoreboard")
    until(lambda: len(children_of(new)) == 2, "the new master has its workers")
    assert old_board
    assert new_board != old_board

    gunicorn.signal(signal.SIGQUIT)

    assert gunicorn.ended() == 0
    assert not os.path.exists(old_board)
    assert gunicorn.get("/")[0] == 200
    os.kill(new, signal.SIGTERM)
    until(lambda: new not in gunicorn.session(), "the new master has ended")
    assert not os.path.exists(new_board)
