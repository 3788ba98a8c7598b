"""A leak of 256 KiB a request under a limit of 200 MiB a worker: peak of one worker, requests/s, p99, failed requests.

Each row is a server with two workers and its own way to keep a worker below 200 MiB. See benchmarks/README.md.
"""

from __future__ import annotations

import re
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import common
from common import MIB, PORT, Server

LIMIT, WORKERS = 200, 2

#: In every gunicorn's configuration: the exact peak of each worker, as the kernel has it when the worker ends.
PEAKS = """
control_socket_disable = True

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

OOMSAFE = f"""
import oomsafe.gunicorn
oomsafe.gunicorn.install(globals(), soft_limit="{LIMIT}MiB", min_lifetime=0)
"""


@dataclass(frozen=True)
class Row:
    """How a server is started, and the row that its requests/s are compared with."""

    argv: list[str]
    conf: str = ""
    baseline: str | None = None

    def server(self) -> Server:
        """Start it."""
        return Server(self.argv, files={"conf.py": self.conf})


def gunicorn(worker_class: str, conf: str, baseline: str | None = None) -> Row:
    """A gunicorn with one of the two configurations above."""
    app = "apps:asgi" if worker_class in ("asgi", "uvicorn_worker.UvicornWorker") else "apps:wsgi"
    threads = "4" if worker_class == "gthread" else "1"
    argv = [sys.executable, "-m", "gunicorn", "-b", f"127.0.0.1:{PORT}", "-c", "conf.py"]
    return Row([*argv, "-w", str(WORKERS), "-k", worker_class, "--threads", threads, app], PEAKS + conf, baseline)


def uvicorn() -> Row:
    """A uvicorn, with oomsafe's supervisor."""
    policy = ["env", f"OOMSAFE_SOFT_LIMIT={LIMIT}MiB", "OOMSAFE_MIN_LIFETIME=0"]
    argv = [sys.executable, "-m", "oomsafe.uvicorn", "--port", PORT, "--workers", str(WORKERS), "--no-access-log", "--log-level", "warning"]
    return Row([*policy, *argv, "apps:asgi"])


def uwsgi(*more: str) -> Row:
    """A uWSGI with its own limit."""
    argv = [common.tool("uwsgi"), "--http-socket", f"127.0.0.1:{PORT}", "--master", "--die-on-term", "--disable-logging", "--need-app"]
    argv += ["--add-header", "Connection: close"]  # which it does; unless told, wrk counts it as an error
    argv += ["--virtualenv", sys.prefix, "--pythonpath", str(common.HERE), "--module", "apps:wsgi"]
    return Row([*argv, "--processes", str(WORKERS), "--reload-on-rss", str(LIMIT), *more])


def granian() -> Row:
    """A granian with its own limit, looking as often as it can."""
    argv = [common.tool("granian"), "--interface", "wsgi", "--host", "127.0.0.1", "--port", PORT, "--workers", str(WORKERS)]
    return Row([*argv, "--workers-max-rss", str(LIMIT), "--rss-sample-interval", "1", "apps:wsgi"])


def rows() -> dict[str, Row]:
    """All of them, by the name that the table shows."""
    found = {}
    for worker_class in ("sync", "gthread", "gevent", "asgi"):
        shown = f"gunicorn {worker_class}{' (4 threads)' if worker_class == 'gthread' else ''}"
        found[f"{shown} + psutil hook"] = gunicorn(worker_class, HOOK)
        found[f"{shown} + oomsafe"] = gunicorn(worker_class, OOMSAFE, f"{shown} + psutil hook")
    # uvicorn's worker class never calls post_request: there is no hook to compare with
    found["gunicorn UvicornWorker + oomsafe"] = gunicorn("uvicorn_worker.UvicornWorker", OOMSAFE)
    found["uvicorn --workers 2 + oomsafe"] = uvicorn()
    found[f"uWSGI --reload-on-rss {LIMIT}"] = uwsgi()
    found[f"uWSGI --reload-on-rss {LIMIT} --min-worker-lifetime 0"] = uwsgi("--min-worker-lifetime", "0")
    found[f"granian wsgi --workers-max-rss {LIMIT}"] = granian()
    return found


class Watch(threading.Thread):
    """Looks every 20 ms at all that a server has forked: who came, who is gone, and how large each was at most."""

    def __init__(self, server: Server) -> None:
        super().__init__(daemon=True)
        self.peaks: dict[int, int] = {}
        """By pid, VmHWM in bytes."""
        self._server = server
        self._done = threading.Event()

    def run(self) -> None:
        while not self._done.wait(0.02):
            for pid in self._server.workers():
                self.peaks[pid] = max(self.peaks.get(pid, 0), common.status_of(pid, "VmHWM"))

    def stop(self) -> None:
        """No more looks."""
        self._done.set()
        self.join()


def measure(row: Row, seconds: float) -> dict[str, float]:
    """One round of one row."""
    with row.server() as server:
        server.settle(WORKERS)
        watch = Watch(server)
        watch.start()
        load = common.wrk(server, "/leak", seconds)
        watch.stop()
        gone = len(watch.peaks.keys() - server.workers())
        server.stop()
        peak = max([*watch.peaks.values(), *recorded(server.folder / "peaks")])
    return {"peak": peak / MIB, "rate": load.rate, "p99": load.p99, "failed": load.failed, "recycles": gone, "requests": load.requests}


def recorded(peaks: Path) -> list[int]:
    """What the workers themselves wrote at their end, in bytes."""
    return [int(kib) * 1024 for kib in re.findall(r"VmHWM:\s+(\d+) kB", peaks.read_text())] if peaks.exists() else []


def line(name: str, row: Row, seen: dict[str, list[dict[str, float]]]) -> list[str]:
    """One line of the table."""
    mine = seen[name]
    ratio = common.shown(common.ratios(mine, seen[row.baseline], "rate"), 2) if row.baseline in seen else ""
    figures = {key: common.column(mine, key) for key in ("peak", "rate", "p99", "recycles")}
    failed, requests = (f"{sum(common.column(mine, key)):,.0f}".replace(",", " ") for key in ("failed", "requests"))
    return [
        name, f"{max(figures['peak']):.0f}", common.shown(figures["rate"]), ratio, common.shown(figures["p99"]),
        f"{failed} / {requests}", common.shown(figures["recycles"]),
    ]  # fmt: skip


def main() -> None:
    """Run the rounds, print the table."""
    parser = common.arguments(__doc__ or "", rounds=3, seconds=8)
    parser.add_argument("--only", default="", help="only the rows that this regular expression finds")
    options = parser.parse_args()
    about = common.machine("gunicorn", "gevent", "uvicorn", "uvicorn-worker", "uwsgi", "granian", "psutil", "oomsafe")
    chosen = {name: row for name, row in rows().items() if re.search(options.only, name)}
    with common.quiet_interrupt():
        seen = common.interleaved(options.rounds, list(chosen), lambda name: measure(chosen[name], options.seconds))
    head = ["", "peak of one worker, MiB", "requests/s", "against the hook", "p99, ms", "failed / requests", "recycles a round"]
    text = common.table(head, [line(name, row, seen) for name, row in chosen.items()])
    title = f"Leak of 256 KiB a request, limit {LIMIT} MiB a worker, {WORKERS} workers, wrk -t1 -c16, {options.seconds:g} s"
    common.report(title, about, [(f"{options.rounds} rounds, median (min-max); peak is the largest", text)], seen, options.json)


if __name__ == "__main__":
    main()
