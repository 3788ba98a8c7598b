"""`oomsafe recycle`: an operator replaces one worker of a real pool, and nobody's request is lost."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
from celerying import Start
from clients import Load, Watch
from dirtying import dirty, dirty_workers
from serving import Gunicorn, Server, until
from uvicorning import health_check
from versions import ends_dirty_workers, loses_none

from oomsafe.scoreboard import layout
from oomsafe.scoreboard.backing import open_to_order
from oomsafe.scoreboard.mailbox import Answer, What

LINE = re.compile(r"worker (\d+) \(slot \d+\) recycling: by an operator's order: anon [\d.]+ MiB, after \d+ (requests?|tasks?)")


def recycle(*argv: object) -> subprocess.CompletedProcess[str]:
    """The command, as an operator runs it."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("OOMSAFE_")}
    command = [sys.executable, "-m", "oomsafe.cli", "recycle", *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environ, check=False)


def states(server: Server) -> list[str]:
    """What each worker does at this moment."""
    return [worker.state.value for worker in server.pool().workers]


def serving(seen: object) -> int:
    """How many of them serve."""
    assert isinstance(seen, list)
    return seen.count("serving") + seen.count("waiting")


def is_replaced_under_load(server: Server, workers: int = 2) -> None:
    """The replacement first, no request lost, the line and the metric name the reason."""
    before = server.workers()
    chosen = next(worker for worker in server.pool().workers if worker.pid in before)

    with Watch(lambda: states(server)) as watch, Load(server, "/?", least=100) as load:
        ended = recycle(chosen.pid, "--wait", 60)

    assert (ended.returncode, ended.stderr) == (0, "")
    assert re.fullmatch(rf"worker {chosen.pid} \(slot {chosen.slot}\) of \S+ is gone\n", ended.stdout)
    assert load.failed == []
    assert [seen for seen in watch.seen if serving(seen) < workers] == []
    (line,) = server.wait_for(" recycling: ")
    assert (match := LINE.search(line)) and int(match[1]) == chosen.pid
    assert f"worker {chosen.pid} (slot {chosen.slot}) is to be recycled by an operator's order" in server.log()
    server.serving(workers)
    assert set(server.workers()) & set(before) == set(before) - {chosen.pid}
    assert server.pool().totals.by_reason["operator"] == sum(server.pool().totals.recycles) == 1


@pytest.mark.parametrize("worker_class", ["sync", "gthread", "asgi", "uvicorn_worker.UvicornWorker"])
def test_a_worker_of_gunicorn_s(serve: Callable[..., Gunicorn], worker_class: str) -> None:
    """Even one that has just booted: min_lifetime is for limits."""
    loses_none(worker_class)

    is_replaced_under_load(serve(worker_class, soft_limit="1GiB", min_lifetime=60).serving())


def test_a_worker_of_uvicorn_s(serve_uvicorn: Callable[..., Server]) -> None:
    """The same."""
    is_replaced_under_load(serve_uvicorn(*health_check(30), soft_limit="1GiB").serving())


def test_a_dirty_worker_of_gunicorn_s(serve: Callable[..., Gunicorn]) -> None:
    """Its pool has a supervisor of its own; no action is lost."""
    ends_dirty_workers()
    gunicorn = dirty(serve, 2)
    before = dirty_workers(gunicorn)

    with Load(gunicorn, "/dirty/act?n=", least=20) as load:
        ended = recycle(before[0], "--wait", 60)

    assert (ended.returncode, ended.stderr) == (0, "")
    assert load.failed == []
    assert len(gunicorn.lines("recycling: by an operator's order")) == 1
    until(lambda: len(dirty_workers(gunicorn)) == 2, "there are two again")
    assert set(dirty_workers(gunicorn)) & set(before) == {before[1]}


def test_the_only_worker_by_its_pool_and_its_slot(serve: Callable[..., Gunicorn]) -> None:
    """Another serves before it goes."""
    gunicorn = serve("sync", 1, soft_limit="1GiB", name="the-only").serving(1)
    (worker,) = gunicorn.pool().workers

    with Watch(lambda: states(gunicorn)) as watch:
        ended = recycle("--pool", "the-only", "--worker", worker.slot, "--wait", 60)

    assert ended.stdout == f"worker {worker.pid} (slot {worker.slot}) of the-only is gone\n"
    assert [seen for seen in watch.seen if not serving(seen)] == []


def test_the_last_one_stays_where_there_is_no_room_for_another(serve: Callable[..., Gunicorn]) -> None:
    """It has the order, serves on, and the tool says that it is still there; a second order changes nothing."""
    gunicorn = serve("sync", 1, soft_limit="1GiB", budget="1MiB").serving(1)
    (pid,) = gunicorn.workers()

    with Watch(lambda: states(gunicorn)) as watch:
        ended = recycle(pid, "--wait", 3)
        again = recycle(pid)

    assert ended.returncode == 3
    assert ended.stderr.endswith(" has been ordered to leave, and is still there after 3 s\n")
    assert (again.returncode, again.stdout.endswith(" leaves already, or has been ordered to\n")) == (0, True)
    assert [seen for seen in watch.seen if not serving(seen)] == []
    assert gunicorn.workers() == [pid]


def test_a_dry_run_says_so_and_does_nothing(serve: Callable[..., Gunicorn]) -> None:
    """Exit status 1, and a line in the log."""
    gunicorn = serve("sync", soft_limit="1GiB", dry_run=True).serving()
    before = gunicorn.workers()

    ended = recycle(before[0])

    assert ended.returncode == 1
    assert ended.stderr.endswith(" would be recycled, but its pool is in a dry run: nothing is done\n")
    gunicorn.wait_for(f"worker {before[0]} (slot ")
    assert len(gunicorn.lines("would be recycled (dry run) by an operator's order")) == 1
    time.sleep(1.5)  # nothing is to be waited for: longer than a tick
    assert gunicorn.workers() == before


def test_a_process_without_a_supervisor_of_ours(serve_uvicorn: Callable[..., Server]) -> None:
    """Nothing would replace it."""
    uvicorn = serve_uvicorn(workers=1, soft_limit="1GiB").up()

    ended = recycle(uvicorn.pid)

    assert ended.returncode == 1
    assert "has no supervisor of oomsafe's: nothing here could replace it" in ended.stderr
    assert uvicorn.get("/")[0] == 200


def test_a_supervisor_that_does_not_answer(serve: Callable[..., Gunicorn]) -> None:
    """The order is withdrawn: when it goes on, it recycles nobody."""
    gunicorn = serve("sync", soft_limit="1GiB").serving()
    before = gunicorn.workers()
    gunicorn.signal(signal.SIGSTOP)

    try:
        ended = recycle(before[0])
    finally:
        gunicorn.signal(signal.SIGCONT)

    assert ended.returncode == 3
    assert f"supervisor {gunicorn.pid} has not answered within 5 s; the order is withdrawn" in ended.stderr
    assert recycle(before[1], "--wait", 60).returncode == 0  # this one it heeds
    assert not gunicorn.lines(f"worker {before[0]} (slot 0) is to be")
    assert before[0] in gunicorn.workers()


def test_what_can_not_be_right() -> None:
    """One line each, and never a traceback."""
    assert recycle().returncode == recycle(1, "--pool", "a", "--worker", 1).returncode == recycle("--pool", "a").returncode == 2
    assert recycle(-1).returncode == recycle("me").returncode == 2
    ended = recycle("--pool", "no\x1b[31m", "--worker", 0)
    assert ended.returncode == 1
    assert "\x1b" not in ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("no pool of this user is ")
    assert "Traceback" not in ended.stderr


def test_a_hostile_mailbox_does_nothing(serve: Callable[..., Gunicorn]) -> None:
    """For seconds there is nothing but garbage, or an order that is nearly right; then an order is heeded as ever."""
    gunicorn = serve("sync", soft_limit="1GiB").serving()
    before = gunicorn.workers()
    worker, other = gunicorn.pool().workers
    fd = open_to_order(gunicorn.pool_path())
    nearly = [
        (worker.slot, worker.pid, worker.started, worker.generation + 1),
        (worker.slot, worker.pid, worker.started + 1, worker.generation),
        (worker.slot, other.pid, other.started, worker.generation),
        (worker.slot, gunicorn.pid, 0, worker.generation),
        (worker.slot, 1, 1, worker.generation),
        (layout.COUNT_MAX, worker.pid, worker.started, worker.generation),
    ]

    try:
        for sequence, order in enumerate(nearly, 1):
            os.pwrite(fd, layout.MAILBOX.pack(sequence, *order, time.time(), What.RECYCLE, 0, 0.0), layout.MAILBOX_AT)
            expected = layout.ANSWER.pack(sequence, Answer.UNKNOWN)
            until(lambda expected=expected: os.pread(fd, len(expected), layout.ANSWER_AT) == expected, "it answers", 10)
        end, random_ = time.monotonic() + 3, random.Random(7)
        while time.monotonic() < end:
            os.pwrite(fd, random_.randbytes(layout.MAILBOX.size + 20), layout.MAILBOX_AT)
    finally:
        os.close(fd)

    assert gunicorn.workers() == before
    assert not gunicorn.lines("operator's order")
    assert not gunicorn.lines("Traceback")
    assert recycle(before[0], "--wait", 60).returncode == 0


TASKS = """
results = [proj.slow.delay(number, 0.05) for number in range(200)]
result = [r.get(timeout=100) for r in results]
"""


@pytest.mark.parametrize("broker", ["redis", "filesystem"])
def test_a_child_of_celery_s(celery: Start, broker: str) -> None:
    """Between two tasks: each task runs once, and its result comes back."""
    node = celery(broker, soft_limit="1GiB").ready()
    before = until(lambda: (found := node.children()) and len(node.pool().workers) == len(found) == 2 and found, "two children")
    ended: list[subprocess.CompletedProcess[str]] = []

    with Watch(lambda: ended or ended.append(recycle(before[0], "--wait", 60))):
        results = node.ask(TASKS, seconds=120)
        until(lambda: ended, "the operator's tool has ended", 60)

    assert results == list(range(200))
    assert ended[0].returncode == 0, ended[0].stderr
    (line,) = node.wait_for(" recycling: ")
    assert (match := LINE.search(line)) and int(match[1]) == before[0]
    assert sorted(int(run.split()[0]) for run in (node.folder.parent / "runs").read_text().splitlines()) == results
    until(lambda: len(node.children()) == 2, "there are two again")
    assert set(node.children()) & set(before) == {before[1]}
    assert node.pool().totals.by_reason["operator"] == 1


def test_an_idle_child_of_celery_s(celery: Start) -> None:
    """No task comes, and it goes all the same."""
    node = celery(soft_limit="1GiB").ready()
    (first, *_) = until(lambda: (found := node.children()) and len(node.pool().workers) == len(found) == 2 and found, "two children")

    assert recycle(first, "--wait", 60).returncode == 0

    assert node.ask("result = proj.slow.delay(7, 0).get(timeout=30)") == 7
