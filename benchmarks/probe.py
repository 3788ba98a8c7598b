"""How often oomsafe probe names the leaking line in a noisy mix, with its route and its bytes a call, and what a pool does meanwhile.

20 routes, 16 clients, 2 000 requests in the window (mix_apps.py), and as a Celery child's tasks. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import celery_nodes as nodes
from common import PORT, Server

HERE = Path(__file__).parent
PATHS = ["/leak", "/balloon", *(f"/free{number}" for number in range(18))]
EACH, CLIENTS, WINDOW = 64 << 10, 16, 2000

GUNICORN = [sys.executable, "-m", "gunicorn", "-c", "python:oomsafe.gunicorn.conf", "-b", f"127.0.0.1:{PORT}"]
UVICORN = [sys.executable, "-m", "oomsafe.uvicorn", "--port", PORT, "--log-level", "info"]

#: By name: how the pool is started, with two workers.
POOLS = {
    "gthread": [*GUNICORN, "-k", "gthread", "--threads", "8", "-w", "{workers}", "mix_apps:flask"],
    "uvicorn, coroutines": [*UVICORN, "--workers", "{workers}", "mix_apps:fast"],
    "uvicorn, thread pool": [*UVICORN, "--workers", "{workers}", "mix_apps:pool"],
}

CELERY = "Celery prefork"

#: What no module can be imported from: memray is not installed.
WITHOUT = "raise ImportError('not here')\n"


class Mix:
    """Clients that ask for all routes in no order."""

    def __init__(self, port: int, paths: list[str] = PATHS) -> None:
        self.served = self.failed = 0
        self._port, self._paths, self._stop = port, paths, threading.Event()
        self._threads = [threading.Thread(target=self._client, args=(number,), daemon=True) for number in range(CLIENTS)]
        for thread in self._threads:
            thread.start()

    def _client(self, number: int) -> None:
        choice, connection = random.Random(number), None
        while not self._stop.is_set():
            connection = connection or http.client.HTTPConnection("127.0.0.1", self._port, timeout=120)
            try:
                connection.request("GET", choice.choice(self._paths))
                answer = connection.getresponse()
                answer.read()
                self.served += 1
                self.failed += answer.status != 200
                closes = answer.will_close
            except (OSError, http.client.HTTPException):
                self.failed += 1
                closes = True
            if closes:
                connection.close()
                connection = None

    def stop(self) -> None:
        """And wait for the last answers."""
        self._stop.set()
        for thread in self._threads:
            thread.join(130)


@contextlib.contextmanager
def pool(command: list[str], workers: int = 2, leak: str = "bytes", memray: bool = True) -> Iterator[tuple[Server, Mix]]:
    """A pool under load."""
    with tempfile.TemporaryDirectory() as state:
        environ = {"LEAK": leak, "OOMSAFE_STATE": f"{state}/state", "OOMSAFE_SOFT_LIMIT": "2GiB"}
        argv = [part.replace("{workers}", str(workers)) for part in command]
        with Server(argv, environ=environ, files={} if memray else {"memray.py": WITHOUT}) as server:
            time.sleep(2)  # so that all workers have booted
            mix = Mix(server.port)
            try:
                yield server, mix
            finally:
                mix.stop()


@contextlib.contextmanager
def node(memray: bool) -> Iterator[tuple[nodes.Node, Tasks]]:
    """A Celery node with two children; about fifty tasks wait for it at any time."""
    with nodes.place("redis") as here:
        if not memray:
            (here.folder / "memray.py").write_text(WITHOUT)
        with nodes.Node(here, {}, {"soft_limit": "2GiB"}) as running:
            tasks = Tasks(here)
            try:
                running.until(lambda: (found := running.find_pool()) is not None and len(found.workers) == nodes.CHILDREN, "it works", 60)
                yield running, tasks
            finally:
                tasks.stop()


class Tasks:
    """Sends all tasks of the mix in no order."""

    failed = 0
    """None does: that is not counted."""

    def __init__(self, here: nodes.Place) -> None:
        self._here, self._stop = here, threading.Event()
        self._thread = threading.Thread(target=self._send, daemon=True)
        self._thread.start()

    def _send(self) -> None:
        choice = random.Random(0)
        while not self._stop.is_set():
            if self._here.waiting() > 50:
                time.sleep(0.02)
                continue
            for path in choice.choices(PATHS, k=20):
                self._here.send(f"mix.{path[1:]}", [()])

    def stop(self) -> None:
        """It sends no more."""
        self._stop.set()
        self._thread.join()


def probed(pid: int, *argv: str) -> dict[str, Any]:
    """The report; what went wrong is in it as `error`."""
    command = [sys.executable, "-m", "oomsafe", "probe", "--pool", str(pid), "--json", *argv]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(HERE.parent)})
    report: dict[str, Any] = json.loads(ended.stdout) if ended.stdout.strip() else {"error": ended.stderr.strip()}
    return report


def is_right(report: dict[str, Any], route: str, function: str) -> bool:
    """The first row is the leak's line, its route alone, and its bytes a call within a tenth."""
    rows = report.get("rows") or [{}]
    first = rows[0]
    named = first.get("where", "").endswith(f" in {function}") or (not first.get("function") and "mix_apps.py" in first.get("where", ""))
    return bool(report.get("brief")) and named and first.get("routes") == [route] and 0.9 <= first.get("each", 0) / EACH <= 1.1


def names(rounds: int, only: str) -> None:
    """How often it is right."""
    print("| pool | leak | with | right | bytes a call | slower | seconds | failed |")
    print("|---|---|---|---|---|---|---|---|")
    rows = [(name, "bytes", memray) for name in (*POOLS, CELERY) for memray in (True, False)]
    rows += [("gthread", "numpy", True), ("gthread", "c", True)]
    for name, leak, memray in rows:
        if not re.search(only, f"{name} {leak} {'memray' if memray else 'tracemalloc'}"):
            continue
        right, each, slower, seconds, failed, wrong = 0, [], [], [], 0, []
        for _ in range(rounds):
            with node(memray) if name == CELERY else pool(POOLS[name], leak=leak, memray=memray) as (server, mix):
                report = probed(server.process.pid, "--requests", str(WINDOW), "--seconds", "120")
            failed += mix.failed
            if is_right(report, "mix.leak" if name == CELERY else "GET /leak", "keep"):
                right += 1
            else:
                wrong.append(report.get("error") or report.get("line"))
            if report.get("rows"):
                each.append(report["rows"][0]["each"] / 1024)
                slower.append(report["window"]["slower"] or 0)
                seconds.append(report["window"]["seconds"])
        figures = " | ".join(f"{min(some):.1f}-{max(some):.1f}" if some else "" for some in (each, slower, seconds))
        print(f"| {name} | {leak} | {'memray' if memray else 'tracemalloc'} | {right} of {rounds} | {figures} | {failed} |", flush=True)
        for line in wrong:
            print(f"  wrong: {line}", flush=True)


def throughput(rounds: int) -> None:
    """Requests a second of a pool of four, before and during a probe of one of its workers."""
    print("| pool | with | during / before |")
    print("|---|---|---|")
    for name, command in POOLS.items():
        for memray in (True, False):
            ratios = []
            for _ in range(rounds):
                with pool(command, workers=4, memray=memray) as (server, mix):
                    time.sleep(3)
                    before, at = mix.served, time.monotonic()
                    time.sleep(10)
                    rate = (mix.served - before) / (time.monotonic() - at)
                    asking = threading.Thread(target=probed, args=(server.process.pid, "--requests", "1000000", "--seconds", "14"))
                    asking.start()
                    server.until(lambda server=server: "traces its allocations" in server.log(), "it traces", 30)
                    before, at = mix.served, time.monotonic()
                    time.sleep(10)
                    ratios.append((mix.served - before) / (time.monotonic() - at) / rate)
                    asking.join()
            ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
            print(f"| {name} | {'memray' if memray else 'tracemalloc'} | {ratio} |", flush=True)


def main() -> None:
    """Both parts, or one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--part", choices=["names", "throughput"])
    parser.add_argument("--only", default="", help="rows whose pool, leak and tracer match this")
    arguments = parser.parse_args()
    if arguments.part != "throughput":
        names(arguments.rounds, arguments.only)
    if arguments.part != "names":
        throughput(min(arguments.rounds, 5))


if __name__ == "__main__":
    main()
