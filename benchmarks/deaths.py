"""Workers ended in several ways: what each end is called, and how long that takes. Real kernel kills. See benchmarks/README.md."""

from __future__ import annotations

import argparse
import contextlib
import http.client
import os
import signal
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable

from common import MIB, PORT, Server

from oomsafe.policy.state import State

#: Workers of a pool, MiB of its memory cgroup, requests a second beside.
WORKERS, CGROUP, RATE = 4, 400, 50

#: gunicorn by its worker classes, and uvicorn with its own supervisor.
SERVERS = ("sync", "gthread", "uvicorn_worker.UvicornWorker", "uvicorn")

CONF = """
import oomsafe.gunicorn
control_socket_disable = True
timeout = 5
oomsafe.gunicorn.install(globals(), soft_limit="380MiB")
"""

#: How each is ended, and the verdicts that are right.
ENDS: dict[str, tuple[str, ...]] = {
    "the kernel": ("oom_confirmed",),
    "kill -9": ("signal",),
    "SIGSEGV": ("crashed",),
    "os._exit": ("exited",),
    "a hang": ("timeout",),
}


def server_of(kind: str) -> Server:
    """A pool in a memory cgroup of its own."""
    if kind == "uvicorn":
        argv = [sys.executable, "-m", "oomsafe.uvicorn", "ending_apps:asgi", "--port", PORT, "--workers", str(WORKERS), "--no-access-log"]
        return Server([*argv, "--timeout-worker-healthcheck", "2"], environ={"OOMSAFE_SOFT_LIMIT": "380MiB"}, memory=CGROUP * MIB)
    app = "ending_apps:wsgi" if kind in ("sync", "gthread") else "ending_apps:asgi"
    argv = [sys.executable, "-m", "gunicorn", "-b", f"127.0.0.1:{PORT}", "-c", "conf.py", "-w", str(WORKERS), "-k", kind]
    return Server([*argv, "--threads", "4", app], files={"conf.py": CONF}, memory=CGROUP * MIB)


def serving(server: Server) -> set[int]:
    """Wait until all workers serve: their pids."""

    def all_serve() -> set[int]:
        pids = {worker.pid for worker in server.pool().workers if worker.state is State.SERVING}
        return pids if len(pids) == WORKERS else set()

    return server.until(all_serve, "all serve", 60, pause=0.01)


def end_one(server: Server, how: str) -> float:
    """End one worker so; when that was noticed here first, on the monotonic clock."""
    before = serving(server)
    kills = server.kernel_kills()
    if how == "the kernel":
        threading.Thread(target=ask, args=(server, "/hog"), daemon=True).start()
        server.until(lambda: server.kernel_kills() > kills, "the kernel kills", 60, pause=0.001)
        return time.monotonic()
    if how in ("os._exit", "a hang"):
        threading.Thread(target=ask, args=(server, "/exit" if how == "os._exit" else "/hang"), daemon=True).start()
    else:
        os.kill(min(before), signal.SIGKILL if how == "kill -9" else signal.SIGSEGV)
    server.until(lambda: any(is_gone(pid) for pid in before), "it is gone", 60, pause=0.001)
    return time.monotonic()


def is_gone(pid: int) -> bool:
    """Whether a process has ended, reaped or not."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat", "rb") as stat:
        return stat.read().rpartition(b") ")[2][:1] in (b"Z", b"X")
    return True


def ask(server: Server, path: str) -> None:
    """A request that may not be answered."""
    with contextlib.suppress(OSError, http.client.HTTPException):
        server.get(path)


def beside(server: Server, until: Callable[[], bool]) -> None:
    """Good requests, some a second."""
    while not until():
        ask(server, "/")
        time.sleep(1 / RATE)


def run(kind: str, times: int) -> None:
    """Print a line for each way in which workers of this server were ended."""
    with server_of(kind) as server:
        done = threading.Event()
        load = threading.Thread(target=beside, args=(server, done.is_set), daemon=True)
        load.start()
        for how, right in ENDS.items():
            called: Counter[str] = Counter()
            seconds = []
            for _ in range(times):
                serving(server)
                counts = Counter(server.pool().ends)
                noticed = end_one(server, how)
                server.until(lambda counts=counts: sum(server.pool().ends.values()) > sum(counts.values()), "it is told", 60, pause=0.001)
                seconds.append(max(0.0, time.monotonic() - noticed))
                called += Counter(server.pool().ends) - counts
            wrong = sum(count for verdict, count in called.items() if verdict not in right)
            told = ", ".join(f"{count} {verdict}" for verdict, count in called.items())
            print(f"| {kind} | {how} | {told} | {wrong} | {statistics.median(seconds):.2f} ({max(seconds):.2f}) |", flush=True)
        done.set()
        load.join()


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("servers", nargs="*", default=SERVERS, help=f"of {', '.join(SERVERS)}")
    parser.add_argument("--times", type=int, default=25, help="how often each way is tried")
    options = parser.parse_args()
    print("| server | workers ended by | called | wrong | s from the end to the line: median (most) |\n|---|---|---|---|---|")
    for kind in options.servers:
        run(kind, options.times)


if __name__ == "__main__":
    main()
