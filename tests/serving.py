"""Real servers under test: started on a port of their own, watched through their log and their scoreboard, always ended."""

from __future__ import annotations

import http.client
import os
import re
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from oomsafe.kernel.process import children_of
from oomsafe.scoreboard.board import Scoreboard
from oomsafe.scoreboard.places import board_of
from oomsafe.scoreboard.view import PoolView, WorkerView

if TYPE_CHECKING:
    from typing_extensions import Self

T = TypeVar("T")

APPS = Path(__file__).parent / "servers"
WSGI_CLASSES = ("sync", "gthread", "gevent")
ASGI_CLASSES = ("asgi", "uvicorn_worker.UvicornWorker")
CLASSES = WSGI_CLASSES + ASGI_CLASSES

#: Runs a command that gets a SIGTERM when the tests are killed (prctl's PR_SET_PDEATHSIG): their fixtures end nothing then.
ENDING_WITH_US = [sys.executable, "-c", "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); os.execvp(sys.argv[1], sys.argv[1:])"]


def until(condition: Callable[[], T], what: str, seconds: float = 20) -> T:
    """Poll until `condition()` is true, and return what it gave; after `seconds`, fail and say `what` did not happen."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.02)
    return found


def memory_of(board: str) -> bytes:
    """The bytes of a scoreboard, which its file has, or names: a root supervisor's are in a descriptor of its."""
    raw = Path(board).read_bytes()
    named = re.fullmatch(rb"oomsafe memory of (\d+) \d+ is (\d+)\n", raw)
    return raw if named is None else Path(f"/proc/{int(named[1])}/fd/{int(named[2])}").read_bytes()


def ask(connection: http.client.HTTPConnection, path: str) -> tuple[int, str | None, bytes]:
    """One request on an open connection: status, "close" if that was the last on it, body."""
    connection.request("GET", path)
    response = connection.getresponse()
    last = "close" if response.getheader("Connection") == "close" else None
    return response.status, last, response.read()


def ask_until_the_last(connection: http.client.HTTPConnection, path: str) -> tuple[int, str | None, bytes]:
    """Until an answer says that it is the last; a worker's slot and its line say so a moment before it drains."""
    return until(lambda: (answer := ask(connection, path))[1] and answer, "an answer says that it is the last")


def conf(worker_class: str = "sync", workers: int = 2, *, settings: str = "", install: bool = True, **policy: object) -> str:
    """The text of a gunicorn configuration: `settings` are lines of Python that stand before install()'s line."""
    keywords = "".join(f", {name}={value!r}" for name, value in policy.items())
    lines = [
        'bind = "127.0.0.1:0"',
        "control_socket_disable = True",  # all of a user's gunicorns share one
        f"worker_class = {worker_class!r}",
        f"workers = {workers}",
        f"threads = {4 if worker_class == 'gthread' else 1}",
        "graceful_timeout = 5",
        "keepalive = 30",  # a starved client must not find its connection gone
        settings,
        f"import oomsafe.gunicorn\noomsafe.gunicorn.install(globals(){keywords})" if install else "",
    ]
    return "\n".join(lines) + "\n"


def app_for(worker_class: str) -> str:
    """The app in tests/servers/apps.py that a worker class serves."""
    return "apps:wsgi" if worker_class in WSGI_CLASSES else "apps:asgi"


class Server:
    """One server in a session of its own. As a context manager it ends with all its processes."""

    #: The line of its log that says where it listens.
    LISTENS = ""

    #: How a client connects; None: without TLS.
    tls: ssl.SSLContext | None = None

    def __init__(self, folder: Path, command: list[str], env: dict[str, str]) -> None:
        self.folder = folder
        self._log = folder / "server.log"
        self._board: Scoreboard | None = None
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                command, cwd=folder, env=_environment(env), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self.pid = self.process.pid

    def log(self) -> str:
        """What it has written, to stdout and to stderr."""
        return self._log.read_text(errors="replace")

    def lines(self, text: str) -> list[str]:
        """The lines of the log that hold `text`."""
        return [line for line in self.log().splitlines() if text in line]

    def wait_for(self, text: str, times: int = 1, seconds: float = 20) -> list[str]:
        """Wait until `times` lines of the log hold `text`."""
        found = until(lambda: len(self.lines(text)) >= times and self.lines(text), f"{times} lines {text!r}", seconds)
        assert found
        return found

    @property
    def port(self) -> int:
        """Where it listens."""
        match = re.search(r"https?://127\.0\.0\.1:(\d+)", "".join(self.wait_for(self.LISTENS)[-1:]))
        assert match
        return int(match[1])

    def workers(self, master: int | None = None) -> list[int]:
        """The pids of the master's workers."""
        return children_of(master or self.pid)

    def serving(self, workers: int = 2) -> Self:
        """Wait until exactly so many workers serve, and return this server."""
        until(
            lambda: self.process.poll() is None and [w.state for w in self.pool().workers] == ["serving"] * workers,
            f"{workers} workers serve",
        )
        return self

    def look_anew(self) -> None:
        """Forget the scoreboard that was found: its process has another."""
        self._board = None

    def pool(self) -> PoolView:
        """The pool as its scoreboard shows it; it can be read, too, after its file is gone."""
        if self._board is None:
            self._board = Scoreboard.open(until(lambda: board_of(self.pid), f"a scoreboard of {self.pid}"))
        return self._board.read()

    def watch(self, board: Scoreboard) -> None:
        """Its scoreboard is this one: it lies where nobody would look."""
        self._board = board

    def ordered(self) -> list[int]:
        """The pids of the workers that have an order of their supervisor's."""
        return [worker.pid for worker in self.pool().workers if worker.ordered]

    def worker(self, pid: int) -> WorkerView:
        """One worker on the scoreboard."""
        return next(worker for worker in self.pool().workers if worker.pid == pid)

    def get(self, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
        """One request on a connection of its own: status, headers with lower-case names, body."""
        connection = self.connect()
        try:
            connection.request("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})
            response = connection.getresponse()
            return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()
        finally:
            connection.close()

    def connect(self, timeout: float = 20) -> http.client.HTTPConnection:
        """A connection that has not been opened yet."""
        if self.tls is not None:
            return http.client.HTTPSConnection("127.0.0.1", self.port, timeout=timeout, context=self.tls)
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)

    def signal(self, number: int) -> None:
        """Send the master a signal."""
        os.kill(self.pid, number)

    def ended(self, seconds: float = 20) -> int:
        """Wait for the master's end, and return its exit status."""
        return self.process.wait(seconds)

    def stop(self) -> int:
        """SIGTERM, and its end."""
        self.signal(signal.SIGTERM)
        return self.ended()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None and not alive(self.session() - {self.pid}):
            self.process.kill()
        elif self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(3)
            except subprocess.TimeoutExpired:
                pass
        # workers that have lost their master, masters that took over from theirs
        for pid in self.session():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass  # it has ended meanwhile
        self.process.wait(10)
        until(lambda: not self.session(), f"the end of session {self.pid}", 10)
        if self._board is not None:
            self._board.close()

    def session(self) -> set[int]:
        """The processes of its session that run."""
        return {pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if _session(pid) == self.pid}


class Gunicorn(Server):
    """gunicorn with a configuration of its own."""

    LISTENS = "Listening at: "

    def __init__(
        self,
        folder: Path,
        text: str,
        app: str,
        *,
        argv: Sequence[str] = (),
        env: dict[str, str] | None = None,
        prefix: Sequence[str] = (),
        wrap: Callable[[list[str]], list[str]] = lambda command: command,
    ) -> None:
        self.conf = folder / "oomsafe.conf.py"
        self.conf.write_text(text)
        argv = argv or ["-c", str(self.conf)]
        super().__init__(folder, wrap([*ENDING_WITH_US, *prefix, sys.executable, "-m", "gunicorn", *argv, app]), env or {})


def alive(pids: set[int]) -> bool:
    """Whether one of these runs."""
    return any(_session(pid) for pid in pids)


def _session(pid: int) -> int:
    """The session of a process that runs; 0 for one that has ended (a zombie has)."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return 0
    return 0 if words[0] in "ZX" else int(words[3])


def _environment(more: dict[str, str]) -> dict[str, str]:
    ours = {k: v for k, v in os.environ.items() if not k.startswith(("OOMSAFE_", "GUNICORN_"))}
    path = os.pathsep.join(filter(None, [str(APPS), ours.get("PYTHONPATH")]))
    return {**ours, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **more}
