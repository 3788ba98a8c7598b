"""The server of the demo: a real gunicorn or uvicorn on a free loopback port, or a Celery worker.

It runs in a memory cgroup of its own, if one can be created.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field

from oomsafe.kernel.process import children_of, is_alive, peak_rss_of, rss_of, start_time
from oomsafe.kernel.sandbox import Sandbox
from oomsafe.scoreboard.board import Scoreboard
from oomsafe.scoreboard.places import board_of
from oomsafe.scoreboard.view import PoolView

_LISTENING = re.compile(r"(?:Listening at:|running on) http://127\.0\.0\.1:(\d+)")
_LEVEL = r"(?:INFO|WARNING|ERROR|CRITICAL)"
_WORDS = "recycling:|SIGKILL|is given up|Child process .* died|oomsafe guards|oomsafe failed|WORKER TIMEOUT"
_NOTABLE = re.compile(rf"(?:\[{_LEVEL}\]|: {_LEVEL}/\S+\]|^{_LEVEL}:) +(.*(?:{_WORDS}).*)")
_KILLED = re.compile(r"was sent SIGKILL|exited with 'signal 9 ")
_POISONED = re.compile(r"task poison\[.* took its child (\d+) ")

#: gunicorn's classes that serve ASGI apps.
ASGI_CLASSES = ("asgi", "uvicorn_worker.UvicornWorker")

#: Seconds until the server must be up, and later gone.
PATIENCE = 20


@dataclass
class Observed:
    """What is known about the pool, observed from outside."""

    peaks: dict[int, int] = field(default_factory=dict)
    """The peak rss of each worker in bytes, by pid."""
    poisoned: set[int] = field(default_factory=set)
    """The pids of workers that were killed while they ran a poison task."""
    killed: int = 0
    """How many workers died of SIGKILL."""
    rss: dict[int, int | None] = field(default_factory=dict)
    """The rss of each living worker in bytes, by pid; None: not known."""
    pool: PoolView | None = None
    """The scoreboard's content; None without oomsafe."""
    supervisor_alive: bool = True

    @property
    def peak_rss(self) -> int:
        """The peak rss of any worker in bytes, not counting those killed by a poison task."""
        return max((peak for pid, peak in self.peaks.items() if pid not in self.poisoned), default=0)


class DemoServer:
    """gunicorn, uvicorn or Celery with the leaking app. Use it as a context manager: it ends the process that it started, by pid.

    `limit` is the cgroup's, in bytes. `soft_limit` is in bytes; None runs the server without oomsafe.
    """

    def __init__(self, server: str, worker_class: str, workers: int, soft_limit: int | None, limit: int) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="oomsafe-demo-")
        self.limit = limit
        self.sandbox: Sandbox | None = None
        with contextlib.suppress(OSError):  # not root, or no memory controller: then there is no cgroup
            self.sandbox = Sandbox(f"oomsafe-demo-{os.getpid()}", limit)
        self.observed = Observed()
        self._guarded = soft_limit is not None
        self._read = 0
        self._log = os.path.join(self._folder.name, "log")
        self.unit = "task" if server == "celery" else "request"
        self._start(_command(server, worker_class, workers, self._guarded), soft_limit)

    def _start(self, argv: list[str], soft_limit: int | None) -> None:
        environ = {k: v for k, v in os.environ.items() if not k.startswith("OOMSAFE_") and k != "GUNICORN_CMD_ARGS"}
        if soft_limit is not None:
            environ |= {"OOMSAFE_SOFT_LIMIT": f"{soft_limit >> 20}MiB", "OOMSAFE_MIN_LIFETIME": "1"}
        # HOME too: gunicorn 25 and later keep a control socket below it
        environ["HOME"] = self._folder.name
        with open(self._log, "wb") as log:
            self._process = subprocess.Popen(
                self.sandbox.command(argv) if self.sandbox else argv,
                cwd=self._folder.name, env=environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        self.port, self.pid = self._wait_until_listening(), self._process.pid
        self._started = start_time(self.pid) or 0

    @property
    def folder(self) -> str:
        """The server's current folder."""
        return self._folder.name

    def observe(self) -> list[str]:
        """Update `observed`, and return the notable new lines of the server's log."""
        seen = self.observed
        seen.supervisor_alive = is_alive(self.pid, self._started)
        seen.rss = {pid: rss_of(pid) for pid in children_of(self.pid)}
        peaks = [(pid, peak_rss_of(pid)) for pid in seen.rss]
        if self._guarded:
            seen.pool = self._pool() or seen.pool
            peaks += [(worker.pid, worker.figures.peak_rss) for worker in seen.pool.workers] if seen.pool else []
        for pid, peak in peaks:
            seen.peaks[pid] = max(seen.peaks.get(pid, 0), peak or 0)
        lines = self._new_lines()
        seen.poisoned |= {int(match[1]) for line in lines if (match := _POISONED.search(line))}
        # uvicorn does not log the cause of a worker's death; without oomsafe, only the kernel ends them
        seen.killed += sum(bool(_KILLED.search(line)) or (not self._guarded and line.endswith("] died")) for line in lines)
        return [match[1] for line in lines if (match := _NOTABLE.search(line))]

    def log(self) -> str:
        """The whole log."""
        with open(self._log, encoding="utf-8", errors="replace") as log:
            return log.read()

    def __enter__(self) -> DemoServer:
        return self

    def __exit__(self, *_: object) -> None:
        # gunicorn passes each signal on once, and a worker that is just being forked misses it: so try again, with a stronger signal
        for number in (signal.SIGTERM, signal.SIGQUIT, signal.SIGKILL):
            if self._process.poll() is None:
                self._process.send_signal(number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(5)
        self._remove()

    def _remove(self) -> None:
        """Remove the cgroup once its last process is gone; a killed supervisor's workers notice that within a second or two."""
        deadline = time.monotonic() + PATIENCE
        while self.sandbox is not None:
            try:
                self.sandbox.remove()
                break
            except OSError:
                if time.monotonic() > deadline:
                    print(f"oomsafe: the cgroup {self.sandbox.cgroup.path} could not be removed", file=sys.stderr)
                    break
                time.sleep(0.1)
        self._folder.cleanup()

    def _pool(self) -> PoolView | None:
        path = board_of(self.pid)
        return None if path is None else Scoreboard.look(path)

    def _wait_until_listening(self) -> int:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and self._process.poll() is None:
            if self.unit == "task" and " ready." in self.log():
                return 0
            match = _LISTENING.search(self.log())
            if match and _answers(int(match[1])):
                return int(match[1])
            time.sleep(0.05)
        text = self.log()
        self.__exit__()
        raise RuntimeError(f"the server did not start:\n{text}")

    def _new_lines(self) -> list[str]:
        with open(self._log, "rb") as log:
            log.seek(self._read)
            raw = log.read()
        whole = raw[: raw.rfind(b"\n") + 1]
        self._read += len(whole)
        return whole.decode("utf-8", "replace").splitlines()


def _command(server: str, worker_class: str, workers: int, guarded: bool) -> list[str]:
    """The command line that a user would type, with oomsafe or without."""
    if server == "uvicorn":
        module = "oomsafe.uvicorn" if guarded else "uvicorn"
        options = ["--port", "0", "--workers", str(workers), "--no-access-log"]
        return [sys.executable, "-m", module, *options, "oomsafe.demo.app:asgi"]
    if server == "celery":
        # Celery's own way to select a pool class; in your own app it is one line, oomsafe.celery.install(app)
        pool = ["env", "CELERY_CUSTOM_WORKER_POOL=oomsafe.celery.pool:TaskPool"] if guarded else []
        options = ["--concurrency", str(workers), "--pool", "custom" if guarded else "prefork", "--loglevel", "INFO"]
        quiet = ["--without-gossip", "--without-mingle", "--without-heartbeat"]
        return [*pool, sys.executable, "-m", "celery", "-A", "oomsafe.demo.celery_app:app", "worker", *options, *quiet]
    options = ["--bind", "127.0.0.1:0", "--workers", str(workers), "--worker-class", worker_class]
    options += ["--threads", "4"] if worker_class == "gthread" else []
    options += ["--config", "python:oomsafe.gunicorn.conf"] if guarded else []
    app = "asgi" if worker_class in ASGI_CLASSES else "app"
    return [sys.executable, "-m", "gunicorn", *options, f"oomsafe.demo.app:{app}"]


def _answers(port: int) -> bool:
    """Whether a process listens on this port: uvicorn's supervisor logs the port before its workers accept."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True
