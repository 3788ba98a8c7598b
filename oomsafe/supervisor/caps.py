"""In the supervisor: while workers grow together beyond what the pool has left, the largest of them gets no more memory for now.

Their own limits can't do that: a worker that grows has no time to measure, and does not know of the others. So the supervisor measures
them between its ticks, through descriptors that stay open, and lowers RLIMIT_DATA of one from outside, by prlimit(2). The worker finds on
its slot what was done, so that it keeps to that when it sets its limit anew. A cap ends by itself after CAPPED_FOR.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass

from oomsafe.kernel.capacity import read_capacity
from oomsafe.kernel.kept_sizes import KeptSizes
from oomsafe.kernel.process import stat_of
from oomsafe.kernel.rlimit import SLACK, marked, put_soft, soft_of, thread_size
from oomsafe.log import once
from oomsafe.policy.caps import (
    LATELY,
    MUCH,
    STEADY,
    Grower,
    Window,
    applies,
    ends,
    growers,
    grown_by,
    kept_of,
    may_map,
    moved,
    next_pace,
    pause,
    share_of,
    steady_pace,
    to_cap,
)
from oomsafe.policy.limits import Capacity
from oomsafe.policy.readers import COUNT_CLEAN
from oomsafe.policy.settings import Policy
from oomsafe.policy.units import MIB
from oomsafe.scoreboard.board import Scoreboard
from oomsafe.scoreboard.slot import CAPPED_FOR, Cap

#: The field of /proc/PID/stat with the number of threads, counted from the state (proc(5): the 20th of all, the state is the third).
THREADS = 17

#: The soft value of a worker that starts a process is the application's for a moment, which the process inherits: that is not lowered.
#: A worker's own limit lets it map no more than its hard limit, and this many bytes for what it starts.
STARTS = 64 * MIB


@dataclass
class _Worker:
    """One worker that is watched. Bytes, seconds on the monotonic clock."""

    number: int
    generation: int
    pid: int
    started: int
    at: float = 0.0
    """When it was last measured; 0: never."""
    data: int = 0
    rss: int = 0
    held: int = 0
    least: int | None = None
    """The least that it ever held."""
    gap: int | None = None
    """What it has mapped and will not touch: the least that it ever had, and the stacks of the threads that it has started since."""
    threads: int = 0
    """How many it had when it was first measured; 0: not known."""
    pace: float = 0.0
    window: Window | None = None
    cap: Cap | None = None
    """The cap that is in force for it."""
    capped_at: float = 0.0
    held_then: int = 0
    """When that began, and what it held then."""

    @property
    def grown(self) -> int:
        """By how much it holds more than the least that it ever held."""
        return self.held - (self.held if self.least is None else self.least)

    def grower(self, work: int) -> Grower:
        """As the policy sees it; `work`: see there."""
        untouched = max(0, self.data - self.held)
        steady = 0.0 if self.window is None else steady_pace(self.window, self.held, self.at)
        capped = self.cap is not None and self.at - self.capped_at < LATELY
        return Grower(self.generation, self.held, self.grown, max(0, untouched - (self.gap or 0)), self.pace, work, steady, capped)


class Caps:
    """Caps of one pool's workers. `kept` keeps their descriptors."""

    def __init__(self, board: Scoreboard, kept: KeptSizes) -> None:
        self._board = board
        self._kept = kept
        self._workers: dict[int, _Worker] = {}
        """By generation; empty while nothing is to be watched."""
        self._hard = self._share = self._limit = 0
        self._counts_clean = self._refused = False
        self._room = self._held_then = 0
        """What was left up to the limit when that was last measured, and what the workers held then."""
        self._watched_at = 0.0
        self._marks: tuple[int, ...] | None = None
        """What the scoreboard's marks() were when it was last found out what is to be watched; None: nothing ever is."""

    def others_serve(self) -> bool:
        """Whether a worker has begun to serve since the last follow(), or is gone, and that matters."""
        return self._marks is not None and self._board.marks() != self._marks

    def follow(self, policy: Policy, hard: int | None, capacity: Capacity) -> None:
        """Find out what is to be watched: call it about once a second. `hard`: the hard limit in force, in bytes; None: there is none."""
        on = policy.refuses_memory and hard is not None and not self._refused
        self._marks = self._board.marks() if on else None
        workers = self._present() if on else []
        supervisor, room, wanted = capacity.supervisor or 0, capacity.room, max(capacity.workers, len(workers))
        if not workers or hard is None or room is None or capacity.limit is None or not applies(hard, wanted, supervisor, room):
            for one in self._workers.values():
                self._release(one)
            self._workers = {}
            return
        self._hard, self._limit, self._share = hard, capacity.limit, share_of(room, supervisor, wanted)
        self._counts_clean = policy.metric in COUNT_CLEAN
        self._workers = {one.generation: self._workers.get(one.generation, one) for one in workers}
        if self._may_not(workers[0].pid):
            self._workers = {}
            return
        for one in self._workers.values():
            _note_threads(one)
            self._measure(one)
        self._took(capacity)

    def _present(self) -> list[_Worker]:
        """The workers that have published that the hard limit holds for them."""
        found = []
        for entry in self._board.roll():
            process = self._board.process(entry.number, entry.generation) if entry.hard else None
            if process is not None:
                found.append(_Worker(entry.number, entry.generation, *process))
        return found

    def _may_not(self, pid: int) -> bool:
        """Whether this process may not change a worker's limit, which is logged once."""
        try:
            soft_of(pid)
        except (PermissionError, AttributeError) as error:
            self._refused = True
            once(
                "caps", logging.WARNING, "requests that grow at once in several workers are not stopped at what the pool has left, because "
                "this process may not change its workers' limits (%s): run both as one user, or lower hard_limit", error,
            )  # fmt: skip
        return self._refused

    def watch(self) -> float:
        """Measure, and cap whom to cap. Returns the seconds until the next call is due; inf: there is nothing to watch."""
        if not self._workers:
            return math.inf
        now = time.monotonic()
        since, self._watched_at = now - self._watched_at, now
        for one in self._workers.values():
            self._measure(one)
        measured = [one.grower(self._grown_by_work(one, now)) for one in self._workers.values()]
        growing = growers(measured)
        if growing or any(one.cap for one in self._workers.values()):
            self._took(read_capacity(held=lambda: 0))
        left = self._room - (sum(one.held for one in measured) - self._held_then)
        kept = kept_of(self._limit)
        chosen = {one.generation for one in to_cap(growing, self._share, left, kept, self._hard, since)}
        more = may_map(growing, left, kept, self._hard, since)
        for one in self._workers.values():
            if one.generation in chosen:
                self._cap(one, now, more if one.generation == growing[0].generation else 0)
            elif one.cap is not None and ends(one.held_then, one.held, now - one.capped_at):
                self._release(one)
            elif one.cap is not None:
                self._renew(one, now)
        return pause(measured, left - kept)

    def _took(self, capacity: Capacity) -> None:
        if capacity.limit is not None and capacity.undroppable is not None:
            self._limit, self._room = capacity.limit, capacity.limit - capacity.undroppable
            self._held_then = sum(one.held for one in self._workers.values())

    def _measure(self, one: _Worker) -> None:
        found, now = self._kept.mapped_if(one.pid, one.started), time.monotonic()
        if found is None:  # it is gone, or not known yet
            one.pace, one.at, one.window = 0.0, 0.0, None
            return
        data, rss, anonymous = found
        held = rss if self._counts_clean else anonymous
        seconds = now - one.at
        one.pace = next_pace(one.pace, held - one.held, seconds) if one.at else 0.0
        one.at, one.data, one.rss, one.held = now, data, rss, held
        one.window = moved(one.window, held, now)
        one.least = held if one.least is None else min(one.least, held)
        one.gap = max(0, data - held) if one.gap is None else min(one.gap, max(0, data - held))

    def _grown_by_work(self, one: _Worker, now: float) -> int:
        """By how much it has grown for what it has in flight, by its own record: not more than by what was measured."""
        if one.grown < MUCH or one.window is None:
            return 0
        began = self._board.began_with(one.number)
        # between two requests there is nothing, either: then it is known that nothing grows
        quiet = not began and (self._board.quiet_for(one.number, now) or 0.0) >= 2 * STEADY
        known = [rss for rss in began if rss is not None]
        return min(one.grown, grown_by(known, quiet or len(known) < len(began), one.rss, one.window, one.held))

    def _cap(self, one: _Worker, now: float, more: int) -> None:
        """Let it map `more` bytes, and no more for now."""
        most = marked(one.data + more)
        if one.cap is not None:
            # what it gives back meanwhile, as an old table once the new one is filled, it does not get again unless there is room
            most = min(most, one.cap.before)
            if (most < one.cap.most - SLACK or (more and most > one.cap.most + SLACK)) and soft_of(one.pid) == one.cap.most:
                one.cap = one.cap._replace(most=most)
                self._board.cap(one.number, one.generation, one.cap)
                put_soft(one.pid, most)
            self._renew(one, now)
            return
        # its descriptor has just been read, so it is that process, and its parent has not reaped it since
        soft = soft_of(one.pid)
        if soft is None or not most < soft <= one.data + self._hard + STARTS:
            return
        cap = Cap(most, soft, max(0, self._room), now + CAPPED_FOR)
        one.capped_at, one.held_then = now, one.held
        self._board.cap(one.number, one.generation, cap)
        before = put_soft(one.pid, cap.most)
        one.cap = cap if before is None else cap._replace(before=before)
        self._board.cap(one.number, one.generation, one.cap)

    def _renew(self, one: _Worker, now: float) -> None:
        if one.cap is not None:
            one.cap = one.cap._replace(until=now + CAPPED_FOR, room=min(one.cap.room, max(0, self._room)))
            self._board.cap(one.number, one.generation, one.cap)

    def _release(self, one: _Worker) -> None:
        cap, one.cap = one.cap, None
        if cap is None or self._kept.mapped_if(one.pid, one.started) is None:
            return
        self._board.cap(one.number, one.generation, cap._replace(until=time.monotonic()))
        found = put_soft(one.pid, cap.before)
        if found is not None and found != cap.most:  # the worker has set its limit since
            put_soft(one.pid, found)


def _note_threads(one: _Worker) -> None:
    """Allow for the stacks of threads that the worker has started since this was last called."""
    stat = stat_of(one.pid)
    threads = int(stat[THREADS]) if len(stat) > THREADS and stat[THREADS].isdigit() else 0
    if one.gap is not None and one.threads and threads > one.threads:
        one.gap += (threads - one.threads) * thread_size()
    one.threads = threads or one.threads
