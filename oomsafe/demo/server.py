"""The server of the demo: a real gunicorn or uvicorn on a free loopback port, or a Celery worker.

It runs in a memory cgroup of its own, if one can be created.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import tempfile
from dataclasses import dataclass, field

from oomsafe.demo.app import BALLOON
from oomsafe.demo.server_process import ENDING_WITH_US, ServerProcess, answers, environment, remove
from oomsafe.kernel.process import OwnMemory, peak_rss_of, rss_of
from oomsafe.kernel.rlimit import enforcement
from oomsafe.kernel.sandbox import Sandbox
from oomsafe.scoreboard.view import PoolView

_LISTENING = re.compile(r"(?:Listening at:|running on) http://127\.0\.0\.1:(\d+)")
_LEVEL = r"(?:INFO|WARNING|ERROR|CRITICAL)"
_WORDS = (
    "recycling:|SIGKILL|traces its allocations|was probed:|is given up|Child process .* died|oomsafe guards|oomsafe failed|WORKER TIMEOUT|"
    "has asked for more memory"
)
_NOTABLE = re.compile(rf"(?:\[{_LEVEL}\]|: {_LEVEL}/\S+\]|^{_LEVEL}:) +(.*(?:{_WORDS}).*)")
_KILLED = re.compile(r"was sent SIGKILL|exited with 'signal 9 ")
_POISONED = re.compile(r"task poison\[.* took its child (\d+) ")

#: gunicorn's classes that serve ASGI apps.
ASGI_CLASSES = ("asgi", "uvicorn_worker.UvicornWorker")


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


class DemoServer(ServerProcess):
    """gunicorn, uvicorn or Celery with the leaking app, ready for requests or tasks. Use it as a context manager.

    `limit` is the cgroup's, in bytes. `soft_limit` is in bytes; None runs the server without oomsafe. `app`: which of the demo's apps
    it serves; the ballooning one with a `hard_limit` in bytes, and only where something limits it. `probe`: find the line that leaks, with
    whichever tracer is here. Raises RuntimeError if the server does not start.
    """

    # gunicorn passes each signal on once, and a worker that is just being forked misses it: so try again, with a stronger signal
    ENDS = (signal.SIGTERM, signal.SIGQUIT)

    def __init__(
        self,
        server: str,
        worker_class: str,
        workers: int,
        soft_limit: int | None,
        limit: int,
        *,
        app: str = "app",
        hard_limit: int | None = None,
        probe: bool = False,
    ) -> None:
        self.limit = limit
        self.sandbox: Sandbox | None = None
        with contextlib.suppress(OSError):  # not root, or no memory controller: then there is no cgroup
            self.sandbox = Sandbox(f"oomsafe-demo-{os.getpid()}", limit)
        if app == "balloon" and self.sandbox is None:
            _needs_a_limit(hard_limit)
        self._temporary = tempfile.TemporaryDirectory(prefix="oomsafe-demo-")
        self.folder = self._temporary.name
        self.observed = Observed()
        self._guarded = soft_limit is not None
        self._read = 0
        self.unit = "task" if server == "celery" else "request"
        environ = environment()
        if soft_limit is not None:
            environ |= {"OOMSAFE_SOFT_LIMIT": f"{soft_limit >> 20}MiB", "OOMSAFE_MIN_LIFETIME": "1"}
        if hard_limit is not None:
            environ["OOMSAFE_HARD_LIMIT"] = f"{hard_limit >> 20}MiB"
        environ["OOMSAFE_PROBE"] = "true" if probe else "false"
        if probe:
            environ["OOMSAFE_STATE"] = os.path.join(self.folder, "state")
        # HOME too: gunicorn 25 and later keep a control socket below it
        environ["HOME"] = self.folder
        command = _command(server, worker_class, workers, self._guarded, app, "asgi" if app == "app" else f"{app}_asgi")
        command = self.sandbox.command(command) if self.sandbox else command
        self.port = 0
        super().__init__([*ENDING_WITH_US, *command], self.folder, environ, log="log")
        try:
            self.until(self._is_up, "the server is up", pause=0.05)
        except BaseException:
            self.end()
            raise

    def observe(self) -> list[str]:
        """Update `observed`, and return the notable new lines of the server's log."""
        observed = self.observed
        observed.supervisor_alive = self.alive
        observed.rss = {pid: rss_of(pid) for pid in self.workers()}
        peaks = [(pid, peak_rss_of(pid)) for pid in observed.rss]
        if self._guarded:
            observed.pool = self.find_pool() or observed.pool
            peaks += [(worker.pid, worker.figures.peak_rss) for worker in observed.pool.workers] if observed.pool else []
        for pid, peak in peaks:
            observed.peaks[pid] = max(observed.peaks.get(pid, 0), peak or 0)
        lines = self._new_lines()
        observed.poisoned |= {int(match[1]) for line in lines if (match := _POISONED.search(line))}
        # uvicorn does not log the cause of a worker's death; without oomsafe, only the kernel ends them
        observed.killed += sum(bool(_KILLED.search(line)) or (not self._guarded and line.endswith("] died")) for line in lines)
        return [match[1] for line in lines if (match := _NOTABLE.search(line))]

    def end(self) -> None:
        """End the server, and remove its cgroup and its folder."""
        super().end()
        try:
            if self.sandbox is not None:
                remove(self.sandbox)
        except RuntimeError as error:
            print(f"oomsafe: {error}", file=sys.stderr)
        self._temporary.cleanup()

    def _is_up(self) -> bool:
        """Whether it accepts requests at the port in its log, or tasks. uvicorn's supervisor logs the port before its workers accept."""
        log = self.log()
        if self.unit == "task":
            return " ready." in log
        match = _LISTENING.search(log)
        self.port = int(match[1]) if match else 0
        return match is not None and answers(self.port)

    def _new_lines(self) -> list[str]:
        with open(self._log, "rb") as log:
            log.seek(self._read)
            raw = log.read()
        whole = raw[: raw.rfind(b"\n") + 1]
        self._read += len(whole)
        return whole.decode("utf-8", "replace").splitlines()


def _needs_a_limit(hard_limit: int | None) -> None:
    """Raise RuntimeError if nothing on this machine would stop a balloon at once: no hard limit, or a kernel that does not enforce it."""
    mapped = OwnMemory().mapped()
    trial = None if hard_limit is None or mapped is None else enforcement(mapped[2])
    if trial is None or not trial.enforced:
        why = "" if trial is None else f" and the kernel's own: {trial.reason}"
        raise RuntimeError(f"a balloon of {BALLOON >> 30} GiB needs a limit, and there is none here: a memory cgroup needs root{why}")


def _command(server: str, worker_class: str, workers: int, guarded: bool, wsgi: str, asgi: str) -> list[str]:
    """The command line that a user would type, with oomsafe or without. `wsgi` and `asgi` are the names of the demo's apps."""
    if server == "uvicorn":
        module = "oomsafe.uvicorn" if guarded else "uvicorn"
        options = ["--port", "0", "--workers", str(workers), "--no-access-log"]
        return [sys.executable, "-m", module, *options, f"oomsafe.demo.app:{asgi}"]
    if server == "celery":
        # Celery's own way to select a pool class; in your own app it is one line, oomsafe.celery.install(app)
        pool = ["env", "CELERY_CUSTOM_WORKER_POOL=oomsafe.celery.pool:TaskPool"] if guarded else []
        options = ["--concurrency", str(workers), "--pool", "custom" if guarded else "prefork", "--loglevel", "INFO"]
        quiet = ["--without-gossip", "--without-mingle", "--without-heartbeat"]
        return [*pool, sys.executable, "-m", "celery", "-A", "oomsafe.demo.celery_app:app", "worker", *options, *quiet]
    options = ["--bind", "127.0.0.1:0", "--workers", str(workers), "--worker-class", worker_class]
    options += ["--threads", "4"] if worker_class == "gthread" else []
    options += ["--config", "python:oomsafe.gunicorn.conf"] if guarded else []
    return [sys.executable, "-m", "gunicorn", *options, f"oomsafe.demo.app:{asgi if worker_class in ASGI_CLASSES else wsgi}"]
