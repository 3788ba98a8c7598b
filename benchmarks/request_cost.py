"""What a middleware costs a request: microseconds in process, and requests/s behind a server on a core of its own.

Every contestant is made to prove that it has counted the requests and sent its headers. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import common
import wrapped
from common import PORT, Server

#: Requests of one timed batch; batches of one repetition, of which the median counts; repetitions, of which the least counts.
BATCH, BATCHES, REPETITIONS = 1000, 9, 7

SCOPE: dict[str, Any] = {
    "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "GET", "scheme": "http",
    "path": "/", "raw_path": b"/", "query_string": b"", "root_path": "", "client": ("127.0.0.1", 40000), "server": ("127.0.0.1", 8000),
    "headers": [(b"host", b"127.0.0.1:8000"), (b"accept", b"*/*")],
}  # fmt: skip
ENVIRON: dict[str, Any] = {
    "REQUEST_METHOD": "GET", "SCRIPT_NAME": "", "PATH_INFO": "/", "QUERY_STRING": "", "SERVER_NAME": "127.0.0.1", "SERVER_PORT": "8000",
    "SERVER_PROTOCOL": "HTTP/1.1", "HTTP_HOST": "127.0.0.1:8000", "HTTP_ACCEPT": "*/*", "wsgi.url_scheme": "http",
}  # fmt: skip

Batch = Callable[[int], float]


# --- in process


def asgi_batch(app: Any, loop: asyncio.AbstractEventLoop) -> Batch:
    """A function that awaits `app` so many times, and returns the microseconds of one."""

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        pass

    async def run(requests: int) -> float:
        started = time.thread_time()
        for _ in range(requests):
            await app(SCOPE.copy(), receive, send)
        return (time.thread_time() - started) / requests * 1e6

    return lambda requests: loop.run_until_complete(run(requests))


def wsgi_batch(app: Any) -> Batch:
    """The same for WSGI: as a server does, it reads the body and closes it."""

    def start_response(status: str, headers: Any, exc_info: Any = None) -> None:
        pass

    def run(requests: int) -> float:
        started = time.thread_time()
        for _ in range(requests):
            body = app(ENVIRON.copy(), start_response)
            for _ in body:
                pass
            if hasattr(body, "close"):
                body.close()
        return (time.thread_time() - started) / requests * 1e6

    return run


def batches(kind: str, loop: asyncio.AbstractEventLoop) -> dict[str, Batch]:
    """Every contestant's, warmed up, and proven to work."""
    found: dict[str, Batch] = {}
    for name, wrap in (wrapped.ASGI if kind == "asgi" else wrapped.WSGI).items():
        app = wrap(wrapped.hello_starlette() if kind == "asgi" else wrapped.hello_wsgi)
        before = wrapped.counted(name)
        found[name] = asgi_batch(app, loop) if kind == "asgi" else wsgi_batch(app)
        found[name](BATCH)
        prove(name, wrapped.counted(name) - before, BATCH)
        prove_headers(name, headers_of(app, kind, loop))
    return found


def headers_of(app: Any, kind: str, loop: asyncio.AbstractEventLoop) -> set[str]:
    """The names of the headers that one response has."""
    seen: set[str] = set()

    async def send(message: Any) -> None:
        seen.update(name.decode().lower() for name, _ in message.get("headers", ()))

    if kind == "asgi":
        loop.run_until_complete(app(SCOPE.copy(), None, send))
    else:
        body = app(ENVIRON.copy(), lambda status, headers, *_: seen.update(name.lower() for name, _ in headers))
        if hasattr(body, "close"):
            body.close()
    return seen


def prove(name: str, counted: int, requests: int) -> None:
    """Raise unless a contestant that counts has counted so many."""
    if name.startswith("oomsafe") or name in ("starlette_exporter", "prometheus-fastapi-instrumentator"):
        assert counted >= requests, f"{name} has counted {counted} of {requests} requests: it does not do its work"


def prove_headers(name: str, headers: set[str]) -> None:
    """Raise unless memory headers are there exactly where they are promised."""
    assert ("x-memory-rss" in headers) == ("headers" in name), f"{name} sent {sorted(headers)}"


def in_process(kind: str) -> dict[str, list[float]]:
    """By contestant, the median of each repetition, in microseconds a request."""
    loop = asyncio.new_event_loop()
    runs = batches(kind, loop)
    gc.freeze()
    medians: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(REPETITIONS):
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(BATCHES):
            for name, run in runs.items():
                times[name].append(run(BATCH))
        for name, values in times.items():
            medians[name].append(statistics.median(values))
    loop.close()
    return medians


def in_process_table(medians: dict[str, list[float]], counts: dict[str, dict[str, float]]) -> str:
    """Microseconds a request, what that is above bare, and what was counted."""
    least = {name: min(values) for name, values in medians.items()}
    rows = [
        [
            name,
            f"{figure:.2f}",
            "" if name == "bare" else f"{figure - least['bare']:+.2f}",
            f"{calls:.1f}" if (calls := counts["system calls"].get(name)) is not None else "",
            f"{executed / 1000:.1f}" if (executed := counts["instructions"].get(name)) is not None else "",
        ]
        for name, figure in least.items()
    ]
    return common.table(["", "us a request", "added, us", "system calls a request", "thousand instructions a request"], rows)


# --- what other load does not disturb


def syscalls(kind: str, name: str) -> float | None:
    """System calls a request that one contestant makes in process, by strace; None without it."""
    with tempfile.NamedTemporaryFile("r") as counts:

        def made(requests: int) -> int:
            _called(["strace", "-f", "-c", "-o", counts.name], kind, name, requests)
            return _found(r"^\s*100\.00.*?(\d+)(?:\s+\d+)?\s+total", counts.name)

        return _for_one("strace", made)


def instructions(kind: str, name: str) -> float | None:
    """Instructions a request outside the kernel, by valgrind; None without it."""
    with tempfile.NamedTemporaryFile("r") as counts:

        def made(requests: int) -> int:
            _called(["valgrind", "--tool=cachegrind", "--cache-sim=no", f"--cachegrind-out-file={counts.name}"], kind, name, requests)
            return _found(r"^summary: (\d+)", counts.name)

        return _for_one("valgrind", made)


def _for_one(tool: str, made: Callable[[int], int]) -> float | None:
    """The difference that a request makes; None where this tool is not there, or may not trace here (ptrace)."""
    if shutil.which(tool) is None:
        return None
    try:
        return (made(2000) - made(1000)) / 1000
    except (subprocess.SubprocessError, OSError):
        return None


def _called(tool: list[str], kind: str, name: str, requests: int) -> None:
    command = [*tool, sys.executable, __file__, "--only-call", kind, name, str(requests)]
    environ = {**os.environ, "PYTHONHASHSEED": "0"}  # else dicts collide at other places in each run
    subprocess.run(command, check=True, timeout=6 * common.PATIENCE, capture_output=True, env=environ)


def _found(pattern: str, path: str) -> int:
    found = re.search(pattern, Path(path).read_text(), re.MULTILINE)
    assert found is not None, f"no count in {path}"
    return int(found[1])


def only_call(kind: str, name: str, requests: int) -> None:
    """What is traced."""
    loop = asyncio.new_event_loop()
    app = (wrapped.ASGI if kind == "asgi" else wrapped.WSGI)[name](wrapped.hello_starlette() if kind == "asgi" else wrapped.hello_wsgi)
    (asgi_batch(app, loop) if kind == "asgi" else wsgi_batch(app))(requests)


# --- behind a server


def uvicorn(name: str) -> Server:
    """One uvicorn worker on the first core."""
    argv = [sys.executable, "-m", "uvicorn", "--factory", "wrapped:asgi_app", "--host", "127.0.0.1", "--port", PORT]
    return Server([*argv, "--no-access-log", "--log-level", "warning"], environ={"BENCHMARK": name}, core=0)


PSUTIL_CONF = """
import psutil

def post_request(worker, req, environ, resp):
    if psutil.Process().memory_info().rss > 4 << 30:
        worker.alive = False
"""

OOMSAFE_CONF = """
import oomsafe.gunicorn
oomsafe.gunicorn.install(globals(), soft_limit="4GiB", headers=%r)
"""

GUNICORN = {
    "bare": "",
    "oomsafe": OOMSAFE_CONF % False,
    "oomsafe, headers": OOMSAFE_CONF % True,
    "psutil post_request hook": PSUTIL_CONF,
}


def gunicorn(name: str) -> Server:
    """One sync worker, and its master, on the first core."""
    argv = [sys.executable, "-m", "gunicorn", "-b", f"127.0.0.1:{PORT}", "-c", "conf.py", "wrapped:hello_wsgi"]
    conf = f"control_socket_disable = True\n{GUNICORN[name]}"
    return Server(argv, files={"conf.py": conf}, core=0)


def served(start: Callable[[str], Server], seconds: float, name: str) -> dict[str, float]:
    """One round: a fresh server, a second of warming up, the load, the proof."""
    with start(name) as server:
        warm = common.wrk(server, "/", 1, core=1)
        pids = [server.pid, *server.forked()]
        before = common.cpu_seconds(pids)
        load = common.wrk(server, "/", seconds, core=1)
        cpu = (common.cpu_seconds(pids) - before) / load.requests
        prove_headers(name, {header.lower() for header, _ in server.get().getheaders()})
        prove(name, int(server.get("/count").body), load.requests + warm.requests)  # type: ignore[attr-defined]
    # what one core that does nothing else can serve: unlike the rate, it hardly moves when others use the core too
    return {"rate": load.rate, "cpu_us": cpu * 1e6, "cpu_rate": 1 / cpu, "p99": load.p99, "failed": load.failed}


def served_table(seen: dict[str, list[dict[str, float]]]) -> str:
    """Requests/s and CPU time, and each against bare in the same round."""
    rows = [
        [
            name,
            common.shown(common.column(mine, "rate")),
            "" if name == "bare" else common.shown(common.ratios(mine, seen["bare"], "rate"), 2),
            common.shown(common.column(mine, "cpu_us")),
            "" if name == "bare" else common.shown(common.ratios(mine, seen["bare"], "cpu_rate"), 2),
            common.shown(common.column(mine, "p99"), 1),
            f"{sum(common.column(mine, 'failed')):.0f}",
        ]
        for name, mine in seen.items()
    ]
    return common.table(["", "requests/s", "against bare", "server's CPU, us a request", "bare's over it", "p99, ms", "failed"], rows)


def parse() -> argparse.Namespace:
    """The options."""
    parser = common.arguments(__doc__ or "", rounds=7, seconds=4)
    parser.add_argument("--part", choices=("process", "uvicorn", "gunicorn"), action="append", help="only this; may be repeated")
    parser.add_argument("--only-call", nargs=3, metavar=("KIND", "NAME", "REQUESTS"), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure, print the tables."""
    options = parse()
    if options.only_call:
        kind, name, requests = options.only_call
        only_call(kind, name, int(requests))
        return
    about = common.machine(
        "starlette",
        "uvicorn",
        "uvloop",
        "httptools",
        "gunicorn",
        "psutil",
        "starlette_exporter",
        "prometheus-fastapi-instrumentator",
        "oomsafe",
    )
    raw: dict[str, Any] = {}
    parts: list[tuple[str, str]] = []
    with common.quiet_interrupt():
        for part in options.part or ("process", "uvicorn", "gunicorn"):
            for heading, text, rounds in measure(part, options):
                parts.append((heading, text))
                raw[heading] = rounds
    common.report("What a middleware costs a request", about, parts, raw, options.json)


def measure(part: str, options: argparse.Namespace) -> list[tuple[str, str, Any]]:
    """The tables of one part, each with its heading and the figures of every round."""
    if part == "process":
        return [_process_part(kind, app) for kind, app in (("wsgi", "a WSGI hello"), ("asgi", "a Starlette hello"))]
    start, names = (uvicorn, wrapped.ASGI) if part == "uvicorn" else (gunicorn, GUNICORN)
    seen = common.interleaved(options.rounds, list(names), partial(served, start, options.seconds))
    app = "Starlette hello, 1 uvicorn worker" if part == "uvicorn" else "WSGI hello, 1 gunicorn sync worker"
    heading = f"{app} on core 0, wrk -t1 -c16 on core 1: {options.rounds} rounds of {options.seconds:g} s, median (min-max)"
    return [(heading, served_table(seen), seen)]


def _process_part(kind: str, app: str) -> tuple[str, str, Any]:
    medians = in_process(kind)
    counts = {
        what: {name: found for name in medians if (found := count(kind, name)) is not None}
        for what, count in (("system calls", syscalls), ("instructions", instructions))
    }
    heading = f"{app} called in process: least of {REPETITIONS} medians of {BATCHES} batches of {BATCH}"
    return heading, in_process_table(medians, counts), {"us": medians, **counts}


if __name__ == "__main__":
    main()
