"""A preloaded heap over an hour's worth of requests: PSS of the pool, kernel kills, failed requests.

Three workers that share 700 MiB of Python objects, in a memory cgroup of 2 000 MiB. See benchmarks/README.md.
"""

from __future__ import annotations

import re
import signal
import statistics
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import common
from common import MIB, PORT, Server

from oomsafe.kernel.process import shared_out
from oomsafe.kernel.sandbox import Sandbox

WORKERS, CGROUP, CLIENTS = 3, 2000, 4

#: Seconds until it must answer: it has 700 MiB to load.
common.PATIENCE = 120

#: An hour at ten a second.
REQUESTS = 36_000

#: The pool is looked at so often: every five minutes' worth.
LOOKS = 12

CONF = f"""
preload_app = True
workers = {WORKERS}
control_socket_disable = True
"""

INSTALL = "import oomsafe.gunicorn\noomsafe.gunicorn.install(globals(){more})\n"

ROWS = {
    "gunicorn": "",
    "gunicorn, max_requests 7000": "max_requests = 7000\nmax_requests_jitter = 700\n",
    "oomsafe, freeze_preload=False": INSTALL.format(more=", freeze_preload=False"),
    "oomsafe": INSTALL.format(more=""),
}


class Clients:
    """Ask for so many answers, as fast as they come."""

    def __init__(self, server: Server, requests: int) -> None:
        self.failed, self.longest, self.pss = 0, 0.0, [0] * LOOKS
        self._server = server
        self._left = iter(range(requests))
        self._looks = {requests * look // LOOKS - 1: look - 1 for look in range(1, LOOKS + 1)}
        self._lock = threading.Lock()

    def run(self) -> None:
        """Until all are answered or failed."""
        threads = [threading.Thread(target=self._ask) for _ in range(CLIENTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _ask(self) -> None:
        while True:
            with self._lock:
                number = next(self._left, None)
            if number is None:
                return
            began, good = time.monotonic(), False
            with suppress(OSError, common.http.client.HTTPException):
                good = self._server.get().status == 200
            with self._lock:
                self.failed += not good
                self.longest = max(self.longest, time.monotonic() - began)
            if number in self._looks:
                self.pss[self._looks[number]] = pool_pss(self._server)


def pool_pss(server: Server) -> int:
    """Of the master and its workers, in bytes: what they share counts once."""
    return sum(figures[0] for figures in map(shared_out, server.session()) if figures is not None)


class Peak(threading.Thread):
    """The cgroup's usage, looked at every 10 ms."""

    def __init__(self, sandbox: Sandbox) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        name = "memory.usage_in_bytes" if sandbox.cgroup.version == 1 else "memory.current"
        self._file = Path(sandbox.cgroup.path, name)
        self._done = threading.Event()

    def run(self) -> None:
        while not self._done.wait(0.01):
            self.peak = max(self.peak, int(self._file.read_text()))

    def stop(self) -> int:
        """No more looks; bytes."""
        self._done.set()
        self.join()
        return self.peak


def measure(conf: str, requests: int) -> dict[str, float]:
    """One round of one row: the load, then a reload, then the stop."""
    argv = [sys.executable, "-m", "gunicorn", "-b", f"127.0.0.1:{PORT}", "-c", "conf.py", "preloaded_app:app"]
    with Server(argv, files={"conf.py": CONF + conf}, memory=CGROUP * MIB) as server:
        assert server.sandbox is not None
        server.settle(WORKERS)
        seen = server.forked()
        peak, clients = Peak(server.sandbox), Clients(server, requests)
        peak.start()
        begun = time.monotonic()
        clients.run()
        seconds = time.monotonic() - begun
        kills = server.kernel_kills()
        gone = len(server.lines("Worker exiting"))
        old = server.forked()
        server.process.send_signal(signal.SIGHUP)
        until_gone(old)
        server.process.terminate()
        until_gone(server.forked() | seen)
        top = peak.stop()
        after = server.kernel_kills() - kills
    pss = [look / MIB for look in clients.pss]
    return {
        "pss": statistics.mean(pss), "last": pss[-1], "peak": top / MIB, "kills": kills, "kills after": after, "recycles": gone,
        "failed": clients.failed, "longest": clients.longest, "seconds": seconds, "requests": requests,
    }  # fmt: skip


def until_gone(pids: set[int]) -> None:
    """Wait until none of these runs."""
    deadline = time.monotonic() + 60
    while any(common.status_of(pid, "VmRSS") for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)


def main() -> None:
    """Run the rounds, print the table."""
    parser = common.arguments(__doc__ or "", rounds=1)
    parser.add_argument("--requests", type=int, default=REQUESTS, help=f"default {REQUESTS}")
    parser.add_argument("--only", default="", help="only the rows that this regular expression finds")
    options = parser.parse_args()
    about = common.machine("gunicorn", "oomsafe")
    chosen = {name: conf for name, conf in ROWS.items() if re.search(options.only, name)}
    with common.quiet_interrupt():
        seen = common.interleaved(options.rounds, list(chosen), lambda name: measure(chosen[name], options.requests))
    columns = {
        "pss": "PSS of the pool, mean, MiB", "last": "at the end, MiB", "peak": "peak of the cgroup, MiB",
        "kills": "kernel kills under load",
        "kills after": "at a reload and a stop", "recycles": "workers ended", "failed": "failed", "seconds": "s",
    }  # fmt: skip
    rows = [[name, *(common.shown(common.column(seen[name], key)) for key in columns)] for name in chosen]
    waits = [common.shown(common.column(seen[name], "longest"), 2) for name in chosen]
    table = common.table(["", *columns.values(), "longest wait, s"], [[*row, wait] for row, wait in zip(rows, waits, strict=True)])
    title = f"{WORKERS} workers, 700 MiB preloaded, {CGROUP} MiB; {options.requests} requests a round, {CLIENTS} at once"
    common.report(title, about, [(f"{options.rounds} rounds, median (min-max)", table)], seen, options.json)


if __name__ == "__main__":
    main()
