"""What the arbiter does while it waits: its loop sleeps for a second at a time."""

from __future__ import annotations

import select
import time
from collections.abc import Callable
from typing import Any

#: Seconds that gunicorn before 24 sleeps.
SECOND = 1.0


def watch_with(server: Any, watch: Callable[[], float]) -> None:
    """Call `watch` while the arbiter waits, again after as many seconds as it returns. What wakes the arbiter wakes it as before."""
    wait, sleep = getattr(server, "wait_for_signals", None), getattr(server, "sleep", None)
    if wait is not None:
        server.wait_for_signals = _Waiting(wait, watch).wait
    elif sleep is not None:
        server.sleep = _Sleeping(server, sleep, watch).sleep


class _Waiting:
    """gunicorn since 24, which waits for signals in a queue."""

    def __init__(self, theirs: Callable[..., list[Any]], watch: Callable[[], float]) -> None:
        self._theirs = theirs
        self._watch = watch

    def wait(self, timeout: float = SECOND) -> list[Any]:
        """The signals that have come, after `timeout` seconds at most; none also if something else has woken it."""
        until = time.monotonic() + timeout
        while True:
            pause, now = self._watch(), time.monotonic()
            if pause >= until - now:
                return self._theirs(timeout=max(0.0, until - now))
            signals = self._theirs(timeout=pause)
            if signals or time.monotonic() - now < pause:
                return signals


class _Sleeping:
    """gunicorn before 24, which sleeps until there is something in a pipe."""

    def __init__(self, server: Any, theirs: Callable[[], Any], watch: Callable[[], float]) -> None:
        self._server = server
        self._theirs = theirs
        self._watch = watch

    def sleep(self) -> Any:
        """Sleep for a second at most."""
        pause, until = self._watch(), time.monotonic() + SECOND
        if pause >= SECOND:
            return self._theirs()
        while (left := until - time.monotonic()) > 0:
            if self._is_woken(min(pause, left)):
                return self._theirs()  # which finds what has woken it, and sleeps no more
            pause = self._watch()
        return None

    def _is_woken(self, seconds: float) -> bool:
        try:
            return bool(select.select([self._server.PIPE[0]], [], [], seconds)[0])
        except (OSError, ValueError):  # gunicorn deals with that itself
            return True
