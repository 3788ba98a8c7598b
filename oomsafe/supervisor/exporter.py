"""Starts a small process beside the supervisor that serves the pool's metrics, and starts it again when it dies.

It is not a thread, because the supervisor forks, and not a fork of the supervisor, which may be big. It is a new Python, which inherits
the scoreboard's descriptor and nothing else, and runs metrics/exporter.py.
"""

from __future__ import annotations

import _socket  # gevent patches socket and os; their originals, _socket and posix, start no hub in a supervisor
import errno
import os
import posix
import signal
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

from oomsafe.kernel.oom_score import read_score
from oomsafe.kernel.process import is_alive, start_of_child
from oomsafe.log import log
from oomsafe.policy.readers import SCORE_MIN
from oomsafe.policy.settings import Policy
from oomsafe.policy.text import printable
from oomsafe.policy.victims import clamp_score
from oomsafe.scoreboard.forks import own

#: Seconds until a process that died is started again: the first pause, which doubles each time, and the longest.
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0

#: Seconds that a process must have lived for the pauses to begin anew.
SETTLED = 60.0

#: Seconds to wait for a process that was ordered to end.
ENDING = 0.5

#: What the process runs. oomsafe's folder comes last on its path, because that folder may hold any other package. The exit status is always
#: 0: gunicorn before 25.1 takes any child for a worker, and reports every other status as a failed worker.
CODE = """
import os, sys
try:
    sys.path.append(sys.argv[1])
    from oomsafe.metrics.exporter import main
    main(*sys.argv[2:])
except BaseException as error:
    os.write(0, f"fails {error!r}\\n".encode())
finally:
    os._exit(0)
"""

#: Signals that are meant for the server, and may reach its whole process group. The process ends with its supervisor, not by these.
_LEFT_TO_SERVER = tuple(
    getattr(signal, name)
    for name in ("SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGWINCH", "SIGTTIN", "SIGTTOU")
    if hasattr(signal, name)
)


class Child(NamedTuple):
    """The process that serves the metrics."""

    pid: int
    started: int
    """Its start time, in clock ticks since boot; 0: not known."""
    since: float
    """When it was started, on the monotonic clock."""
    link: _socket.socket
    """It reports through this socket, and ends when this socket is shut down."""


class Exporter:
    """Belongs to one supervisor. In a fork of the supervisor it does nothing."""

    def __init__(self, policy: Policy, board: Callable[[], int | None], raise_by: Callable[[], int]) -> None:
        """`board` returns the scoreboard's descriptor, `raise_by` how far a worker's oom_score_adj is above the supervisor's."""
        self._policy, self._board, self._raise = policy, board, raise_by
        self._child: Child | None = None
        self._heard = b""
        self._pause, self._start_at = FIRST_PAUSE, 0.0
        own(self)
        self._begin()

    @property
    def process(self) -> tuple[int, int] | None:
        """(pid, start time) of the process; None while there is none."""
        return None if self._child is None else (self._child.pid, self._child.started)

    def follow(self, policy: Policy) -> None:
        """Take over this policy: where it differs in its metrics, the process is replaced."""
        before, self._policy = self._policy, policy
        if (before.metrics, before.metrics_token) != (policy.metrics, policy.metrics_token):
            self.close()
            if before.metrics is not None and policy.metrics is None:
                log.info("metrics are off")
            self._begin()

    def tick(self, now: float) -> None:
        """Log what the process reports, and start it again if it died. Call it as often as you like: it never waits."""
        if self._child is not None:
            self._listen(self._child, now)
        elif self._policy.metrics is not None and now >= self._start_at:
            self._start(now)

    def close(self) -> None:
        """End the process, and wait a moment until it is gone, because its successor may need its address."""
        child, self._child, self._heard, self._start_at = self._child, None, b"", float("inf")
        if child is None:
            return
        try:
            child.link.shutdown(_socket.SHUT_RDWR)  # closing it is not enough: forks of this process may have it open
        except OSError:
            pass  # the process is gone already
        child.link.close()
        until = time.monotonic() + ENDING
        while not _reaped(child) and time.monotonic() < until:
            time.sleep(0.005)

    def leave(self) -> None:
        """In a fork of the supervisor: the process is not the fork's."""
        if self._child is not None:
            self._child.link.close()
        self._child, self._start_at = None, float("inf")

    def _begin(self) -> None:
        self._pause, self._start_at = FIRST_PAUSE, float("inf")
        address = self._policy.metrics
        if address is None:
            return
        if not address.is_private and self._policy.metrics_token is None:
            log.warning(
                "metrics=%s is off: other machines can reach that address, so metrics_token must be set; or use 127.0.0.1:%s",
                address, address.port,
            )  # fmt: skip
        elif getattr(sys, "frozen", False) or not sys.executable:
            log.warning("metrics=%s is off: it needs a Python interpreter to start, and this program does not name one", address)
        else:
            self._start(time.monotonic())

    def _start(self, now: float) -> None:
        board = self._board()
        try:
            if board is None:
                raise OSError(errno.EBADF, "the scoreboard's descriptor has been closed")
            ours, theirs = _socket.socketpair()
            try:
                pid = self._spawn(board, theirs)
            except BaseException:
                ours.close()
                raise
            finally:
                theirs.close()
        except OSError as error:
            self._again(now, f"the metrics process can't be started ({error.strerror or error})")
            return
        ours.setblocking(False)
        ours.send(f"{self._policy.metrics_token or ''}\n".encode())
        self._child, self._heard = Child(pid, start_of_child(pid) or 0, now, ours), b""

    def _spawn(self, board: int, theirs: _socket.socket) -> int:
        import fcntl

        link = fcntl.fcntl(theirs.fileno(), fcntl.F_DUPFD_CLOEXEC, 10)
        inherited = 4 if board == 3 else 3  # a different number, because only a duplicate is sure to survive exec
        try:
            actions = [
                (posix.POSIX_SPAWN_DUP2, board, inherited),  # first: the next three may overwrite `board`
                (posix.POSIX_SPAWN_DUP2, link, 0),
                (posix.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
                (posix.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
                *((posix.POSIX_SPAWN_CLOSE, fd) for fd in _inheritable() if fd > 2 and fd != inherited),
            ]
            root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
            arguments = [str(self._policy.metrics), str(inherited), str(os.getpid()), str(self._score())]
            # -I -S: PYTHON variables and site modules (sitecustomize, .pth) may be big, or may wrap every Python that starts
            command = [sys.executable, "-I", "-S", "-c", CODE, root, *arguments]
            return posix.posix_spawn(sys.executable, command, os.environ, file_actions=actions, setsigmask=_LEFT_TO_SERVER)
        finally:
            os.close(link)

    def _score(self) -> int:
        """Its least oom_score_adj, a fresh worker's: the kernel kills it before this process, and workers, which are bigger, before it."""
        return SCORE_MIN if self._policy.dry_run else clamp_score((read_score() or 0) + self._raise())

    def _listen(self, child: Child, now: float) -> None:
        while True:
            try:
                received = child.link.recv(4096)
            except BlockingIOError:
                return
            except OSError:
                received = b""
            *lines, self._heard = (self._heard + received).split(b"\n")
            for line in lines:
                self._hear(child, printable(line, 200))
            self._heard = self._heard[-4096:]
            if not received:
                self._gone(child, now)
                return

    def _hear(self, child: Child, line: str) -> None:
        what, _, rest = line.partition(" ")
        if what == "serves":
            log.info("metrics on %s (pid %d)", rest, child.pid)
        elif what == "waits":
            log.warning("metrics can't be served on %s; oomsafe keeps trying", rest)
        elif what == "fails":
            log.error("the metrics process (pid %d) failed: %s", child.pid, rest)

    def _gone(self, child: Child, now: float) -> None:
        if self._child is not child:  # closed in the meantime: Celery may tick in a thread
            return
        child.link.close()
        self._child = None
        _reaped(child)
        if now - child.since >= SETTLED:
            self._pause = FIRST_PAUSE
        self._again(now, f"the metrics process (pid {child.pid}) has ended")

    def _again(self, now: float, why: str) -> None:
        log.warning("%s; next start in %.0f s", why, self._pause)
        self._start_at = now + self._pause
        self._pause = min(LONGEST_PAUSE, 2 * self._pause)


def _reaped(child: Child) -> bool:
    """Whether the process is gone. Reaps it, unless the server has: gunicorn waits for all of its children."""
    if (start_of_child(child.pid) or 0) == child.started:
        try:
            return posix.waitpid(child.pid, posix.WNOHANG)[0] != 0
        except ChildProcessError:
            return True
    return not is_alive(child.pid, child.started)


def _inheritable() -> list[int]:
    """This process's descriptors that survive exec, such as gunicorn's listening sockets."""
    found = []
    for name in os.listdir("/dev/fd") if os.path.isdir("/dev/fd") else ():
        try:
            if os.get_inheritable(int(name)):
                found.append(int(name))
        except OSError:
            pass  # the descriptor that listed the folder, closed by now
    return found
