"""A real uvicorn under test, guarded by oomsafe or by itself."""

from __future__ import annotations

import http.client
import inspect
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

from serving import ENDING_WITH_US, Server, ask
from uvicorn.config import Config


def health_check(seconds: int) -> list[str]:
    """The option that has uvicorn kill who has not answered for so long; older ones have none, and it is 5 s."""
    known = "timeout_worker_healthcheck" in inspect.signature(Config).parameters
    return ["--timeout-worker-healthcheck", str(seconds)] if known else []


class Uvicorn(Server):
    """uvicorn as its command line starts it; `policy` goes into the environment."""

    LISTENS = "Uvicorn running on "

    def __init__(
        self,
        folder: Path,
        app: str,
        *argv: str,
        start: Sequence[str] = ("-m", "oomsafe.uvicorn"),
        env: dict[str, str] | None = None,
        wrap: Callable[[list[str]], list[str]] = list,
        python: Sequence[str] = (sys.executable,),
        **policy: object,
    ) -> None:
        options = ["--port", "0", "--no-access-log", *argv] if app else argv
        self._connections = ExitStack()
        command = wrap([*ENDING_WITH_US, *python, *start, *filter(None, [app]), *options])
        super().__init__(folder, command, {**(env or {}), **{f"OOMSAFE_{name.upper()}": str(value) for name, value in policy.items()}})

    def workers(self, master: int | None = None) -> list[int]:
        """The pids of the supervisor's workers: it has another child, multiprocessing's resource tracker."""
        return [pid for pid in super().workers(master) if b"spawn_main" in _command(pid)]

    def up(self) -> Uvicorn:
        """Wait until it answers, and return it: for one without a scoreboard."""
        self.until(lambda: "Application startup complete" in self.log() and self._answers(), "it answers")
        return self

    def _answers(self) -> bool:
        try:
            return self.get("/")[0] == 200
        except ConnectionRefusedError:
            return False  # its socket is bound, and no worker listens yet

    def connect_to(self, pid: int) -> http.client.HTTPConnection:
        """A kept-alive connection to this worker, closed at the end."""
        for _ in range(500):
            connection = self._connections.enter_context(closing(self.connect(timeout=60)))
            if int(ask(connection, "/pid")[2]) == pid:
                return connection
            connection.close()
        raise AssertionError(f"worker {pid} takes no connection")

    def grow(self, pid: int, mib: int) -> None:
        """Have this worker hold so many MiB."""
        with closing(self.connect_to(pid)) as connection:
            assert ask(connection, f"/fill?mib={mib}")[0] == 200

    def end(self) -> None:
        """Its connections first."""
        self._connections.close()
        super().end()


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
