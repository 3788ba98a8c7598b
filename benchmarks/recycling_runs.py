"""One run of one contestant of recycling.py: its server, a load, and what became of its workers."""

from __future__ import annotations

import re
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import common
from common import TIMEOUT, Server, Watch, ask
from contestants import AGAIN, LIMITS, MEASURED, NOT, ServerClass, Tuning, tuned

#: Seconds that each load of a calibration lasts.
CALIBRATION = 2.0

#: Seconds after the last answer until a worker that has drained is gone.
GONE = 2.0

#: What gunicorn's log says of a worker that did not end by itself; the group is its pid.
KILLED = re.compile(r"(?:WORKER TIMEOUT \(|Worker \()pid:(\d+)\)(?:$| was sent SIG(?!TERM))", re.MULTILINE)


@dataclass
class Run:
    """What clients and watch saw. Sums are over all loads of the run, latencies of the last."""

    requests: int = 0
    failed: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    asked: Counter[str] = field(default_factory=Counter)
    announced: int = 0
    closed_idle: int = 0
    rate: float = 0
    p50: float = 0
    p99: float = 0
    max: float = 0
    longest: float = 0
    """Seconds that a request waited at most, also one that failed."""
    unserved: float = 0
    """Seconds in which nobody was answered, in pauses of more than verifying_load.PAUSE."""
    pause: float = 0
    """Seconds of the longest of these."""
    peak: int = 0
    """The largest VmHWM of a worker, in bytes."""
    recycles: int = 0
    """Workers that were there, and are gone."""
    board: int | None = None
    """What oomsafe's scoreboard counted; those who have not ended yet included. None without oomsafe."""
    first_gone: int = 0
    """Of the workers that were there when the load began."""
    killed: int = 0
    """Workers that gunicorn gave up, or that ended by a signal other than SIGTERM; by its log. uvicorn does not tell."""

    def add(self, seen: dict[str, Any]) -> None:
        """One load more, as verifying_load.py prints it."""
        for key in ("requests", "failed", "announced", "closed_idle"):
            setattr(self, key, getattr(self, key) + seen[key])
        self.failures.update(seen["failures"])
        self.asked.update(seen["asked"])
        self.longest = max(self.longest, seen["longest"])
        self.unserved += seen["unserved"]["total"]
        self.pause = max(self.pause, seen["unserved"]["longest"])
        self.rate, self.p50, self.p99, self.max = (seen[key] for key in ("rate", "p50", "p99", "max"))

    def doubt(self, way: str) -> str | None:
        """Why this contestant did not do what its row says; None: it did."""
        if way in LIMITS and self.board is None:
            return "no scoreboard"
        if way in (NOT, AGAIN, MEASURED):
            return f"{self.recycles} workers ended" if self.recycles else None
        if not self.recycles:
            return "no recycle"
        if self.board is not None and not 0 <= self.board - self.recycles <= 2:
            return f"the scoreboard has {self.board}"
        return None


class Watched:
    """A contestant's server under watch. Inside the context it is loaded; afterwards `run` is complete."""

    def __init__(self, server: Server, cls: ServerClass, way: str) -> None:
        self.run = Run()
        self.server = server
        self._cls, self._way = cls, way
        self._watch = Watch(server)
        self._first: set[int] = set()

    def __enter__(self) -> Watched:
        self.server.__enter__()
        try:
            self.server.settle(self._cls.processes)
            prove_loop(self.server, self._cls)
        except BaseException:
            self.server.__exit__()
            raise
        self._first = self.server.forked()
        self._watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._watch.stop()
            self.look()
            self.run.killed = len(set(KILLED.findall(self.server.log())))
        finally:
            self.server.__exit__()

    def look(self) -> None:
        """Count the recycles until now."""
        here = self.server.forked()
        self.run.recycles = len(self._watch.peaks.keys() - here)
        self.run.peak = max(self._watch.peaks.values(), default=0)
        self.run.first_gone = len(self._first - here)
        self.run.board = recycled(self.server) if self._way in LIMITS else None

    def ask(self, seconds: float, rate: float, *, path: str = "/leak", slow: int = 0, timeout: float = TIMEOUT) -> None:
        """The verifying clients, for so long; `slow` of them ask /slow once."""
        self.run.add(ask(self.server, path, seconds, rate, slow=slow, timeout=timeout))


def recycled(server: Server) -> int | None:
    """How many workers of `server` have begun to recycle, by its scoreboard; None when it has none."""
    pool = server.find_pool()
    return None if pool is None else sum(pool.totals.recycles)


def prove_loop(server: Server, cls: ServerClass) -> None:
    """The event loop is the one that the row names."""
    if cls.loop is not None:
        body: Any = server.get("/loop")
        assert body.body.decode().startswith(cls.loop), f"{cls.name} runs on {body.body.decode()}"


def verified(cls: ServerClass, way: str, tuning: Tuning, seconds: float) -> Run:
    """One load by the verifying clients."""
    with Watched(cls.server(way, tuning), cls, way) as watched:
        watched.ask(seconds, tuning.rate)
    return watched.run


def saturated(cls: ServerClass, way: str, tuning: Tuning, seconds: float) -> Run:
    """One load by wrk."""
    with Watched(cls.server(way, tuning), cls, way) as watched:
        load = common.wrk(watched.server, "/leak?wrk", seconds)
    run = watched.run
    run.requests, run.failed, run.rate, run.p99 = load.requests, load.failed, load.rate, load.p99
    return run


def until(cls: ServerClass, way: str, tuning: Tuning, goal: Goal) -> Run:
    """Load after load, on one server, until enough was asked over enough recycles, or the time is over."""
    with Watched(cls.server(way, tuning), cls, way) as watched:
        run = watched.run
        for _ in range(max(1, round(goal.limit / goal.seconds))):
            watched.ask(goal.seconds, tuning.rate)
            watched.look()
            if run.requests >= goal.requests and run.recycles >= goal.recycles:
                break
    return run


@dataclass(frozen=True)
class Goal:
    """How much is enough: both of them, or `limit` seconds; one load lasts `seconds`."""

    requests: int
    recycles: int
    limit: float
    seconds: float


def held(cls: ServerClass, way: str, tuning: Tuning, *, slow: float, clients: int, seconds: float) -> Run:
    """`clients` requests that take `slow` seconds, under a --timeout of 3, while others make all workers recycle for `seconds`."""
    with Watched(cls.server(way, tuning, timeout=3, slow=slow), cls, way) as watched:
        watched.ask(seconds, tuning.rate, slow=clients, timeout=slow * 2 + TIMEOUT)
        time.sleep(GONE)
    return watched.run


def calibrate(cls: ServerClass, load: float, every: float) -> tuple[Tuning, Tuning]:
    """Of the verifying clients at a share `load` of what the server can, and of wrk; measured without any recycling."""
    with cls.server(NOT, Tuning(0)) as server:
        server.settle(cls.processes)
        rate = ask(server, "/leak", CALIBRATION, 0)["rate"]
        resident = max(common.status_of(pid, "VmRSS") for pid in server.forked())
    # leaking costs time by itself, and wrk's rate has to be the one under a leak
    with cls.server(NOT, tuned(rate, 0, resident, every)) as server:
        server.settle(cls.processes)
        wrk_rate = common.wrk(server, "/leak?wrk", CALIBRATION).rate
    return tuned(rate, rate * load, resident, every), tuned(wrk_rate, 0, resident, every)
