"""gunicorn's master is root, its workers are nobody, and one of them is taken over: it gets no more than its own user has."""

from __future__ import annotations

import json
import os
import pwd
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from needs import need
from privileges import adj, opened_to_others
from serving import Gunicorn, until


@pytest.fixture
def dropped(serve: Callable[..., Gunicorn], tmp_path: Path) -> Gunicorn:
    """Two workers of user nobody, whose app attacks."""
    need(os.geteuid() == 0, "only root can become somebody else")
    nobody = pwd.getpwnam("nobody")
    settings = f"user, group = {nobody.pw_uid}, {nobody.pw_gid}"
    return serve("sync", app="attacking:wsgi", settings=settings, prefix=opened_to_others(tmp_path), soft_limit="1GiB").serving()


@pytest.fixture
def innocent() -> Iterator[int]:
    """A process that has nothing to do with the pool."""
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process.pid
        process.kill()


def attack(gunicorn: Gunicorn, path: str) -> tuple[int, str]:
    """The pid of the worker that attacked, and what it says."""
    status, _, body = gunicorn.get(path)
    assert status == 200
    pid, _, said = body.decode().partition(" ")
    return int(pid), said


def replace_one(gunicorn: Gunicorn) -> None:
    """Kill a worker; the master reaps it, and another serves."""
    before = set(gunicorn.workers())
    os.kill(min(before), signal.SIGKILL)
    until(lambda: len(gunicorn.workers()) == 2 and min(before) not in gunicorn.workers(), "a new worker")
    until(lambda: gunicorn.get("/")[0] == 200, "it serves")


def rescored(gunicorn: Gunicorn) -> None:
    """Wait until the master has looked after its workers, as it does every five seconds."""
    workers = gunicorn.workers()
    until(lambda: all(adj(pid) > adj(gunicorn.pid) for pid in workers), "the new one has its score, too")
    wanted = {pid: adj(pid) for pid in workers}
    for pid in workers:
        Path(f"/proc/{pid}/oom_score_adj").write_text(str(wanted[pid] - 100))
    until(lambda: {pid: adj(pid) for pid in workers} == wanted, "the workers' scores are raised again")


def status() -> list[int]:
    """The supervisors that `oomsafe status` shows."""
    ended = subprocess.run([sys.executable, "-m", "oomsafe.cli", "status", "--json"], capture_output=True, check=False, timeout=30)
    return [pool["supervisor"] for pool in json.loads(ended.stdout)["pools"]]


def test_no_other_process_has_its_score_raised(dropped: Gunicorn, innocent: int) -> None:
    """All slots are said to be an innocent process's: the master still looks after its own workers, and after nobody else."""
    before = adj(innocent)

    attack(dropped, f"/claim?pid={innocent}")
    rescored(dropped)

    assert adj(innocent) == before


def test_nobody_cuts_the_scoreboard_short(dropped: Gunicorn) -> None:
    """What is open in a worker is cut to nothing: the master lives, gives slots, and is seen again when it has put its file right."""
    _, said = attack(dropped, "/truncate")
    assert "Operation not permitted" in said

    replace_one(dropped)
    rescored(dropped)

    assert dropped.pid in status()
    assert dropped.process.poll() is None
    assert "SIGBUS" not in dropped.log()
    assert dropped.stop() == 0


@pytest.mark.parametrize("path", ["/odd", "/fill"])
def test_the_master_goes_on(dropped: Gunicorn, path: str) -> None:
    """Sequences that are odd for ever, counters at their end: workers are reaped, their slots are freed, and new ones are seen."""
    attack(dropped, path)
    for _ in range(3):
        replace_one(dropped)

    until(
        lambda: {worker.pid for worker in dropped.pool().workers if worker.slot < 6} >= set(dropped.workers()),
        "the workers that live are on the scoreboard, in slots that others had",
    )
    assert "Traceback" not in dropped.log()
    assert "all 32 slots" not in dropped.log()
    assert dropped.stop() == 0
