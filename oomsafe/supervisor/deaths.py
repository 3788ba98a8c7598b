"""Which deaths the kernel's OOM counter covers: it rises before its victim is killed, and may rise for others too."""

from __future__ import annotations

import time
from collections.abc import Callable

from oomsafe.kernel.oom_kills import Kills, read_kills
from oomsafe.policy.verdicts import Verdict, verdict

#: Seconds that a rise of the counter waits for the death that it was for: exiting may take that long.
FRESH = 10.0


class Deaths:
    """The supervisor's: look() now and then, judge() when workers have died, and settle() when all of them are judged."""

    def __init__(self, read: Callable[[], Kills | None] = read_kills, clock: Callable[[], float] = time.monotonic) -> None:
        self._read, self._clock = read, clock
        kills = read()
        self._count = kills.total if kills is not None else 0
        self._rises: list[float] = []
        self._others = 0

    def look(self) -> Kills | None:
        """Note when the counter has risen: a rise without a death was another process's, and must not explain a later one."""
        kills, now = self._read(), self._clock()
        if kills is not None:
            fresh = [rise for rise in self._rises if now - rise < FRESH]
            self._others += len(self._rises) - len(fresh)
            self._rises = fresh + [now] * max(0, kills.total - self._count)
            self._count = kills.total
        return kills

    @property
    def risen(self) -> bool:
        """Whether it has within FRESH, and no death has been told of that explains it."""
        return bool(self._rises)

    def others(self) -> int:
        """How many rises since the last call no death of a worker has explained within FRESH: they were for other processes."""
        others, self._others = self._others, 0
        return others

    def judge(self, deaths: int) -> Verdict:
        """Of so many workers that died by SIGKILL at the same time, and nothing else explains it."""
        kills = self.look()
        return verdict(deaths, None if kills is None else len(self._rises), kills is not None and kills.own)

    def settle(self, deaths: int) -> None:
        """They have been judged: so many of the rises are accounted for."""
        del self._rises[:deaths]
