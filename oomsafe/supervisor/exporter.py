"""Has a small process beside the supervisor serve the pool's metrics, and starts it again when it dies.

No thread, for the supervisor forks; no fork of it, for what it has loaded may be big: Python is started anew, and inherits the scoreboard's
descriptor and nothing else. What it runs is metrics/exporter.py.
"""

from __future__ import annotations

import _socket  # not socket, and posix instead of os below: those may have been patched by gevent, whose hub has no place in a supervisor
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

#: Seconds until it is started again after it has died: at first, then twice as long each time, and at most so long.
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0

#: One that has lived for so many seconds has nothing to do with the next that dies.
SETTLED = 60.0

#: Seconds that one is waited for that has been told to end.
ENDING = 0.5

#: What runs in it; oomsafe's folder is the last on its path, for there may be whatever else in it. It always exits with 0: gunicorn before
#: 25.1 takes any child for a worker, and says of others that they have failed.
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

#: Signals that are meant for the server, and may be sent to its whole process group; it ends with its supervisor.
_LEFT_TO_SERVER = tuple(
    getattr(signal, name)
    for name in ("SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGWINCH", "SIGTTIN", "SIGTTOU")
    if hasattr(signal, name)
)


class Child(NamedTuple):
    """The process that serves."""

    pid: int
    started: int
    """When, in clock ticks since boot; 0: not known."""
    since: float
    """The same on the monotonic clock."""
    link: _socket.socket
    """It says by it what becomes of it, and ends when it is shut down."""


class Exporter:
    """One supervisor's. In a fork of it there is none."""

    def __init__(self, policy: Policy, board: Callable[[], int | None], step: Callable[[], int]) -> None:
        """`board` is the scoreboard's descriptor, `step` how much higher than the supervisor's a worker's oom_score_adj is."""
        self._policy, self._board, self._step = policy, board, step
        self._child: Child | None = None
        self._heard = b""
        self._pause, self._start_at = FIRST_PAUSE, 0.0
        own(self)
        self._begin()

    @property
    def process(self) -> tuple[int, int] | None:
        """(pid, start time); None while there is none."""
        return None if self._child is None else (self._child.pid, self._child.started)

    def follow(self, policy: Policy) -> None:
        """The policy has changed, or not."""
        before, self._policy = self._policy, policy
        if (before.metrics, before.metrics_token) != (policy.metrics, policy.metrics_token):
            self.close()
            if before.metrics is not None and policy.metrics is None:
                log.info("metrics are off")
            self._begin()

    def tick(self, now: float) -> None:
        """As often as one likes: says what it has said, and starts it again when it has died. Waits for nothing."""
        if self._child is not None:
            self._listen(self._child, now)
        elif self._policy.metrics is not None and now >= self._start_at:
            self._start(now)

    def close(self) -> None:
        """End it, and wait a moment until it is gone: another may want its address."""
        child, self._child, self._heard, self._start_at = self._child, None, b"", float("inf")
        if child is None:
            return
        try:
            child.link.shutdown(_socket.SHUT_RDWR)  # forks may have it open, too: to close it would not be enough
        except OSError:
            pass  # it is gone already
        child.link.close()
        until = time.monotonic() + ENDING
        while not _reaped(child) and time.monotonic() < until:
            time.sleep(0.005)

    def leave(self) -> None:
        """In a fork of the supervisor: it is not its child's."""
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
                "metrics=%s is off: others can reach that address, so it takes metrics_token, a secret; or serve them on 127.0.0.1:%s",
                address, address.port,
            )  # fmt: skip
        elif getattr(sys, "frozen", False) or not sys.executable:
            log.warning("metrics=%s is off: it takes a Python interpreter to start, and this process is none", address)
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
            self._again(now, f"no process for metrics can be started ({error.strerror or error})")
            return
        ours.setblocking(False)
        ours.send(f"{self._policy.metrics_token or ''}\n".encode())
        self._child, self._heard = Child(pid, start_of_child(pid) or 0, now, ours), b""

    def _spawn(self, board: int, theirs: _socket.socket) -> int:
        import fcntl

        link = fcntl.fcntl(theirs.fileno(), fcntl.F_DUPFD_CLOEXEC, 10)
        inherited = 4 if board == 3 else 3  # another number: what has been duplicated is not closed by exec
        try:
            actions = [
                (posix.POSIX_SPAWN_DUP2, board, inherited),  # first: it may itself be one of the next three
                (posix.POSIX_SPAWN_DUP2, link, 0),
                (posix.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
                (posix.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
                *((posix.POSIX_SPAWN_CLOSE, fd) for fd in _inheritable() if fd > 2 and fd != inherited),
            ]
            root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
            arguments = [str(self._policy.metrics), str(inherited), str(os.getpid()), str(self._score())]
            # neither the environment nor the site's modules have a say in it (-I -S): they may be big, or wrap whatever Python starts
            command = [sys.executable, "-I", "-S", "-c", CODE, root, *arguments]
            return posix.posix_spawn(sys.executable, command, os.environ, file_actions=actions, setsigmask=_LEFT_TO_SERVER)
        finally:
            os.close(link)

    def _score(self) -> int:
        """Its oom_score_adj at least: that of a fresh worker, so the kernel takes it before this process, and workers before it."""
        return SCORE_MIN if self._policy.dry_run else clamp_score((read_score() or 0) + self._step())

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
            log.warning("metrics can't be served on %s; it is tried again until they can", rest)
        elif what == "fails":
            log.error("the process for metrics (pid %d) fails: %s", child.pid, rest)

    def _gone(self, child: Child, now: float) -> None:
        if self._child is not child:  # Celery may tick in a thread: it has been closed meanwhile
            return
        child.link.close()
        self._child = None
        _reaped(child)
        if now - child.since >= SETTLED:
            self._pause = FIRST_PAUSE
        self._again(now, f"the process for metrics (pid {child.pid}) has ended")

    def _again(self, now: float, why: str) -> None:
        log.warning("%s: it is started again in %.0f s", why, self._pause)
        self._start_at = now + self._pause
        self._pause = min(LONGEST_PAUSE, 2 * self._pause)


def _reaped(child: Child) -> bool:
    """Whether it is gone. It is this process's to reap, unless that waits for all its children, as gunicorn does."""
    if (start_of_child(child.pid) or 0) == child.started:
        try:
            return posix.waitpid(child.pid, posix.WNOHANG)[0] != 0
        except ChildProcessError:
            return True
    return not is_alive(child.pid, child.started)


def _inheritable() -> list[int]:
    """The descriptors of this process that a program inherits which it starts: gunicorn's listeners."""
    found = []
    for name in os.listdir("/dev/fd") if os.path.isdir("/dev/fd") else ():
        try:
            if os.get_inheritable(int(name)):
                found.append(int(name))
        except OSError:
            pass  # that of the folder itself
    return found
