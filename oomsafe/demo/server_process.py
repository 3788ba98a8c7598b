"""A server as a process of its own: started, watched through its log and its scoreboard, and always ended.

The demo, the tests and the benchmarks build their own servers on it. It uses only the standard library, and what can be observed of a
process from outside.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from oomsafe.errors import ScoreboardError
from oomsafe.kernel.process import children_of, start_time
from oomsafe.kernel.sandbox import Sandbox
from oomsafe.kernel.session import in_session
from oomsafe.scoreboard.board import Scoreboard
from oomsafe.scoreboard.places import board_of
from oomsafe.scoreboard.view import PoolView

if TYPE_CHECKING:
    from typing_extensions import Self

T = TypeVar("T")

#: Seconds to wait for something that takes a moment: a server is up, a line is in its log, a killed process is gone.
PATIENCE = 20.0

#: Prefix of a command that gets SIGTERM if the process that started it is killed, and so can't end it (prctl(2), PR_SET_PDEATHSIG; Linux).
#: And that heeds SIGINT, which a shell has all ignore that it starts in the background, and SIGHUP, which nohup has ignored.
_FIRST = (
    "import ctypes, os, sys; from signal import SIG_DFL, SIGHUP, SIGINT, signal; ctypes.CDLL(None).prctl(1, 15); "
    "signal(SIGINT, SIG_DFL); signal(SIGHUP, SIG_DFL); os.execvp(sys.argv[1], sys.argv[1:])"
)
ENDING_WITH_US = [sys.executable, "-I", "-S", "-c", _FIRST] if sys.platform == "linux" else []


class ServerProcess:
    """A command in a session of its own, whose output goes to a log. As a context manager it ends, with everything that it started."""

    #: The signals that ask it to end, in turn, and how many seconds each is given. Then its whole session is killed.
    ENDS: Sequence[signal.Signals] = (signal.SIGTERM,)
    GRACE = 5.0

    def __init__(self, command: Sequence[str], folder: str | os.PathLike[str], environ: Mapping[str, str], log: str = "server.log") -> None:
        """It runs in `folder`, with `environ` as its whole environment; its output is appended to `log`, a path relative to `folder`."""
        self._log = Path(folder, log)
        with self._log.open("ab") as written:
            self.process = subprocess.Popen(
                command, cwd=folder, env=environ, stdin=subprocess.DEVNULL, stdout=written, stderr=written, start_new_session=True
            )
        self.pid = self.process.pid
        self._started = start_time(self.pid)

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self.process.poll() is None

    def log(self) -> str:
        """All its output, stdout and stderr."""
        return self._log.read_text("utf-8", "replace")

    def tail(self) -> str:
        """The end of its output, for a message."""
        return self.log()[-3000:]

    def lines(self, text: str) -> list[str]:
        """The lines of the log that hold `text`."""
        return [line for line in self.log().splitlines() if text in line]

    def wait_for(self, text: str, times: int = 1, seconds: float = PATIENCE) -> list[str]:
        """Wait until at least `times` lines of the log hold `text`, and return them. Raises RuntimeError after `seconds`."""
        until(lambda: len(self.lines(text)) >= times, f"{times} lines {text!r}", seconds)
        return self.lines(text)

    def until(self, condition: Callable[[], T], what: str, seconds: float = PATIENCE, pause: float = 0.02) -> T:
        """As the function until(), with the end of the log in the error; raises at once if the server has ended."""

        def asked() -> T:
            if not self.alive:
                raise RuntimeError(f"it ended with {self.process.returncode} before: {what}")
            return condition()

        try:
            return until(asked, what, seconds, pause)
        except RuntimeError as error:
            raise RuntimeError(f"{error}\n{self.tail()}") from None

    def workers(self) -> list[int]:
        """The pids of its children."""
        return children_of(self.pid)

    def session(self) -> set[int]:
        """The running processes of its session, including itself."""
        # if another process has its pid by now, that one's session may have the same number
        return in_session(self.pid) if start_time(self.pid) in (None, self._started) else set()

    def find_pool(self) -> PoolView | None:
        """Its pool, as the scoreboard shows it now; None if there is no scoreboard."""
        path = board_of(self.pid)
        with suppress(ScoreboardError):  # it has been removed meanwhile
            return None if path is None else Scoreboard.snapshot(path)
        return None

    def pool(self) -> PoolView:
        """Wait for its scoreboard, and return the pool. Raises RuntimeError if there is none after PATIENCE."""
        found = until(self.find_pool, f"a scoreboard of {self.pid}")
        assert found is not None
        return found

    def end(self) -> None:
        """End it, and then every process left in its session."""
        for number in self.ENDS:
            if self.alive:
                self.process.send_signal(number)
                with suppress(subprocess.TimeoutExpired):
                    self.process.wait(self.GRACE)
        if self.alive:
            self.process.kill()
        # workers that have lost their supervisor, a supervisor that took over from this one
        until(self._killed, f"the end of session {self.pid}")
        self.process.wait(PATIENCE)

    def _killed(self) -> bool:
        left = self.session()
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return not left

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


def until(condition: Callable[[], T], what: str, seconds: float = PATIENCE, pause: float = 0.02) -> T:
    """Poll every `pause` seconds until `condition()` is true, and return its result. Raises RuntimeError with `what` after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise RuntimeError(f"not within {seconds:g} s: {what}")
        time.sleep(pause)
    return found


def environment(*dropped: str, path: Sequence[Path] = ()) -> dict[str, str]:
    """This process's environment without oomsafe's and gunicorn's settings, and without names that begin with one of `dropped`.

    `path` holds folders that Python searches first for imports.
    """
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("OOMSAFE_", "GUNICORN_", *dropped))}
    if path:
        plain["PYTHONPATH"] = os.pathsep.join(filter(None, [*(str(folder) for folder in path), plain.get("PYTHONPATH")]))
    return plain


def free_ports(count: int = 1) -> list[int]:
    """`count` different loopback ports that are free now."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def answers(port: int) -> bool:
    """Whether a process listens on this loopback port."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def remove(sandbox: Sandbox, seconds: float = PATIENCE) -> None:
    """Remove a cgroup once the kernel has let go of its last process. Raises RuntimeError if that takes longer than `seconds`."""
    until(lambda: _removed(sandbox), f"{sandbox.cgroup.path} can be removed", seconds)


def _removed(sandbox: Sandbox) -> bool:
    with suppress(OSError):
        sandbox.remove()
    return not os.path.exists(sandbox.cgroup.path)
