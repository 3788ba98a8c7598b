"""oomsafe probe on real servers: the line that leaks is named, with its route and its bytes a call, and no request is lost for it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from serving import Server, until
from versions import keeps

from oomsafe.demo.server_process import environment
from oomsafe.policy.probed import Stage

MIX = (Path(__file__).parents[2] / "benchmarks" / "mix_apps.py").read_text()
PATHS = ["/leak", "/balloon", *(f"/free{number}" for number in range(18))]
EACH = 64 << 10

#: A module that can't be imported stands for memray that is not installed.
NO_MEMRAY = {"memray.py": "raise ImportError('not here')"}


@contextlib.contextmanager
def mixed(server: Server, clients: int = 4, among: Sequence[str] = PATHS) -> Iterator[list[str]]:
    """All routes in turn, by several clients; the list of what failed."""
    failed: list[str] = []
    # in no order: two workers that take turns would each get the same half of the routes
    paths, stop = random.Random(1), threading.Event()

    def client() -> None:
        connection = None
        while not stop.is_set():
            path = paths.choice(among)
            connection = connection or server.connect(60)
            try:
                connection.request("GET", path)
                answer = connection.getresponse()
                answer.read()
                if answer.status != 200:
                    failed.append(f"{path}: {answer.status}")
                if answer.will_close:
                    connection.close()
                    connection = None
            except (OSError, http.client.HTTPException) as error:
                failed.append(f"{path}: {error!r}")
                connection.close()
                connection = None
        if connection is not None:
            connection.close()

    threads = [threading.Thread(target=client, daemon=True) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield failed
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    """One of oomsafe's commands."""
    command = [sys.executable, "-m", "oomsafe", *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env={**environment(path=[]), "COLUMNS": "500"}, check=False)


def probe(server: Any, *argv: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    """`oomsafe probe` of this server's pool."""
    ended = run("probe", "--pool", str(server.pid), *argv)
    assert ended.returncode == status, ended.stdout + ended.stderr + server.log()
    return ended


def found(server: Any, *argv: str) -> dict[str, Any]:
    """Its report."""
    report: dict[str, Any] = json.loads(probe(server, "--json", "--requests", "160", "--seconds", "60", *argv).stdout)
    return report


def names_the_leak(report: dict[str, Any], tool: str, route: str = "GET /leak") -> None:
    """The first row is the leak's line, with its route alone, and its bytes a call are right within a tenth."""
    first = report["rows"][0]
    assert report["window"]["tool"].startswith(tool), report["window"]
    assert first["where"].partition(" in ")[0].endswith(LINE), report["brief"]
    assert first["routes"] == [route]
    assert 0.9 <= first["each"] / EACH <= 1.1, first
    assert all(first["size"] > 3 * row["size"] for row in report["rows"][1:] if not row["loads"])


#: Where the bytes are kept.
LINE = f"mix_apps.py:{1 + MIX.splitlines().index('        kept.append(bytes(EACH))')}"


@pytest.mark.parametrize("tool", ["memray", "tracemalloc"])
def test_a_pool_of_threads(serve: Callable[..., Server], tool: str, tmp_path: Path) -> None:
    """Under gunicorn, with either tracer: nothing is lost, the worker is replaced, and status and the next recycle name the line."""
    files = {"mix_apps.py": MIX, **({} if tool == "memray" else NO_MEMRAY)}
    state = tmp_path / "state"
    server = serve("gthread", 2, app="mix_apps:flask", files=files, env={"OOMSAFE_STATE": str(state)}, soft_limit="1GiB").serving()

    with mixed(server) as failed:
        report = found(server)

    assert failed == [] or not keeps("gthread")
    names_the_leak(report, tool)
    pid = report["window"]["pid"]
    assert server.lines("recycling: its allocations were traced: ")
    assert len(server.lines("traces its allocations with")) == len(server.lines(" was probed: ")) == 1
    until(lambda: pid not in server.workers() and len(server.workers()) == 2, "it is replaced")
    files_of = list((state / "probes").iterdir())
    assert {stat.S_IMODE(file.stat().st_mode) for file in files_of} == {0o600}
    assert stat.S_IMODE((state / "probes").stat().st_mode) == 0o700
    assert {file.suffix for file in files_of} == ({".json", ".bin"} if tool == "memray" else {".json"})
    assert server.pool().probed.stage is Stage.DONE
    shown = run("status", "--scoreboard", server.pool_path()).stdout
    assert f"probe of worker {pid} at " in shown
    assert "(oomsafe probe --last)" in shown
    assert json.loads(run("status", "--json", "--scoreboard", server.pool_path()).stdout)["pools"][0]["probed"]["stage"] == "done"
    last = server.lines("recycling: ")[-1]
    run("recycle", str(server.workers()[0]))
    named = until(lambda: server.lines("recycling: ")[-1] != last and server.lines("recycling: ")[-1], "another one is recycled")
    assert "; by the last probe " in named
    assert LINE in named
    assert re.search(r"keeps 64\.\d KiB a call of GET /leak$", probe(server, "--last").stdout, re.MULTILINE)


@pytest.mark.parametrize("app", ["fast", "pool"])
def test_uvicorn(serve_uvicorn: Callable[..., Server], app: str) -> None:
    """Coroutines, and functions in the thread pool."""
    server = serve_uvicorn(app=f"mix_apps:{app}", files={"mix_apps.py": MIX}, soft_limit="1GiB").serving()

    with mixed(server) as failed:
        report = found(server)

    assert failed == []
    names_the_leak(report, "memray")


def test_memory_that_python_does_not_know_of(serve: Callable[..., Server]) -> None:
    """A leak in C code's malloc."""
    env = {"LEAK": "c"}
    server = serve("sync", 2, app="mix_apps:flask", files={"mix_apps.py": MIX}, env=env, soft_limit="1GiB").serving()

    with mixed(server):
        report = found(server)

    first = report["rows"][0]
    assert first["where"].endswith("in keep")
    assert first["routes"] == ["GET /leak"]
    assert 0.9 <= first["each"] / EACH <= 1.1


def test_where_nothing_leaks_no_line_is_named(serve: Callable[..., Server]) -> None:
    """By either tracer's figures."""
    env = {"LEAK": "nothing"}
    server = serve("gthread", 2, app="mix_apps:flask", files={"mix_apps.py": MIX}, env=env, soft_limit="1GiB").serving()

    with mixed(server) as failed:
        ended = probe(server, "--requests", "160", status=4)

    assert failed == [] or not keeps("gthread")
    assert ended.stdout.startswith("no line keeps enough to be called a leak")
    assert server.pool().probed.stage is Stage.NOTHING


def test_a_worker_that_is_killed_meanwhile(serve: Callable[..., Server]) -> None:
    """One line; the pool goes on, and can be probed again."""
    server = serve("sync", 2, app="mix_apps:flask", files={"mix_apps.py": MIX}, soft_limit="1GiB").serving()
    command = [sys.executable, "-m", "oomsafe", "probe", "--pool", str(server.pid), "--requests", "1000000"]
    asking = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment(path=[]))
    until(lambda: server.lines("traces its allocations with"), "it is traced")
    probed = server.pool().probed

    refused = probe(server, status=1)
    os.kill(probed.pid, signal.SIGKILL)

    assert "probed already" in refused.stderr
    assert asking.communicate(timeout=60)[1] == f"oomsafe: worker {probed.pid}: its worker ended before it could tell what it had found\n"
    assert asking.returncode == 1
    assert len(server.lines(f"the probe of worker {probed.pid} failed: ")) == 1
    server.serving()
    with mixed(server):
        names_the_leak(found(server), "memray")


def test_one_without_room_is_not_probed(serve: Callable[..., Server]) -> None:
    """The tracer would take it over its limit."""
    server = serve("sync", 2, app="mix_apps:flask", files={"mix_apps.py": MIX}, soft_limit="45MiB", min_lifetime=0).serving()

    ended = probe(server, status=1)

    assert (
        ended.stderr == "oomsafe: no worker of this pool has room for a tracer's memory now, up to its soft limit and the pool's budget\n"
    )
    assert not server.lines("traces its allocations")


def test_never_in_memory(serve: Callable[..., Server]) -> None:
    """/dev/shm is charged to the cgroup that is short: another folder is taken, which is on a disk."""
    env = {"OOMSAFE_STATE": f"/dev/shm/oomsafe-none-{os.getpid()}", "XDG_STATE_HOME": ""}
    server = serve("sync", 2, app="mix_apps:flask", files={"mix_apps.py": MIX}, env=env, soft_limit="1GiB").serving()
    with mixed(server) as failed:
        report = found(server)

    assert failed == []
    assert report["recording"].startswith("/var/tmp/")
    for suffix in (".bin", ".json"):
        Path(report["recording"]).with_suffix(suffix).unlink()
    shutil.rmtree(env["OOMSAFE_STATE"])


def test_celery(celery: Any) -> None:
    """A child of a node: the tasks are the routes."""
    node = celery(soft_limit="1GiB").ready()
    # in no order: two children take turns
    noise = "import random; [random.choice([proj.good.delay, lambda n: proj.leak.delay(n, 64)])(n) for n in range(400)]; result = None"
    stop = threading.Event()

    def send() -> None:
        while not stop.wait(0.2):
            node.ask(noise)

    sending = threading.Thread(target=send)
    sending.start()
    try:
        report = found(node)
    finally:
        stop.set()
        sending.join()

    first = report["rows"][0]
    assert first["where"].endswith(" in leak")
    assert first["routes"] == ["proj.leak"]
    assert 0.9 <= first["each"] / EACH <= 1.1
    until(lambda: node.lines("recycling: its allocations were traced"), "the child is replaced")


def test_by_itself_when_the_recycled_workers_leak(serve: Callable[..., Server]) -> None:
    """Once, and only where memray is there to do it."""
    files, env = {"mix_apps.py": MIX}, {"LEAK": "many", "OOMSAFE_PROBE": "auto"}
    server = serve("sync", 2, app="mix_apps:flask", files=files, soft_limit="90MiB", min_lifetime=0, env=env).serving()

    with mixed(server, 2, ["/leak", *PATHS[2:12]]) as failed:
        until(lambda: server.lines(": one worker is to trace where"), "the leak is known", 120)
        until(lambda: server.lines(" was probed: "), "it was probed", 120)
        told = len(server.lines("recycling: "))
        until(lambda: len(server.lines("recycling: ")) > told + 2, "more are recycled", 60)

    assert failed == []
    assert len(server.lines("traces its allocations with")) == 1
    assert "GET /leak" in server.lines(" was probed: ")[0]


def test_in_code_where_nothing_replaces_the_process(serve_uvicorn: Callable[..., Server]) -> None:
    """It tells in the log, and goes on as fast as before."""
    app = (
        MIX
        + """
from fastapi import FastAPI
import oomsafe, oomsafe.asgi
inner = make_fast(False)

@inner.get("/probe")
def begin() -> bool:
    return oomsafe.probe(requests=100, seconds=60)

alone = oomsafe.asgi.MemoryMiddleware(inner, soft_limit="1GiB")
"""
    )
    server = serve_uvicorn(workers=1, start=("-m", "uvicorn"), app="mix_apps:alone", files={"mix_apps.py": app}).up()
    server.get("/leak")
    assert server.get("/probe")[2] == b"true"
    assert server.get("/probe")[2] == b"false"

    with mixed(server, 2) as failed:
        until(lambda: server.lines(" was probed: "), "it tells", 60)
        assert server.get("/probe")[2] == b"true"

    assert failed == []
    assert "GET /leak" in server.lines(" was probed: ")[0]
    assert server.alive


def test_in_code_of_a_celery_node_of_one_process(celery: Any) -> None:
    """The task is named."""
    node = celery(argv=("-P", "solo"), soft_limit="1GiB").ready()
    send = "sent = [proj.leak.delay(n, 64) for n in range(100)]; result = [one.get(timeout=60) for one in sent][-1]"

    assert node.ask("result = proj.probe.delay(100).get(timeout=60)") is True
    until(lambda: node.lines(" traces its allocations with "), "it traces")
    assert node.ask(send) == node.ask(send) == 99

    (line,) = until(lambda: node.lines(" was probed: "), "it tells")
    assert re.search(r"proj.py:\d+ in leak keeps 64\.\d KiB a call of proj\.leak; ", line)
