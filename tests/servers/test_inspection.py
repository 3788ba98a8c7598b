"""`oomsafe status --worker`: a worker of a real pool tells what its memory is, serves on, and is afterwards as it was."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
from celerying import Start
from clients import Load
from dirtying import dirty, dirty_workers
from serving import Gunicorn, Server, memory_of, until
from uvicorning import Uvicorn

from oomsafe.kernel.oom_score import read_score
from oomsafe.kernel.process import children_of, peak_rss_of, rss_of
from oomsafe.scoreboard import layout
from oomsafe.scoreboard.mailbox import Answer, order_inspection

MIB = 1 << 20


def status(*argv: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    """The command, as an operator runs it."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("OOMSAFE_")} | {"COLUMNS": "160"}
    command = [sys.executable, "-m", "oomsafe.cli", "status", *map(str, argv)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environ, check=False)
    assert ended.returncode == code, (ended.returncode, ended.stdout, ended.stderr)
    return ended


def inspected(pid: int, *argv: object) -> dict[str, Any]:
    """What this worker tells of itself, as data."""
    told = json.loads(status("--worker", pid, "--json", *argv).stdout)
    assert told["worker"]["pid"] == pid
    return dict(told["worker"])


def complete(pid: int) -> dict[str, Any]:
    """The same, with all modules looked at, for which there may be no time on a busy machine."""
    return until(lambda: (told := inspected(pid))["objects"]["complete"] and told, "there is time", 120)


def is_as_it_was(server: Server, pid: int, inspect: Callable[[], Any], grows: int = 4 * MIB) -> None:
    """Around what `inspect` does: the same workers serve, this one with its score, its size and its peak, and without a child."""
    workers, score, peak = server.workers(), read_score(pid), peak_rss_of(pid)
    inspect()
    until(lambda: children_of(pid) == [], "nothing of it is left")
    assert server.workers() == workers
    assert read_score(pid) == score
    assert peak is not None and (peak_rss_of(pid) or 0) < peak + grows
    # what status shows of it is what it holds now, and not a child's part of it
    shown = json.loads(status("--json", "--pool", server.pid).stdout)["pools"][0]["workers"]
    assert {worker["pid"]: worker["state"] for worker in shown} == dict.fromkeys(workers, "serving")
    assert not server.lines("oomsafe failed in")
    assert not server.lines("recycling")


def is_right(told: dict[str, Any], least: int = 5000) -> None:
    """Its parts add up to what the worker holds, and its objects are there."""
    rss = rss_of(told["pid"])
    assert rss and 0.7 < told["parts"]["total"] / rss < 1.3, (told["parts"], rss)
    assert told["parts"]["python_live"] > 4 * MIB
    assert told["objects"]["tracked"] > least
    assert told["objects"]["threads"] >= 1 and told["objects"]["descriptors"] >= 3
    assert len(told["objects"]["types"]) >= 3 and told["objects"]["containers"]
    assert 0 < told["stopped"] < 5 and 0 < told["took"] < 5


@pytest.mark.parametrize("worker_class", ["sync", "gthread", "gevent"])
def test_under_load(serve: Callable[..., Gunicorn], worker_class: str) -> None:
    """Again and again: no request fails, and it is as it was."""
    gunicorn = serve(worker_class, soft_limit="1GiB").serving()
    pid = gunicorn.workers()[0]
    told: list[dict[str, Any]] = []
    with Load(gunicorn, "/?", least=200) as load:
        until(lambda: load.served > 50, "it has work")
        inspected(pid)  # which imports what it needs
        is_as_it_was(gunicorn, pid, lambda: told.extend(inspected(pid) for _ in range(3)))

    assert load.failed == []
    for one in told:
        is_right(one)
    assert told[0]["work"] < told[-1]["work"]


def test_it_names_what_has_grown(serve: Callable[..., Gunicorn]) -> None:
    """With what the application keeps in there left out, for people and as data."""
    gunicorn = serve("gthread", 1, app="growing_apps:wsgi", soft_limit="1GiB", name="the-shop").serving(1)
    (pid,) = gunicorn.workers()
    gunicorn.get("/named?20000")

    def shown() -> str:
        """All of it: on a busy machine there may be no time to look at all modules."""
        told = status("--worker", pid, "--pool", "the-shop").stdout
        return "" if "there was no time" in told else told

    one = until(shown, "there is time", 120)
    told = complete(pid)

    assert f"worker {pid} (slot 0) of the-shop holds " in one
    assert "in use by Python objects " in one
    assert "growing_apps.CACHE" in one and "20 000 entries" in one
    assert "; the worker stood still for " in one
    (row,) = [row for row in told["objects"]["containers"] if row["name"] == "growing_apps.CACHE"]
    assert (row["kind"], row["entries"], row["before"], row["size"] > MIB) == ("dict", 20_000, None, True)
    assert "secret" not in one + json.dumps(told)
    assert told["grown"] > 4 * MIB
    (pool,) = json.loads(status("--json", "--pool", "the-shop").stdout)["pools"]
    assert (pool["inspected"]["pid"], pool["inspected"]["phase"], pool["inspected"]["parts"]["files"] > 0) == (pid, "done", True)


def test_in_a_worker_that_knows_what_it_had(serve: Callable[..., Gunicorn]) -> None:
    """Once the pool has recycled one, workers count when they are ready: then growth is known."""
    gunicorn = serve("sync", 1, app="growing_apps:wsgi", soft_limit="1GiB").serving(1)

    def next_one() -> dict[str, Any] | None:
        """The first one's replacement is ready before that is gone; on a busy machine one may have no time to count when it is ready."""
        (pid,) = gunicorn.workers()
        subprocess.run(
            [sys.executable, "-m", "oomsafe.cli", "recycle", str(pid), "--wait", "60"], check=True, capture_output=True, timeout=90
        )
        (pid,) = gunicorn.serving(1).workers()
        gunicorn.get("/named?20000")
        row: dict[str, Any] = complete(pid)["objects"]["containers"][0]
        return row if row["before"] is not None else None

    row = until(next_one, "one has counted when it was ready", 120)

    assert (row["name"], row["kind"], row["entries"], row["before"]) == ("growing_apps.CACHE", "dict", 20_000, 0)


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_a_worker_of_uvicorn_s(serve_uvicorn: Callable[..., Uvicorn], loop: str) -> None:
    """The same."""
    if loop == "uvloop":
        pytest.importorskip("uvloop")
    uvicorn = serve_uvicorn("--loop", loop, soft_limit="1GiB").serving()
    pid = uvicorn.workers()[0]

    with Load(uvicorn, "/?", least=200) as load:
        until(lambda: load.served > 50, "it has work")
        inspected(pid)
        is_as_it_was(uvicorn, pid, lambda: is_right(inspected(pid)))

    assert load.failed == []


def test_a_dirty_worker_of_gunicorn_s(serve: Callable[..., Gunicorn]) -> None:
    """Its pool has a supervisor of its own; no action fails."""
    gunicorn = dirty(serve, 1)
    (pid,) = dirty_workers(gunicorn)

    with Load(gunicorn, "/dirty/act?n=", least=20) as load:
        until(lambda: load.served > 5, "it has work")
        is_right(inspected(pid))

    assert load.failed == []
    assert dirty_workers(gunicorn) == [pid]
    until(lambda: children_of(pid) == [], "nothing of it is left")


#: A group's own get() waits for ever with Celery 5.3.0 and Redis.
TASKS = "result = [sent.get(timeout=60) for sent in [proj.leak.delay(n, 0) for n in range({count})]]"


def test_a_child_of_celery_s(celery: Start) -> None:
    """Between two tasks; no task is lost, and it is as it was."""
    node = celery(soft_limit="1GiB").ready()
    node.ask(TASKS.format(count=4))
    pid = until(lambda: [worker.pid for worker in node.pool().workers if worker.state.serves], "they serve")[0]
    answers: list[Any] = []
    client = threading.Thread(target=lambda: answers.append(node.ask(TASKS.format(count=400), 120)))

    client.start()
    inspected(pid)
    is_as_it_was(
        node, pid, lambda: is_right(inspected(pid), least=1000)
    )  # those from before the fork are frozen (gc.freeze), and not listed
    client.join(120)

    assert answers == [list(range(400))]


def test_a_process_without_a_supervisor_of_ours(serve_uvicorn: Callable[..., Uvicorn]) -> None:
    """Says so, and serves on."""
    uvicorn = serve_uvicorn(workers=1, soft_limit="1GiB").up()

    ended = status("--worker", uvicorn.pid, code=1)

    assert ended.stderr == (
        f"oomsafe: process {uvicorn.pid} has no supervisor of oomsafe's: nothing there takes such an order, nor sees that it ends\n"
    )
    assert uvicorn.get("/")[0] == 200


def test_a_worker_that_is_busy(serve: Callable[..., Gunicorn]) -> None:
    """In one request that takes long: the order is withdrawn, and is not carried out later. Meanwhile the pool is given no other."""
    gunicorn = serve("sync", 1, soft_limit="1GiB", files={"request-held": ""}).serving(1)
    (pid,) = gunicorn.workers()
    with contextlib.closing(gunicorn.connect(120)) as connection:
        connection.request("GET", "/held?")
        until(lambda: gunicorn.worker(pid).in_flight, "it works")
        ended: list[subprocess.CompletedProcess[str]] = []
        client = threading.Thread(target=lambda: ended.append(status("--worker", pid, code=3)))
        client.start()
        until(lambda: is_ordered(gunicorn), "it has the order", 60, 0.0)

        answer = order_inspection(gunicorn.pool_path(), gunicorn.worker(pid), 60)  # not by a process, which may take longer to start
        client.join(60)
        (gunicorn.folder / "request-held").unlink()
        response = connection.getresponse()

        assert (answer, response.status, response.read()) == (Answer.BUSY, 200, b"/held?")
    assert ended[0].stderr == (
        f"oomsafe: worker {pid} (slot 0) of apps:wsgi is not inspected: it has not taken the order within 5 s, which is withdrawn: "
        "it is busy in one call\n"
    )
    is_as_it_was(gunicorn, pid, lambda: is_right(inspected(pid)))


def is_ordered(server: Server) -> bool:
    """Whether the worker in the first slot has an order that it has not taken."""
    return bool(layout.INSPECT.unpack_from(memory_of(server.pool_path()), layout.slot_at(0) + layout.INSPECT_AT)[0])


def test_a_worker_that_is_not_there(serve: Callable[..., Gunicorn]) -> None:
    """Nor its pool: one line each."""
    gunicorn = serve("sync", 1, soft_limit="1GiB").serving(1)

    ended = status("--worker", gunicorn.pid, "--pool", gunicorn.pid, code=1)
    assert ended.stderr.endswith(f"oomsafe: no worker {gunicorn.pid} in {gunicorn.pid}\n")
    assert status("--worker", 1, "--pool", "no\x1b[31m", code=1).stderr.endswith("no pool of this user is called no?[31m\n")
    assert status("--pool", "nobody", code=1).stderr.endswith("no pool of this user is called nobody\n")
    assert "Usage" in status("--worker", -1, code=2).stderr


def test_a_supervisor_that_does_not_answer(serve: Callable[..., Gunicorn]) -> None:
    """The order is withdrawn."""
    gunicorn = serve("sync", 1, soft_limit="1GiB").serving(1)
    (pid,) = gunicorn.workers()
    gunicorn.signal(signal.SIGSTOP)
    try:
        ended = status("--worker", pid, code=3)
    finally:
        gunicorn.signal(signal.SIGCONT)

    assert ended.stderr.endswith(f": supervisor {gunicorn.pid} has not answered within 5 s; the order is withdrawn\n")
    assert not is_ordered(gunicorn)


def test_a_whole_group_that_is_told_to_end(serve: Callable[..., Gunicorn]) -> None:
    """While a worker is inspected: it ends in order, and nothing of it is left."""
    gunicorn = serve("gthread", 2, soft_limit="1GiB").serving()
    pid = gunicorn.workers()[0]
    client = threading.Thread(target=lambda: subprocess.run(
        [sys.executable, "-m", "oomsafe.cli", "status", "--worker", str(pid)], capture_output=True, timeout=60, check=False
    ))  # fmt: skip
    client.start()
    (child,) = until(lambda: children_of(pid), "its fork is there", 30, 0.0)

    os.kill(child, signal.SIGTERM)  # as the whole group gets it; this one ends by it
    gunicorn.signal(signal.SIGTERM)

    assert gunicorn.ended() == 0
    client.join(60)
    until(lambda: not os.path.exists(f"/proc/{child}"), "it is gone, too")
