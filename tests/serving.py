"""Real servers under test: started on a port of their own, watched through their log and their scoreboard, always ended."""

from __future__ import annotations

import http.client
import os
import re
import signal
import ssl
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from oomsafe.demo.server_process import ENDING_WITH_US, ServerProcess, environment, until
from oomsafe.kernel.process import children_of
from oomsafe.scoreboard.board import Scoreboard
from oomsafe.scoreboard.places import board_of
from oomsafe.scoreboard.view import PoolView, WorkerView

if TYPE_CHECKING:
    from typing_extensions import Self

APPS = Path(__file__).parent / "servers"
WSGI_CLASSES = ("sync", "gthread", "gevent")
ASGI_CLASSES = ("asgi", "uvicorn_worker.UvicornWorker")
CLASSES = WSGI_CLASSES + ASGI_CLASSES


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


class Server(ServerProcess):
    """One server under test. It can be asked for its port and over HTTP, and its scoreboard is read on when its file is gone."""

    GRACE = 3.0

    #: The line of its log that says where it listens.
    LISTENS = ""

    #: How a client connects; None: without TLS.
    tls: ssl.SSLContext | None = None

    def __init__(self, folder: Path, command: list[str], env: dict[str, str]) -> None:
        self.folder = folder
        self._board: Scoreboard | None = None
        # memray is installed here, and a probe that nobody asked for would recycle a worker in the middle of another test
        plain = {**environment(path=[APPS]), "PYTHONUNBUFFERED": "1", "OOMSAFE_PROBE": "false"}
        super().__init__(command, folder, {**plain, **env})

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
        self.until(lambda: [w.state for w in self.pool().workers] == ["serving"] * workers, f"{workers} workers serve")
        return self

    def look_anew(self) -> None:
        """Let go of the scoreboard that was found: its process has another."""
        if self._board is not None:
            self._board.close()
        self._board = None

    def pool(self) -> PoolView:
        """The pool as its scoreboard shows it; it can be read, too, after its file is gone."""
        if self._board is None:
            self._board = Scoreboard.open(until(lambda: board_of(self.pid), f"a scoreboard of {self.pid}"))
        return self._board.read()

    def pool_path(self) -> str:
        """Where its scoreboard lies."""
        return until(lambda: board_of(self.pid), f"a scoreboard of {self.pid}")

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

    def connected_to(self, pid: int) -> http.client.HTTPConnection:
        """A connection that this worker keeps. The app says at /pid who has answered."""

        def found() -> http.client.HTTPConnection | None:
            connection = self.connect()
            connection.request("GET", "/pid")
            if int(connection.getresponse().read()) == pid:
                return connection
            connection.close()
            return None

        return until(found, f"a connection to {pid}")

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

    def end(self) -> None:
        """At once where nobody of its session is left who could be served."""
        if self.alive and not self.session() - {self.pid}:
            self.process.kill()
        super().end()
        self.look_anew()


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
