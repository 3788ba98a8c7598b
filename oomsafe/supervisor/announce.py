"""Calls the user's `on_death` for each worker that ended other than in order, in a process of its own: it can't hurt the supervisor."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from typing import Any

from oomsafe.errors import ScoreRefused
from oomsafe.kernel.oom_score import raise_score
from oomsafe.log import log
from oomsafe.policy.death_line import DeathRecord
from oomsafe.policy.text import printable

#: Seconds that a call may take.
LONGEST = 10

#: Added to the oom_score_adj of a call: as to a worker's, at least.
WORKERS = 300

#: The most calls at the same time: a pool whose workers die in a loop must not be followed by as many processes.
AT_ONCE = 4

#: What a crashing pool may start: at most this many calls in a minute.
A_MINUTE = 60


class Announcer:
    """Calls `on_death` with the record of a death. Made in the supervisor; `on_death` is a callable, or the text ``module:function``."""

    def __init__(self, on_death: Callable[[DeathRecord], Any] | str) -> None:
        self._function = on_death
        self._calls: list[int] = []
        self._began: list[float] = []
        self._said = False

    def __call__(self, death: DeathRecord) -> None:
        """Start a call. Never waits."""
        self._reap()
        now = time.monotonic()
        self._began = [began for began in self._began if now - began < 60]
        if len(self._calls) >= AT_ONCE or len(self._began) >= A_MINUTE:
            if not self._said:
                self._said = True
                log.warning("on_death is not called for worker %d, nor for others: too many calls at once, or in a minute", death.pid)
            return
        self._said = False
        self._began.append(now)
        pid = os.fork()
        if pid:
            self._calls.append(pid)
            return
        try:
            self._call(death)
        finally:
            os._exit(0)  # some servers log the status of any child

    def _call(self, death: DeathRecord) -> None:
        """In the fork."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGALRM, _too_long)
        signal.alarm(LONGEST)
        try:
            with suppress(ScoreRefused):
                raise_score(WORKERS)  # it may be big, and the supervisor must outlive it
            function = resolve(self._function) if isinstance(self._function, str) else self._function
            function(death)
        except BaseException as error:
            log.error("on_death has failed for worker %d: %s: %s", death.pid, type(error).__name__, printable(str(error)))
        sys.stdout.flush()

    def _reap(self) -> None:
        left = []
        for pid in self._calls:
            try:
                if os.waitpid(pid, os.WNOHANG)[0] == 0:
                    left.append(pid)
            except ChildProcessError:
                continue  # the server itself reaps all children
        self._calls = left


def resolve(text: str) -> Callable[[DeathRecord], Any]:
    """The function that ``package.module:function`` names. Raises ImportError or AttributeError."""
    module, _, name = text.partition(":")
    found = import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found  # type: ignore[return-value]


def _too_long(*_: object) -> None:
    log.error("on_death has taken longer than %d s: it is given up", LONGEST)
    os._exit(0)
