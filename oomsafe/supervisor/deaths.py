"""What workers held and did when they died, read before their slots are reused, and how each of them ended."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from oomsafe.errors import ScoreboardError
from oomsafe.kernel.oom_kills import Kills, oomd_kills, read_kills
from oomsafe.kernel.oom_victims import Victim, Victims, oom_victims, sees_initial_pids
from oomsafe.kernel.process import is_dying, userspace_killers
from oomsafe.log import log
from oomsafe.policy.death_line import Beside, DeathRecord, Flight, line_of
from oomsafe.policy.ends import By, End, Facts, end_of, is_unexplained_kill
from oomsafe.policy.limits import Capacity
from oomsafe.policy.state import State
from oomsafe.policy.verdicts import Count, Verdict, verdicts
from oomsafe.scoreboard.board import Scoreboard
from oomsafe.scoreboard.slot import comm_of
from oomsafe.scoreboard.view import WorkerView, view_of_one
from oomsafe.supervisor.backstop import flights_of
from oomsafe.supervisor.watcher import Stopped, Watcher

#: Seconds for which a rise of the counter may explain a death: a killed process may take that long to exit.
FRESH = 10.0

#: How many judged deaths are remembered, because a server may ask only later what work the worker had.
REMEMBERED = 64

#: How many deaths are kept in full, to be shown.
LAST = 8

#: Seconds before a worker's death from which on the kernel's log may name it: a big process takes a while to exit, and the log's clock
#: drifts from the monotonic one.
LOGGED = 60.0

#: The verdicts that blame the kernel.
KERNELS = (Verdict.CONFIRMED, Verdict.LIKELY)


class OomCounter:
    """Which deaths the kernel's OOM counter covers. The counter rises before its victim is killed, and may rise for other processes too.

    Call read() now and then, count() when workers have died, and settle() when all of them are judged.
    """

    def __init__(self, read: Callable[[], Kills | None] = read_kills, clock: Callable[[], float] = time.monotonic) -> None:
        self._read, self._clock = read, clock
        kills = read()
        self._count = kills.total if kills is not None else 0
        self._rises: list[float] = []
        self._doubtful = 0
        """How many of them, the first ones, may have been those of deaths that were settled as likely."""
        self._others = 0

    def read(self) -> Kills | None:
        """Note when the counter has risen: a rise without a death was for another process, and must not explain a later death."""
        kills, now = self._read(), self._clock()
        if kills is not None:
            fresh = [rise for rise in self._rises if now - rise < FRESH]
            old = len(self._rises) - len(fresh)
            self._others += max(0, old - self._doubtful)
            self._doubtful = max(0, self._doubtful - old)
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

    def count(self) -> Count:
        """By how much it has risen within FRESH for deaths that are not settled yet."""
        kills = self.read()
        return Count(None if kills is None else len(self._rises), kills is not None and kills.own, self._doubtful)

    def settle(self, deaths: int, likely: int = 0, dying: int = 0) -> None:
        """As many rises are explained by `deaths` of workers, and perhaps by `likely` more.

        While others are still `dying`, the rises that these may have had are kept for them, and explain none of them for certain.
        """
        del self._rises[:deaths]
        if not dying:
            del self._rises[:likely]
        self._doubtful = len(self._rises) if likely and dying else min(self._doubtful, len(self._rises))


class Ended(NamedTuple):
    """A worker that its server has reaped."""

    pid: int
    exitcode: int | None
    """As in multiprocessing: a negative number is the signal that ended it. None: the server does not tell."""
    by: By | None = None
    """Why the server ended it; None: it did not."""
    killed_by_server: bool = False
    """Whether the server sent it SIGKILL."""
    peak: int | None = None
    """The greatest rss that it ever had, in bytes (ru_maxrss of wait4(2)); None: not known."""


@dataclass(kw_only=True)
class Death:
    """A worker that has died, and what it left on the scoreboard. Sizes in bytes; None is not known."""

    pid: int
    exitcode: int | None
    """As in multiprocessing: a negative number is the signal that ended it. None: its server does not tell."""
    slot: int | None = None
    generation: int | None = None
    comm: bytes = b""
    """The name by which the kernel's log would call it."""
    ticket: int = 0
    """The ticket of the work that it was inside; 0: it was inside none, so it may have reported the result of its last."""
    flights: tuple[Flight, ...] = ()
    """The work that had begun in it and had not ended, according to the worker itself, the greatest growth first."""
    work: tuple[str, str] | None = None
    """Name and id of the work with that ticket, printable, as its server knows it; None: no work, or not known."""
    rss: int | None = None
    """Its rss when it was last measured."""
    held: int | None = None
    """What its soft limit was compared with then."""
    baseline: int | None = None
    soft: int | None = None
    hard: int | None = None
    limit: int | None = None
    """The effective limit of its pool when it died."""
    whence: str = ""
    """Where that limit comes from, in words."""
    workers: int = 0
    beside: Beside | None = None
    state: State | None = None
    """By its own record; None: not known."""
    recycled: bool = False
    """Whether it has counted its own recycle."""
    stopped: Stopped | None = None
    """The work for which its supervisor killed it, because that was over its hard limit; None: it did not."""
    by: By | None = None
    """Why its server ended it; None: it did not."""
    killed_by_server: bool = False
    """Whether its server sent it SIGKILL."""
    peak: int | None = None
    """The greatest rss that it ever had."""
    died_with: int | None = None
    """What it held when the kernel killed it, by the kernel's log."""
    oomd: bool = False
    verdict: Verdict | None = None
    """Whether the kernel killed it for memory; None: not judged yet, or there was nothing to judge."""
    evidence: str = ""
    """Why the verdict is as sure as it is."""
    end: End | None = None
    """How it ended; None: not settled yet."""
    at: float = field(default_factory=time.time)
    """Seconds since 1970."""

    @property
    def in_flight(self) -> tuple[str, ...]:
        """Printable names of what it had in flight."""
        return tuple(flight.name for flight in self.flights)

    @property
    def facts(self) -> Facts:
        """What tells how it ended."""
        left = self.state is State.LEAVING
        recycled = self.recycled and self.state is not None and self.state.leaves
        return Facts(self.exitcode, self.by, self.killed_by_server, left, recycled, self.stopped is not None, self.oomd)

    @property
    def is_unexplained_kill(self) -> bool:
        """Whether it died by a SIGKILL that neither its server nor its supervisor sent."""
        return is_unexplained_kill(self.facts)

    def record(self, killers: tuple[str, ...] = ()) -> DeathRecord:
        """All of it, once it is settled."""
        flights = self.flights
        if self.died_with is not None and len(flights) == 1 and flights[0].then is not None:  # all that it has grown by since then
            flights = (flights[0]._replace(grown=self.died_with - flights[0].then),)
        if self.work is not None and len(flights) == 1:  # its server knows the work better than the worker's own short name
            flights = (flights[0]._replace(name=f"{self.work[0]}[{self.work[1]}]"),)
        mine: dict[str, Any] = {
            "pid": self.pid, "slot": self.slot, "exitcode": self.exitcode, "at": self.at, "by": self.by, "evidence": self.evidence,
            "died_with": self.died_with, "peak": self.peak, "baseline": self.baseline, "soft_limit": self.soft, "hard_limit": self.hard,
            "limit": self.limit, "whence": self.whence, "workers": self.workers, "beside": self.beside,
        }  # fmt: skip
        end, held = self.end or end_of(self.facts, self.verdict), self.rss if self.held is None else self.held
        booting = self.state is State.STARTING
        record = DeathRecord(**mine, end=end, held=held, booting=booting, in_flight=flights, killers=killers)
        return replace(record, line=line_of(record))


class Deaths:
    """The deaths in one pool. Used in the thread that reaps workers; `counts` and `last` may be read in any thread.

    The order of calls: counter.read() before workers are reaped; for each reaped worker, read() while its slot still belongs to it, then
    record(); settle() once all workers that were reaped at the same time are recorded. judge() in between if a verdict is needed sooner.
    """

    def __init__(
        self,
        board: Scoreboard | None,
        capacity: Callable[[], Capacity],
        watcher: Watcher | None = None,
        counter: OomCounter | None = None,
        *,
        victims: Callable[[float], Victims | None] = oom_victims,
        announce: Callable[[DeathRecord], Any] = lambda _: None,
    ) -> None:
        """`victims(since)`: whom the kernel's log names. `announce` is called with each end that is not in order, after it was logged."""
        self.counter = counter or OomCounter()
        self.watcher = watcher
        """Measures running work from outside, for servers that have one."""
        self.killed: dict[int, Stopped] = {}
        """By generation: the workers that their supervisor has killed above their hard limit."""
        self.counts: dict[End, int] = {}
        """The number of ends of each kind since the pool began."""
        self.last: tuple[Death, ...] = ()
        """The last LAST deaths for memory, the latest first."""
        self.lines: tuple[str, ...] = ()
        """The lines about the last LAST ends that were not in order, the latest first."""
        self.announce = announce
        self._board = board
        self._capacity = capacity
        self._victims = victims
        self._oomd = oomd_kills()
        self._recorded: dict[int, Death] = {}
        self._unsettled: list[Death] = []
        self._still_dying = 0
        """How many more workers were about to die when the last ones were judged."""

    def read(self, number: int | None, generation: int | None, ended: Ended) -> Death:
        """What the worker of this slot has left in it. Call it once, before the slot is released; `number` None: the worker had no slot."""
        capacity = self._capacity()
        death = Death(**ended._asdict(), limit=capacity.limit, whence=capacity.whence, workers=capacity.workers)
        if self._board is None or number is None or generation is None:
            return death
        death.slot, death.generation = number, generation
        death.ticket, before = self._board.hand(number, generation)
        published = None
        try:
            slot = self._board.slot(number, generation)
            death.comm = comm_of(self._board.owner, slot).encode()
            worker = view_of_one(slot.copy()).workers[0]
            published = worker.figures.rss
            _take_over(death, worker)
        except ScoreboardError:  # the slot belongs to another worker, or the worker has overwritten its owner
            pass
        death.beside = self._beside(generation, capacity)
        measured, death.stopped = self.watcher.forget(generation) if self.watcher is not None else (None, None)
        death.stopped = death.stopped or self.killed.pop(generation, None)
        # for a worker without work, the published figure is newer, because the watcher measures only workers that have work
        death.rss = (measured or before or published) if death.ticket else (published or measured)
        return death

    @property
    def died(self) -> int:
        """How many ends were not in order."""
        return sum(count for end, count in self.counts.items() if not end.in_order)

    def _beside(self, generation: int, capacity: Capacity) -> Beside:
        others = [entry for entry in self._board.roll() if entry.generation != generation] if self._board is not None else []
        sizes = [size for entry in others if (size := entry.anon if entry.rss is None else entry.rss) is not None]
        return Beside(len(others), sum(sizes) if sizes or not others else None, capacity.supervisor)

    def record(self, death: Death) -> None:
        """Record a death with everything that the server knows about it. It is counted and logged by settle()."""
        self._recorded[death.pid] = death
        self._unsettled.append(death)

    def of(self, pid: int | None) -> Death | None:
        """The last recorded death of a process with this pid; None if none is remembered."""
        return None if pid is None else self._recorded.get(pid)

    def judge(self) -> None:
        """Judge all that died at the same time together, because the counter tells how many the kernel killed, not which."""
        kills = [death for death in self._unsettled if death.is_unexplained_kill]
        if all(death.verdict is not None for death in kills):
            return
        count = self.counter.count()
        log_of = self._victims(time.monotonic() - LOGGED) if kills else None
        named = [_victim(death, log_of) for death in kills]
        self._still_dying = self._dying()
        judged = verdicts([one is not None for one in named], self._still_dying, count)
        complete = log_of is not None and log_of.complete and sees_initial_pids()
        for death, one, (found, evidence) in zip(kills, named, judged, strict=True):
            death.died_with = None if one is None else one.held
            other = one is None and complete and found in KERNELS  # it has killed another process meanwhile
            death.verdict, death.evidence = (Verdict.NOT_THE_KERNEL, "the kernel's log does not name it") if other else (found, evidence)
        oomd, before = oomd_kills(), self._oomd
        self._oomd = oomd
        for death in kills:
            death.oomd = oomd is not None and oomd > (before or 0)

    def _dying(self) -> int:
        """How many more workers are about to die by a signal: the counter may have risen for them already."""
        gone = {death.pid for death in self._unsettled}
        born = self._board.born_processes if self._board is not None else []
        return sum(pid not in gone and is_dying(pid, started) for pid, started in born)

    def settle(self) -> None:
        """All workers that were reaped at the same time have been recorded: count them, and log each end that is not in order."""
        if not self._unsettled:
            return
        self.judge()
        settled, self._unsettled = self._unsettled, []
        sure, likely = (sum(death.verdict is one for death in settled) for one in KERNELS)
        self.counter.settle(sure, likely, self._still_dying)
        killers: tuple[str, ...] | None = None
        for death in settled:
            death.end = end_of(death.facts, death.verdict)
            self.counts = {**self.counts, death.end: self.counts.get(death.end, 0) + 1}
            if death.end.for_memory:
                self.last = (death, *self.last)[:LAST]
            if death.end in (End.SIGNAL, End.UNKNOWN) and death.is_unexplained_kill and killers is None:
                killers = tuple(userspace_killers())
            self._say(death, death.record(killers or ()))
        while len(self._recorded) > REMEMBERED:
            del self._recorded[next(iter(self._recorded))]

    def _say(self, death: Death, record: DeathRecord) -> None:
        if self._board is not None:
            self._board.header.note_death(record.end, None if record.end.in_order else record.line, record.at)
        if record.end.in_order:
            return
        self.lines = (record.line, *self.lines)[:LAST]
        if record.end is not End.LIMIT:  # whoever killed it has logged it
            log.log(logging.ERROR if record.end.for_memory else logging.WARNING, "%s", record.line)
        self.announce(record)


def _take_over(death: Death, worker: WorkerView) -> None:
    """What the worker has published itself: untrusted, and in its range."""
    figures = worker.figures
    death.state, death.held, death.baseline, death.soft, death.hard = (
        worker.state,
        worker.used,
        figures.baseline,
        figures.soft,
        figures.hard,
    )
    death.recycled = sum(worker.counters.recycles) > 0
    death.flights = tuple(sorted(flights_of(worker, death.at), key=lambda flight: -(flight.grown or 0)))


def _victim(death: Death, log_of: Victims | None) -> Victim | None:
    """What the kernel's log says of this death; None: nothing."""
    if log_of is None:
        return None
    pids = sees_initial_pids()
    mine = (one for one in reversed(log_of.killed) if (death.comm and one.name == death.comm) or (pids and one.pid == death.pid))
    return next(mine, None)
