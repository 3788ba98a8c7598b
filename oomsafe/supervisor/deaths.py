"""What workers died with, and of: read from a slot before that is given to another worker, and judged by the kernel's OOM counter."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from oomsafe.errors import ScoreboardError
from oomsafe.kernel.oom_kills import Kills, read_kills
from oomsafe.policy.limits import Capacity
from oomsafe.policy.verdicts import Verdict, verdict
from oomsafe.scoreboard.board import Scoreboard
from oomsafe.scoreboard.view import view_alone
from oomsafe.supervisor.watcher import Stopped, Watcher

#: Seconds that a rise of the counter waits for the death that it was for: exiting may take that long.
FRESH = 10.0

#: Deaths that are remembered once they are judged: a server may hear only later what they had in hand.
REMEMBERED = 64

#: Deaths for memory of which everything is kept, to be shown.
LAST = 8

#: In place of a verdict on a worker that was stopped at its work's limit: nobody has to guess there.
STOPPED = "stopped"


class OomCounter:
    """Which deaths the kernel's OOM counter covers: it rises before its victim is killed, and may rise for others too.

    read() now and then, judge() when workers have died, and settle() when all of them are judged.
    """

    def __init__(self, read: Callable[[], Kills | None] = read_kills, clock: Callable[[], float] = time.monotonic) -> None:
        self._read, self._clock = read, clock
        kills = read()
        self._count = kills.total if kills is not None else 0
        self._rises: list[float] = []
        self._others = 0

    def read(self) -> Kills | None:
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
        """Whether it has within FRESH, and no death that has been settled explains it."""
        return bool(self._rises)

    def others(self) -> int:
        """How many rises since the last call no death of a worker has explained within FRESH: they were for other processes."""
        others, self._others = self._others, 0
        return others

    def judge(self, deaths: int) -> Verdict:
        """Of so many workers that died by SIGKILL at the same time, and nothing else explains it."""
        kills = self.read()
        return verdict(deaths, None if kills is None else len(self._rises), kills is not None and kills.own)

    def settle(self, deaths: int) -> None:
        """They have been judged: so many of the rises are accounted for."""
        del self._rises[:deaths]


@dataclass(kw_only=True)
class Death:
    """A worker that has died, with what it left on the scoreboard. Sizes in bytes; None is not known."""

    pid: int
    exitcode: int | None
    """As multiprocessing has it: negative is the number of the signal that ended it."""
    slot: int | None = None
    generation: int | None = None
    ticket: int = 0
    """Of the work that it was inside of; 0: of none, so what it had to report it may have reported."""
    in_flight: tuple[str, ...] = ()
    """Printable names of what had begun in it and had not ended, by its own word."""
    work: tuple[str, str] | None = None
    """Name and id of the work with that ticket, printable, as its server knows it; None: it had none, or nobody knows which."""
    rss: int | None = None
    """When it was last measured."""
    limit: int | None = None
    """The effective limit of its pool when it died."""
    whence: str = ""
    """Where that comes from, in words."""
    stopped: Stopped | None = None
    """Its supervisor killed it for this work, which was over its hard limit."""
    explained: bool = False
    """Whether the server itself ended it: a time limit, an order."""
    verdict: Verdict | None = None
    """Whether it was the kernel; None: nobody has asked, or there was nothing to ask."""
    at: float = field(default_factory=time.time)
    """Seconds since 1970."""

    @property
    def is_unexplained_kill(self) -> bool:
        """Whether it died by SIGKILL, and neither its server nor its supervisor sent that."""
        return self.exitcode == -signal.SIGKILL and self.stopped is None and not self.explained

    @property
    def for_memory(self) -> str | None:
        """Who ended it for memory: STOPPED, or the verdict where that says the kernel; None: nobody, as far as is known."""
        if self.stopped is not None:
            return STOPPED
        return self.verdict.value if self.verdict in (Verdict.CONFIRMED, Verdict.LIKELY) else None


class Deaths:
    """Of one pool, in the thread that reaps; `counts` and `last` may be read in any.

    In this order: counter.read() before workers are reaped; for each that was, read() while its slot is its own, then record(); and
    settle() once all that were reaped at the same time are recorded. judge() in between where a verdict is needed sooner.
    """

    def __init__(
        self, board: Scoreboard | None, capacity: Callable[[], Capacity], watcher: Watcher | None = None, counter: OomCounter | None = None
    ) -> None:
        self.counter = counter or OomCounter()
        self.counts: dict[str, int] = {}
        """Deaths for memory since the pool began, by who ended the worker: see Death.for_memory."""
        self.last: tuple[Death, ...] = ()
        """The last LAST of these, the latest first."""
        self._board = board
        self._capacity = capacity
        self._watcher = watcher
        self._recorded: dict[int, Death] = {}
        self._unsettled: list[Death] = []

    def read(self, number: int | None, generation: int | None, *, pid: int, exitcode: int | None) -> Death:
        """What the worker of this slot has left there. To be called once, before the slot is released; `number` None: it had no slot."""
        capacity = self._capacity()
        death = Death(pid=pid, exitcode=exitcode, limit=capacity.limit, whence=capacity.whence)
        if self._board is None or number is None or generation is None:
            return death
        death.slot, death.generation = number, generation
        death.ticket, before = self._board.hand(number, generation)
        try:
            left = view_alone(self._board.slot(number, generation).copy()).workers[0]
            death.in_flight, published = tuple(work.name for work in left.in_flight), left.figures.rss
        except ScoreboardError:  # the slot is another's, or the worker has written over whose it is
            published = None
        measured, death.stopped = self._watcher.forget(generation) if self._watcher is not None else (None, None)
        # of one without work, what it has published is newer: the watcher measures those that have some
        death.rss = (measured or before or published) if death.ticket else (published or measured)
        return death

    def record(self, death: Death) -> None:
        """With all that its server knows of it. One that may have been the kernel's counts when it is settled."""
        self._recorded[death.pid] = death
        if death.is_unexplained_kill:
            self._unsettled.append(death)
        else:
            self._count(death)

    def of(self, pid: int | None) -> Death | None:
        """The last recorded death of a process with this pid, if it is remembered."""
        return None if pid is None else self._recorded.get(pid)

    def judge(self) -> None:
        """All that died at the same time, together: the counter tells how many the kernel killed, never whom."""
        if any(death.verdict is None for death in self._unsettled):
            found = self.counter.judge(len(self._unsettled))
            for death in self._unsettled:
                death.verdict = found

    def settle(self) -> None:
        """All workers that were reaped at the same time have been recorded."""
        self.judge()
        self.counter.settle(len(self._unsettled))
        for death in self._unsettled:
            self._count(death)
        self._unsettled.clear()
        while len(self._recorded) > REMEMBERED:
            del self._recorded[next(iter(self._recorded))]

    def _count(self, death: Death) -> None:
        why = death.for_memory
        if why is not None:
            self.last = (death, *self.last)[:LAST]
            self.counts = {**self.counts, why: self.counts.get(why, 0) + 1}
