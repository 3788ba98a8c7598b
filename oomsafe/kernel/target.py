"""A process to be signalled, and never another one that was later given the same pid."""

from __future__ import annotations

import os
import signal
import time
from types import TracebackType

from oomsafe.kernel.process import start_time, stat_of


class Target:
    """The process `pid` whose start_time() is `started`. Raises ProcessLookupError if it is gone.

    A pidfd always refers to the same process (Linux 5.3); without one, the start time is checked before each signal.
    """

    def __init__(self, pid: int, started: int) -> None:
        self._pid, self._started, self._fd = pid, started, -1
        try:
            self._fd = os.pidfd_open(pid)
        except ProcessLookupError:
            raise
        except (OSError, AttributeError):
            pass  # the kernel is older, or forbids it
        if start_time(pid) != started:
            self.close()
            raise ProcessLookupError(pid)

    def send(self, number: int) -> None:
        """Send a signal. Raises ProcessLookupError if the process is gone."""
        if self._fd >= 0:
            signal.pidfd_send_signal(self._fd, number)
        elif start_time(self._pid) == self._started:
            os.kill(self._pid, number)
        else:
            raise ProcessLookupError(self._pid)

    def stop(self, seconds: float = 0.05) -> None:
        """Send SIGSTOP, and wait at most `seconds` until the main thread has stopped: it may be deep in the kernel."""
        self.send(signal.SIGSTOP)
        deadline = time.monotonic() + seconds
        while not self._stands_still() and time.monotonic() < deadline:
            time.sleep(0.0002)

    def _stands_still(self) -> bool:
        return stat_of(self._pid)[:1] in ([b"T"], [b"t"], [b"Z"], [b"X"], [])

    def close(self) -> None:
        """Close the pidfd."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Target:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
