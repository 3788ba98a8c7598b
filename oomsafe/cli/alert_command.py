"""The command of `oomsafe watch --on-alert`: run once for each event, with one JSON object on its stdin, and bounded in every way."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import IO

from oomsafe.policy.text import printable

#: Seconds that a command may take, how many run at once, and how many events wait for one to end.
LONGEST, AT_ONCE, WAITING = 30.0, 8, 256

#: Bytes of a command's stderr that are read at all, and that are kept for the line about its failure.
FLOOD, KEPT = 1 << 20, 4096

#: Seconds between two checks while a command runs; the end of one is noticed at once (SIGCHLD).
CHECK_EVERY = 0.1


@dataclass(frozen=True, kw_only=True)
class Message:
    """One event for the command."""

    about: Hashable
    """What it is about: a command for an older message about the same ends before this one's begins."""
    what: str
    """For the line about a failure; printable."""
    body: bytes


@dataclass(kw_only=True)
class _Run:
    """A running command, which leads a process group of its own. Until it is reaped, no other process can have its pid."""

    message: Message
    process: subprocess.Popen[bytes]
    until: float
    errors: int
    """The reading end of its stderr; -1: closed."""
    read: int = 0
    tail: bytes = b""
    killed: str = ""
    """Why it was; empty: it was not."""


class AlertCommand:
    """Runs `argv` without a shell. Nothing here waits, except end(); nothing raises for what a command does."""

    def __init__(self, argv: Sequence[str], say: Callable[[str], None], longest: float = LONGEST) -> None:
        """`say` gets each line about a failure. `longest`: seconds that a command may take."""
        self._argv, self._say, self._longest = list(argv), say, longest
        self._waiting: deque[Message] = deque()
        self._runs: list[_Run] = []
        self._dropped = 0

    @property
    def pause(self) -> float | None:
        """Seconds until tick() should be called again; None: nothing runs."""
        return CHECK_EVERY if self._runs else None

    def put(self, message: Message) -> None:
        """Run the command for this message, as soon as it may."""
        if len(self._waiting) >= WAITING:
            self._dropped += 1
            if self._dropped == 1:
                self._say(f"the alert command is not run for {message.what}, nor for others: {WAITING} alerts wait for it already")
            return
        self._waiting.append(message)

    def tick(self) -> None:
        """Start what may start, end what takes too long, and say what has failed. Call it often."""
        for run in list(self._runs):
            self._follow(run)
        busy = {run.message.about for run in self._runs}
        for message in list(self._waiting):
            if len(self._runs) >= AT_ONCE:
                break
            if message.about not in busy:
                busy.add(message.about)
                self._waiting.remove(message)
                self._start(message)
        if self._dropped and not self._waiting:
            self._say(f"the alert command was not run for {self._dropped} alerts")
            self._dropped = 0

    def end(self, seconds: float, wait: Callable[[float], None], hurries: Callable[[], bool]) -> None:
        """Let what waits and runs end, for at most `seconds`, or until `hurries()`; then kill it. `wait(seconds)` sleeps."""
        until = time.monotonic() + seconds
        while (self._runs or self._waiting) and time.monotonic() < until and not hurries():
            self.tick()
            if self._runs:
                wait(CHECK_EVERY)
        if self._waiting:
            self._say(f"the alert command was not run for {len(self._waiting)} alerts")
            self._waiting.clear()
        for run in self._runs:
            run.killed = run.killed or "was ended with the watch"
            _kill(run)
        until = time.monotonic() + 1.0
        while self._runs and time.monotonic() < until:
            self.tick()
            time.sleep(0.01)

    def _start(self, message: Message) -> None:
        errors = written = -1
        try:
            errors, written = os.pipe()
            os.set_blocking(errors, False)
            with _file_of(message.body) as body:
                process = subprocess.Popen(self._argv, stdin=body, stdout=subprocess.DEVNULL, stderr=written, start_new_session=True)
            self._runs.append(_Run(message=message, process=process, until=time.monotonic() + self._longest, errors=errors))
        except (OSError, ValueError) as error:
            if errors >= 0:
                os.close(errors)
            self._fails(message, f"can't be run: {getattr(error, 'strerror', None) or error}")
        finally:
            if written >= 0:
                os.close(written)

    def _follow(self, run: _Run) -> None:
        self._hear(run)
        try:
            has_ended = os.waitid(os.P_PID, run.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:  # somebody else has reaped it: its pid may be another's by now
            self._forget(run)
            return
        if has_ended:
            _kill(run)  # what it has left behind in its group; it is not reaped yet, so the group is still its own
            run.process.wait()
            self._hear(run)
            self._forget(run)
            self._tell(run)
        elif not run.killed and time.monotonic() >= run.until:
            run.killed = f"was ended after {self._longest:.0f} s"
            _kill(run)

    def _hear(self, run: _Run) -> None:
        """Read its stderr. One that floods it gets SIGPIPE."""
        while run.errors >= 0:
            try:
                found = os.read(run.errors, 65536)
            except BlockingIOError:
                return
            except OSError:
                found = b""
            run.read += len(found)
            run.tail = (run.tail + found)[-KEPT:]
            if not found or run.read >= FLOOD:
                os.close(run.errors)
                run.errors = -1

    def _forget(self, run: _Run) -> None:
        self._runs.remove(run)
        if run.errors >= 0:
            os.close(run.errors)
            run.errors = -1

    def _tell(self, run: _Run) -> None:
        status = run.process.returncode
        lines = [line for line in run.tail.decode("utf-8", "replace").splitlines() if line.strip()]
        why = f": {printable(lines[-1].strip(), 200)}" if lines else ""
        if run.killed:
            self._fails(run.message, f"{run.killed}{why}")
        elif status:
            self._fails(run.message, f"ended {f'with status {status}' if status > 0 else f'by signal {-status}'}{why}")

    def _fails(self, message: Message, how: str) -> None:
        self._say(f"the alert command ({printable(self._argv[0])}) for {message.what} {how}")


def _kill(run: _Run) -> None:
    with suppress(ProcessLookupError, PermissionError):  # EPERM: it has become another user
        os.killpg(run.process.pid, signal.SIGKILL)


def _file_of(body: bytes) -> IO[bytes]:
    """A file with this content, to be read from its begin: unlike a pipe it neither blocks nor fails if the command does not read it."""
    try:
        file: IO[bytes] = os.fdopen(os.memfd_create("oomsafe-alert"), "w+b")
    except (AttributeError, OSError):
        file = tempfile.TemporaryFile()  # noqa: SIM115  the caller closes it
    file.write(body)
    file.flush()
    file.seek(0)
    return file
