"""Real forked processes for tests: each ends with os._exit, and none outlives its test."""

from __future__ import annotations

import os
import pickle
import select
import signal
import socket
import struct
import traceback
import warnings
from collections.abc import Callable
from typing import Any

#: Seconds after which a child that says nothing has failed.
PATIENCE = 20.0


class Line:
    """Objects to and from another process."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end

    def say(self, message: Any) -> None:
        """Send it."""
        raw = pickle.dumps(message)
        self._end.sendall(struct.pack("<I", len(raw)) + raw)

    def hear(self) -> Any:
        """Wait for the other's next message. Raises AssertionError when none comes, or what the child has raised."""
        (length,) = struct.unpack("<I", self._exactly(4))
        message = pickle.loads(self._exactly(length))
        assert not isinstance(message, _Failure), message.trace
        return message

    def close(self) -> None:
        """No more messages."""
        self._end.close()

    def _exactly(self, length: int) -> bytes:
        raw = b""
        while len(raw) < length:
            ready, _, _ = select.select([self._end], [], [], PATIENCE)
            assert ready, "the other process says nothing"
            part = self._end.recv(length - len(raw))
            assert part, "the other process has ended"
            raw += part
        return raw


class Child:
    """`function(line)` in a forked process; a context manager that kills and reaps it."""

    def __init__(self, function: Callable[[Line], None]) -> None:
        ours, theirs = socket.socketpair()
        self.pid = _fork()
        if not self.pid:
            ours.close()
            _run(function, Line(theirs))
        theirs.close()
        self._line = Line(ours)
        self.say, self.hear = self._line.say, self._line.hear
        self._reaped = False

    def kill(self) -> None:
        """SIGKILL, and reap."""
        os.kill(self.pid, signal.SIGKILL)
        self.reap()

    def reap(self) -> int:
        """Wait for its end, and return its exit code."""
        self._reaped = True
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._reaped:
            self.kill()
        self._line.close()


def in_child(function: Callable[[], Any]) -> Any:
    """What `function` returns in a forked process."""
    with Child(lambda line: line.say(function())) as child:
        return child.hear()


class _Failure:
    def __init__(self, trace: str) -> None:
        self.trace = trace


def _fork() -> int:
    with warnings.catch_warnings():
        # xdist's own threads take no lock that a child here needs
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def _run(function: Callable[[Line], None], line: Line) -> None:
    try:
        function(line)
    except BaseException:
        line.say(_Failure(traceback.format_exc()))
    finally:
        os._exit(0)
