"""A leak of 256 KiB a request under a limit of 200 MiB a worker: peak of one worker, longest wait, requests/s, p99, failed requests.

Each row is a server with two workers and its own way to keep a worker below 200 MiB; once with memory to spare, once in a memory cgroup
that holds two of them and little more. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import functools
import re
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import common
from common import MIB, PORT, Server, Watch
from contestants import NOT, OOMSAFE, STOCK, WORKERS, ServerClass, Tuning, classes, loops

from oomsafe.kernel.sandbox import Sandbox

#: MiB of one worker; of the cgroup, for all of them and their supervisor.
LIMIT, CGROUP = 200, 512

#: Bytes that each request keeps.
LEAK = 256 << 10

#: Requests that a worker answers where it is recycled by their number: it begins with some 35 MiB, and gunicorn adds up to a tenth.
REQUESTS = 600

#: Requests/s of the clients that verify and leak nothing, beside wrk: what they wait is what anybody waits.
BESIDE = 20.0

#: In the cgroup no worker may have more, as a share of its limit.
OVERSHOOT = 1.1

#: In every gunicorn's configuration: the exact peak of each worker, as the kernel has it when the worker ends.
PEAKS = """
def worker_exit(server, worker):
    with open("/proc/self/status") as status, open("peaks", "a") as peaks:
        peaks.write(next(line for line in status if line.startswith("VmHWM")))
"""

#: The hook that everybody copies.
HOOK = f"""
import psutil

def post_request(worker, req, environ, resp):
    if psutil.Process().memory_info().rss > {LIMIT} * 1024 * 1024:
        worker.alive = False
"""


@dataclass(frozen=True)
class Row:
    """How a server is started, and the row that its requests/s are compared with."""

    start: Callable[[int | None], Server]
    """With the limit of a cgroup of its own in bytes; None: with memory to spare."""
    baseline: str | None = None
    bounded: bool = True
    """Whether anything keeps its workers small: who has nothing takes part in the cgroup only."""


def served(cls: ServerClass, way: str, conf: str = "") -> Callable[[int | None], Server]:
    """How a gunicorn or uvicorn is started."""
    tuning = Tuning(0, REQUESTS, LEAK)
    policy = {"soft_limit": f"{LIMIT}MiB", "min_lifetime": 0}
    return lambda memory: cls.server(way, tuning, policy=policy, conf=PEAKS + conf, memory=memory)


def uwsgi(*more: str) -> Row:
    """A uWSGI with its own limit."""
    argv = ["--http-socket", f"127.0.0.1:{PORT}", "--master", "--die-on-term", "--disable-logging", "--need-app"]
    argv += ["--add-header", "Connection: close"]  # which it does; unless told, wrk counts it as an error
    argv += ["--virtualenv", sys.prefix, "--pythonpath", str(common.HERE), "--module", "echo_apps:wsgi"]
    return Row(functools.partial(foreign, "uwsgi", [*argv, "--processes", str(WORKERS), "--reload-on-rss", str(LIMIT), *more]))


def granian() -> Row:
    """A granian with its own limit, looking as often as it can."""
    argv = ["--interface", "wsgi", "--host", "127.0.0.1", "--port", PORT, "--workers", str(WORKERS)]
    argv += ["--workers-max-rss", str(LIMIT), "--rss-sample-interval", "1", "echo_apps:wsgi"]
    return Row(functools.partial(foreign, "granian", argv))


def foreign(name: str, argv: list[str], memory: int | None) -> Server:
    """A server that oomsafe has nothing to do with."""
    return Server([common.tool(name), *argv], environ={"LEAK_BYTES": str(LEAK)}, memory=memory)


def rows() -> dict[str, Row]:
    """All of them, by the name that the table shows."""
    found = {}
    for cls in classes(loops("auto")):
        # only gunicorn's own classes call post_request
        hook = f"{cls.shown} + psutil hook" if not cls.uvicorn and "UvicornWorker" not in cls.shown else None
        found[cls.shown] = Row(served(cls, NOT), hook, bounded=False)
        found[f"{cls.shown} + {STOCK}"] = Row(served(cls, STOCK), hook)
        if hook:
            found[hook] = Row(served(cls, NOT, HOOK))
        found[f"{cls.shown} + oomsafe"] = Row(served(cls, OOMSAFE), hook)
    found[f"uWSGI --reload-on-rss {LIMIT}"] = uwsgi()
    found[f"uWSGI --reload-on-rss {LIMIT} --min-worker-lifetime 0"] = uwsgi("--min-worker-lifetime", "0")
    found[f"granian wsgi --workers-max-rss {LIMIT}"] = granian()
    return found


def measure(row: Row, seconds: float, memory: int | None) -> dict[str, float]:
    """One round of one row."""
    with row.start(memory) as server:
        server.settle(WORKERS)
        watch = Watch(server)
        watch.start()
        with ThreadPoolExecutor(1) as beside:
            asking = beside.submit(common.ask, server, "/", seconds, BESIDE)
            load = common.wrk(server, "/leak?wrk", seconds)
            honest = asking.result()
        watch.stop()
        gone = len(watch.peaks.keys() - server.forked())
        killed, ended = server.kernel_kills(), not server.alive
        server.end()
        peak = max([*watch.peaks.values(), *recorded(server.folder / "peaks")])
    return {
        "peak": peak / MIB, "longest": honest["longest"], "rate": load.rate, "p99": load.p99, "recycles": gone,
        "failed": load.failed + honest["failed"], "requests": load.requests + honest["requests"], "killed": killed, "ended": ended,
    }  # fmt: skip


def recorded(peaks: Path) -> list[int]:
    """What the workers themselves wrote at their end, in bytes."""
    return [int(kib) * 1024 for kib in re.findall(r"VmHWM:\s+(\d+) kB", peaks.read_text())] if peaks.exists() else []


def line(name: str, row: Row, seen: dict[str, list[dict[str, float]]]) -> list[str]:
    """One line of the table."""
    mine = seen[name]
    ratio = common.shown(common.ratios(mine, seen[row.baseline], "rate"), 2) if row.baseline in seen else ""
    figures = {key: common.column(mine, key) for key in ("peak", "longest", "rate", "p99", "recycles")}
    failed, requests = (f"{sum(common.column(mine, key)):,.0f}".replace(",", " ") for key in ("failed", "requests"))
    return [
        name, f"{max(figures['peak']):.0f}", common.shown(figures["longest"], 1), common.shown(figures["rate"]), ratio,
        common.shown(figures["p99"]), f"{failed} / {requests}", common.shown(figures["recycles"]),
    ]  # fmt: skip


def held(name: str, seen: dict[str, list[dict[str, float]]]) -> list[str]:
    """What the cgroup's table has more: the kernel's kills in all rounds, and whether each round kept the goal."""
    mine = seen[name]
    killed = f"{sum(common.column(mine, 'killed')):.0f}" + (" (THE SUPERVISOR ENDED)" if any(common.column(mine, "ended")) else "")
    kept = all(row["peak"] <= OVERSHOOT * LIMIT and not (row["killed"] or row["ended"] or row["failed"]) for row in mine)
    return [killed, "yes" if kept else "NO"]


HEAD = [
    "",
    "peak of one worker, MiB",
    "longest wait, s",
    "requests/s",
    "against the hook",
    "p99, ms",
    "failed / requests",
    "recycles a round",
]

Measured = tuple[str, str, dict[str, list[dict[str, float]]]]


def half(options: argparse.Namespace, memory: int | None) -> Measured:
    """The heading, the table and the rounds of one half."""
    bounded = {name: row for name, row in rows().items() if row.bounded or memory is not None}
    chosen = {name: row for name, row in bounded.items() if re.search(options.only, name)}
    seen = common.interleaved(options.rounds, list(chosen), lambda name: measure(chosen[name], options.seconds, memory))
    rounds = f"{options.rounds} rounds, median (min-max); peak is the largest"
    if memory is None:
        return f"With memory to spare: {rounds}", common.table(HEAD, [line(name, row, seen) for name, row in chosen.items()]), seen
    head = [*HEAD, "kernel kills", f"peak <= {OVERSHOOT:g} x, 0 killed, 0 failed"]
    text = common.table(head, [line(name, row, seen) + held(name, seen) for name, row in chosen.items()])
    return f"In a memory cgroup of {CGROUP} MiB: {rounds}", text, seen


def without_cgroup() -> str | None:
    """Why no memory cgroup can be made here; None: one can."""
    try:
        with Sandbox("oomsafe-benchmark-try", CGROUP * MIB):
            return None
    except OSError as error:
        return str(error)


def main() -> None:
    """Run the rounds, print the tables."""
    parser = common.arguments(__doc__ or "", rounds=3, seconds=8)
    parser.add_argument("--only", default="", help="only the rows that this regular expression finds")
    parser.add_argument("--part", choices=["free", "cgroup", "both"], default="both", help="free: with memory to spare")
    options = parser.parse_args()
    about = common.machine("gunicorn", "gevent", "uvicorn", "uvicorn-worker", "uwsgi", "granian", "psutil", "oomsafe")
    parts, raw = [], {}
    why = None if options.part == "free" else without_cgroup()
    with common.quiet_interrupt():
        for part, memory in (("free", None), ("cgroup", CGROUP * MIB)):
            if options.part not in (part, "both"):
                continue
            if memory is not None and why is not None:
                parts.append((f"In a memory cgroup of {CGROUP} MiB", f"Skipped: none can be made here: {why}"))
                continue
            heading, text, raw[part] = half(options, memory)
            parts.append((heading, text))
    title = f"Leak of 256 KiB a request, limit {LIMIT} MiB a worker, {WORKERS} workers, wrk -t1 -c16, {options.seconds:g} s"
    common.report(title, about, parts, raw, options.json)


if __name__ == "__main__":
    main()
