"""The metrics beside each server's supervisor: they answer while workers hang or die, and no server takes that process for a worker."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from celerying import CeleryWorker
from exporting import exporter, scrape, value
from serving import ENDING_WITH_US, Gunicorn, Server, conf, until
from uvicorning import Uvicorn

from oomsafe.kernel.process import children_of, is_alive, start_time

QUIET = ("Traceback", "oomsafe failed", "can't be served", "has ended")


def is_served_while_workers_hang_and_die(server: Any, workers: Callable[[], list[int]], serving: Callable[[], object]) -> None:
    """By SIGSTOP all at once, then by SIGKILL one after the other."""
    pid, port = exporter(server)
    before = until(lambda: len(found := workers()) == 2 and found, "two workers")
    assert isinstance(before, list)
    for worker in before:
        os.kill(worker, signal.SIGSTOP)
    samples = scrape(port)
    for worker in before:
        os.kill(worker, signal.SIGCONT)
    assert sum(value(samples, "oomsafe_workers", state=state) for state in ("serving", "starting")) == 2
    for slot in ("0", "1"):
        assert value(samples, "oomsafe_worker_memory_bytes", worker=slot, kind="rss") > 5 << 20

    for worker in before:
        os.kill(worker, signal.SIGKILL)
        assert value(scrape(port), "oomsafe_pool_budget_bytes") > 0
        until(lambda worker=worker: worker not in workers() and len(workers()) == 2, "another has taken its place")
        serving()
    until(lambda: value(scrape(port), "oomsafe_workers", state="serving") == 2, "two workers serve, as the metrics have it")
    assert exporter(server)[0] == pid
    assert [line for text in QUIET for line in server.lines(text)] == []


def is_started_again(server: Any) -> int:
    """And nobody says that a worker has died. Returns its pid."""
    pid, _ = exporter(server)
    os.kill(pid, signal.SIGKILL)
    another, port = exporter(server, 2)
    assert value(scrape(port), "oomsafe_pool_budget_bytes") > 0
    assert not Path(f"/proc/{pid}").exists()
    assert [line for line in server.lines(str(pid)) if "metrics" not in line] == []
    return another


def ends_with(server: Any, pid: int, end: Callable[[], object]) -> None:
    """And leaves nothing."""
    started = start_time(pid) or 0
    end()
    assert not is_alive(pid, started)


@pytest.mark.parametrize("worker_class", ["sync", "gevent", "uvicorn_worker.UvicornWorker"])
def test_gunicorn(serve: Callable[..., Gunicorn], worker_class: str) -> None:
    """With the policy in the environment: an app that one doesn't own."""
    env = {"OOMSAFE_METRICS": "127.0.0.1:0", "OOMSAFE_SOFT_LIMIT": "300MiB", "OOMSAFE_GUNICORN_CONF": "plain.py"}
    files = {"plain.py": conf(worker_class, install=False)}
    gunicorn = serve(worker_class, argv=["-c", "python:oomsafe.gunicorn.conf"], env=env, files=files).serving()

    is_served_while_workers_hang_and_die(gunicorn, lambda: [w.pid for w in gunicorn.pool().workers], gunicorn.serving)
    pid = is_started_again(gunicorn)
    gunicorn.serving()
    ends_with(gunicorn, pid, gunicorn.stop)


def test_uvicorn(serve_uvicorn: Callable[..., Uvicorn]) -> None:
    """`python -m oomsafe.uvicorn`."""
    uvicorn = serve_uvicorn(metrics="127.0.0.1:0", soft_limit="300MiB").serving()

    is_served_while_workers_hang_and_die(uvicorn, lambda: [w.pid for w in uvicorn.pool().workers], uvicorn.serving)
    pid = is_started_again(uvicorn)
    ends_with(uvicorn, pid, uvicorn.stop)


def test_celery(celery: Callable[..., CeleryWorker]) -> None:
    """The prefork pool."""
    node = celery("redis", metrics="127.0.0.1:0").ready()

    is_served_while_workers_hang_and_die(node, lambda: [w.pid for w in node.pool().workers], lambda: None)
    pid = is_started_again(node)
    ends_with(node, pid, node.__exit__)


def test_a_server_that_oomsafe_run_starts(started: Callable[..., Any]) -> None:
    """An app that one doesn't own, by one command."""
    command = [sys.executable, "-m", "oomsafe", "run", "--metrics", "127.0.0.1:0", "--soft-limit", "300MiB", "--"]
    gunicorn = [sys.executable, "-m", "gunicorn", "-b", "127.0.0.1:0", "-w", "2", "-c", "plain.py", "apps:wsgi"]

    def make(folder: Path) -> Server:
        (folder / "plain.py").write_text(conf(install=False))
        return Server(folder, [*ENDING_WITH_US, *command, *gunicorn], {})

    server = started(make)

    pid, port = exporter(server)
    until(lambda: value(scrape(port), "oomsafe_workers", state="serving") == 2, "two workers serve")
    assert pid in children_of(server.pid)


def test_gunicorn_reloads(serve: Callable[..., Gunicorn]) -> None:
    """SIGHUP: another address, then none."""
    gunicorn = serve("sync", metrics="127.0.0.1:0", soft_limit="300MiB").serving()
    first, _ = exporter(gunicorn)
    gunicorn.signal(signal.SIGHUP)
    gunicorn.wait_for("oomsafe guards 2 workers", 2)
    gunicorn.conf.write_text(conf("sync", metrics="[::1]:0", soft_limit="300MiB"))
    gunicorn.signal(signal.SIGHUP)
    second, _ = exporter(gunicorn, 2)
    assert "metrics on http://[::1]:" in gunicorn.log()
    assert not Path(f"/proc/{first}").exists()
    gunicorn.conf.write_text(conf("sync", soft_limit="300MiB"))
    gunicorn.signal(signal.SIGHUP)

    gunicorn.wait_for("metrics are off")

    assert not Path(f"/proc/{second}").exists()
    assert [line for text in QUIET for line in gunicorn.lines(text)] == []


def test_another_gunicorn_takes_over(serve: Callable[..., Gunicorn]) -> None:
    """SIGUSR2: the new one finds the address in use, says so, and has it when the old one is gone."""
    with_port = serve("sync", metrics="127.0.0.1:0", soft_limit="300MiB", settings='pidfile = "pid"').serving()
    pid, port = exporter(with_port)
    with_port.conf.write_text(conf("sync", metrics=f"127.0.0.1:{port}", soft_limit="300MiB", settings='pidfile = "pid"'))
    with_port.signal(signal.SIGUSR2)
    (line,) = with_port.wait_for("can't be served")
    assert f"Address already in use (by process {pid}, oomsafe-metrics)" in line
    assert exporter(with_port) == (pid, port)
    new = int((with_port.folder / "pid.2").read_text())
    until(lambda: len(with_port.workers(new)) == 2 + 1, "its workers, and what is to serve its metrics")

    with_port.signal(signal.SIGTERM)
    with_port.ended()

    another, same = exporter(with_port, 2)
    assert (another != pid, same) == (True, port)
    assert value(scrape(port), "oomsafe_workers", state="serving") == 2


@pytest.mark.parametrize("worker_class", ["sync", "gthread"])
def test_it_is_small_beside_a_supervisor_that_is_not(serve: Callable[..., Gunicorn], worker_class: str) -> None:
    """It is no fork: of 200 MiB that are preloaded it has nothing."""
    gunicorn = serve(worker_class, metrics="127.0.0.1:0", soft_limit="1GiB", settings="ballast = bytearray(b'x') * (200 << 20)").serving()
    pid, _ = exporter(gunicorn)

    sizes = [int(Path(f"/proc/{one}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20 for one in (gunicorn.pid, pid)]

    assert sizes[0] > 200
    assert sizes[1] < 20


@pytest.mark.parametrize("server", ["gunicorn", "uvicorn"])
def test_an_address_that_can_not_be_right_stops_the_start(
    serve: Callable[..., Gunicorn], serve_uvicorn: Callable[..., Uvicorn], server: str
) -> None:
    """One line."""
    env = {"OOMSAFE_METRICS": "9400"}
    started: Server = serve("sync", env=env) if server == "gunicorn" else serve_uvicorn(env=env)

    assert started.ended() == 1
    assert started.log().splitlines() == [
        "oomsafe: OOMSAFE_METRICS='9400' is neither HOST:PORT nor unix:/PATH; a correct example: OOMSAFE_METRICS=\"127.0.0.1:9400\""
    ]


@pytest.mark.parametrize(("start", "workers"), [(("-m", "oomsafe.uvicorn"), 1), (("-m", "uvicorn"), 2)], ids=["ours", "plain"])
def test_a_process_without_a_supervisor_of_ours_says_that_nothing_serves_them(
    serve_uvicorn: Callable[..., Uvicorn], start: tuple[str, ...], workers: int
) -> None:
    """And serves on, with the middleware alone too."""
    uvicorn = serve_uvicorn(start=start, workers=workers, metrics="127.0.0.1:0", app="uvicorn_apps:protected").up()

    lines = uvicorn.wait_for("metrics=127.0.0.1:0 does nothing in a process without a supervisor of oomsafe's: mount ", workers)

    assert len(lines) == workers
    assert not uvicorn.lines("metrics on")
