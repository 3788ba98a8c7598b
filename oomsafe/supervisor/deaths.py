"""What workers held and did when they died, read before their slots are reused, and whether the kernel killed them for memory."""

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

#: Seconds for which a rise of the counter may explain a death: a killed process may take that long to exit.
FRESH = 10.0

#: How many judged deaths are remembered, because a server may ask only later what work the worker had.
REMEMBERED = 64

#: How many deaths for memory are kept in full, to be shown.
LAST = 8

#: Stands in place of a verdict for a worker that was stopped at its work's limit, where the cause is certain.
STOPPED = "stopped"


class OomCounter:
    """Which deaths the kernel's OOM counter covers. The counter rises before its victim is killed, and may rise for other processes too.

    Call read() now and then, judge() when workers have died, and settle() when all of them are judged.
    """

    def __init__(self, read: Callable[[], Kills | None] = read_kills, clock: Callable[[], float] = time.monotonic) -> None:
        self._read, self._clock = read, clock
        kills = read()
        self._count = kills.total if kills is not None else 0
        self._rises: list[float] = []
        self._others = 0

    def read(self) -> Kills | None:
        """Note when the counter has risen: a rise without a death was for another process, and must not explain a later death."""
        kills, now = self._read(), self._clock()
        if kills is not None:
            fresh = [rise for rise in self._rises if now - rise < FRESH]
            self._others += len(self._rises) - len(fresh)
            self._rises = fresh + [now] * max(0, kills.total - self._count)
            self._count = kills.total
        return kills

    @property
    def risen(self) -> bool:
        """Whether the counter has risen within FRESH, and no settled death explains that."""
        return bool(self._rises)

    def others(self) -> int:
        """How many rises, since the last call, were not explained by a worker's death within FRESH: they were for other processes."""
        others, self._others = self._others, 0
        return others

    def judge(self, deaths: int) -> Verdict:
        """The verdict on `deaths` workers that died by SIGKILL at the same time, if nothing else explains it."""
        kills = self.read()
        return verdict(deaths, None if kills is None else len(self._rises), kills is not None and kills.own)

    def settle(self, deaths: int) -> None:
        """`deaths` workers have been judged: as many rises are explained."""
        del self._rises[:deaths]


@dataclass(kw_only=True)
class Death:
    """A worker that has died, and what it left on the scoreboard. Sizes in bytes; None is not known."""

    pid: int
    exitcode: int | None
    """As in multiprocessing: a negative number is the signal that ended it."""
    slot: int | None = None
    generation: int | None = None
    ticket: int = 0
    """The ticket of the work that it was inside; 0: it was inside none, so it may have reported the result of its last."""
    in_flight: tuple[str, ...] = ()
    """Printable names of the work that had begun in it and had not ended, according to the worker itself."""
    work: tuple[str, str] | None = None
    """Name and id of the work with that ticket, printable, as its server knows it; None: no work, or not known."""
    rss: int | None = None
    """Its rss when it was last measured."""
    limit: int | None = None
    """The effective limit of its pool when it died."""
    whence: str = ""
    """Where that limit comes from, in words."""
    stopped: Stopped | None = None
    """The work for which its supervisor killed it, because that was over its hard limit; None: it did not."""
    explained: bool = False
    """Whether the server itself ended it, for a time limit or by an order."""
    verdict: Verdict | None = None
    """Whether the kernel killed it for memory; None: not judged yet, or there was nothing to judge."""
    at: float = field(default_factory=time.time)
    """Seconds since 1970."""

    @property
    def is_unexplained_kill(self) -> bool:
        """Whether it died by a SIGKILL that neither its server nor its supervisor sent."""
        return self.exitcode == -signal.SIGKILL and self.stopped is None and not self.explained

    @property
    def for_memory(self) -> str | None:
        """How it was ended for memory: STOPPED, or the verdict if that blames the kernel; None: not for memory, as far as is known."""
        if self.stopped is not None:
            return STOPPED
        return self.verdict.value if self.verdict in (Verdict.CONFIRMED, Verdict.LIKELY) else None


class Deaths:
    """The deaths in one pool. Used in the thread that reaps workers; `counts` and `last` may be read in any thread.

    The order of calls: counter.read() before workers are reaped; for each reaped worker, read() while its slot still belongs to it, then
    record(); settle() once all workers that were reaped at the same time are recorded. judge() in between if a verdict is needed sooner.
    """

    def __init__(
        self, board: Scoreboard | None, capacity: Callable[[], Capacity], watcher: Watcher | None = None, counter: OomCounter | None = None
    ) -> None:
        self.counter = counter or OomCounter()
        self.counts: dict[str, int] = {}
        """The number of deaths for memory since the pool began, by Death.for_memory."""
        self.last: tuple[Death, ...] = ()
        """The last LAST deaths for memory, the latest first."""
        self._board = board
        self._capacity = capacity
        self._watcher = watcher
        self._recorded: dict[int, Death] = {}
        self._unsettled: list[Death] = []

    def read(self, number: int | None, generation: int | None, *, pid: int, exitcode: int | None) -> Death:
        """What the worker of this slot has left in it. Call it once, before the slot is released; `number` None: the worker had no slot."""
        capacity = self._capacity()
        death = Death(pid=pid, exitcode=exitcode, limit=capacity.limit, whence=capacity.whence)
        if self._board is None or number is None or generation is None:
            return death
        death.slot, death.generation = number, generation
        death.ticket, before = self._board.hand(number, generation)
        try:
            left = view_alone(self._board.slot(number, generation).copy()).workers[0]
            death.in_flight, published = tuple(work.name for work in left.in_flight), left.figures.rss
        except ScoreboardError:  # the slot belongs to another worker, or the worker has overwritten its owner
            published = None
        measured, death.stopped = self._watcher.forget(generation) if self._watcher is not None else (None, None)
        # for a worker without work, the published figure is newer, because the watcher measures only workers that have work
        death.rss = (measured or before or published) if death.ticket else (published or measured)
        return death

    def record(self, death: Death) -> None:
        """Record a death with everything that the server knows about it. If the kernel may have caused it, it is counted by settle()."""
        self._recorded[death.pid] = death
        if death.is_unexplained_kill:
            self._unsettled.append(death)
        else:
            self._count(death)

    def of(self, pid: int | None) -> Death | None:
        """The last recorded death of a process with this pid; None if none is remembered."""
        return None if pid is None else self._recorded.get(pid)

    def judge(self) -> None:
        """Judge all that died at the same time together, because the counter tells how many the kernel killed, not which."""
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
