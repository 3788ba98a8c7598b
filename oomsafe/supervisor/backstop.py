"""Kills a worker that stays above its hard limit: the last resort where the kernel does not refuse it the memory."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial

from oomsafe.kernel.process import sizes_of
from oomsafe.log import attempt, log
from oomsafe.policy.backstop import Over, follow, is_due, line_of
from oomsafe.policy.death_line import Flight, doing
from oomsafe.policy.readers import COUNT_CLEAN
from oomsafe.policy.settings import Policy
from oomsafe.policy.units import format_size
from oomsafe.scoreboard.board import Entry, Scoreboard
from oomsafe.scoreboard.view import WorkerView
from oomsafe.supervisor.watcher import Stopped, kill_if

#: Seconds between two checks.
MEASURE_EVERY = 0.5

#: Why a worker that the backstop has killed counts as recycled.
KILLED = "killed"


class Backstop:
    """Measures each worker of a pool with a hard limit from outside. `sizes_if` is that of a KeptSizes."""

    def __init__(self, board: Scoreboard, sizes_if: Callable[[int, int], tuple[int, int] | None]) -> None:
        self._board = board
        self._sizes_if = sizes_if
        self.may_kill: Callable[[Entry, int, int], bool] = lambda *_: True
        """Called right before a kill, while the worker stands still: (worker, what it holds, its hard limit). False: it stays."""
        self.killed: dict[int, Stopped] = {}
        """By generation: the workers that it has killed, with what they held. Whoever reads their death takes them out."""
        self._measure_at = 0.0
        self._over: dict[int, Over] = {}
        self._line = 0
        self._said: set[int] = set()
        """In a dry run: the generations of the workers that would have been killed."""

    def tick(self, policy: Policy, hard: Callable[[], int | None], within_budget: Callable[[], bool], now: float) -> None:
        """Do what is due. `hard`: the hard limit in bytes, None: there is none; `now` is on the monotonic clock."""
        if policy.hard_limit is None or now < self._measure_at:
            return
        self._measure_at = now + MEASURE_EVERY
        limit = hard()
        if limit is None:
            self._over = {}
            return
        line, before = line_of(limit), self._line
        found: dict[int, Over] = {}
        # a worker that has refused the limit, because it holds more right after boot, publishes none
        for entry in [entry for entry in self._board.roll() if entry.hard]:
            process = self._board.process(entry.number, entry.generation)
            held = None if process is None or process[0] == os.getpid() else self._held(policy, self._sizes_if(*process))
            over = None if held is None else follow(self._over.get(entry.generation), entry.state, held, line, before, now)
            if over is None or process is None or held is None:
                continue
            found[entry.generation] = over
            if is_due(over, held, within_budget(), policy.grace_period, now):
                kill = partial(self._kill, policy, entry, *process, limit, now - over.since)
                attempt("a worker above its hard limit", "the server", kill)
        self._over, self._line = found, line

    def _held(self, policy: Policy, sizes: tuple[int, int] | None) -> int | None:
        """What the hard limit counts of these sizes, except dirty file pages, which can't be told apart from outside."""
        return None if sizes is None else sizes[0] if policy.metric in COUNT_CLEAN else sizes[1]

    def _kill(self, policy: Policy, entry: Entry, pid: int, started: int, limit: int, seconds: float) -> None:
        if policy.dry_run and entry.generation in self._said:
            return
        held = self._held(policy, self._sizes_if(pid, started)) or 0
        doing = self._doing(entry.generation)

        def is_over() -> bool:
            nonlocal held
            held = self._held(policy, sizes_of(pid)) or 0  # measured anew, and not from the cache of this tick
            return held > line_of(limit) and self.may_kill(entry, held, limit)

        if policy.dry_run:
            self._said.add(entry.generation)
        elif not kill_if(pid, started, is_over):
            return
        else:
            self.killed[entry.generation] = Stopped(0, held, limit)
        self._board.count_recycle(KILLED)
        line = (
            f"worker {pid} (slot {entry.number}) {'would be killed (dry run)' if policy.dry_run else 'is killed'}: it holds "
            f"{format_size(held)} > hard limit {format_size(limit)} for {seconds:.1f} s, and the kernel did not refuse it that; {doing}. "
            "Shared memory and mapped files count here and not for the kernel's limit: have it map less at once, or raise hard_limit"
        )
        log.error("%s", line)
        self._board.header.note_recycle(line)

    def _doing(self, generation: int) -> str:
        """What the worker has in flight, by its own record."""
        worker = next((worker for worker in self._board.read().workers if worker.generation == generation), None)
        return in_flight(worker, time.time())


def flights_of(worker: WorkerView, now: float) -> list[Flight]:
    """What it has in flight by its own record, the oldest first; `now` in seconds since 1970."""
    return [
        Flight(work.name, now - work.began, worker.grown(work), work.rss) for work in sorted(worker.in_flight, key=lambda one: one.began)
    ]


def in_flight(worker: WorkerView | None, now: float) -> str:
    """``in flight: GET /export (4.2 s, +310 MiB)``; `now` in seconds since 1970."""
    return doing([] if worker is None else flights_of(worker, now))
