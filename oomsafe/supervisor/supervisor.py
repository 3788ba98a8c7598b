"""The supervisor's part: the pool's scoreboard, a slot for each worker, and who dies first.

Nothing here runs a thread or waits: a server's adapter calls it from the server's own hooks.
"""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

from oomsafe.errors import ScoreRefused
from oomsafe.kernel.capacity import read_capacity
from oomsafe.kernel.cgroup import find_cgroup
from oomsafe.kernel.oom_score import read_score, write_score
from oomsafe.kernel.process import anonymous_of, descendants_of, is_alive, sizes_of
from oomsafe.log import attempt, log, said
from oomsafe.policy.boot_line import called, dry, limits_in_force
from oomsafe.policy.limits import Capacity, Limits, resolve_limits, turns
from oomsafe.policy.readers import LONGEST_NAME, SCORE_MAX
from oomsafe.policy.reclaim import SHARED_MUCH
from oomsafe.policy.recycle import Order
from oomsafe.policy.settings import Policy
from oomsafe.policy.standing import Standing, follow, in_force, is_another_limit, reckons_as
from oomsafe.policy.state import State
from oomsafe.policy.text import shortened, without_controls
from oomsafe.policy.units import counted, format_size
from oomsafe.policy.victims import auto_step, clamp_score
from oomsafe.scoreboard.board import Scoreboard
from oomsafe.scoreboard.seat import Seat, enlist
from oomsafe.scoreboard.slot import Slot
from oomsafe.scoreboard.usage import Usage
from oomsafe.supervisor.exporter import Exporter
from oomsafe.supervisor.onlooker import Onlooker
from oomsafe.supervisor.preload import Preload
from oomsafe.supervisor.replacements import Fleet, Reading, Replacements, fresh_of

#: Seconds between two looks at whether the supervisor has grown.
RESCORE_EVERY = 5.0

#: Seconds between two looks at what the kernel allows: limits are set anew while processes live, and others use what they leave.
FOLLOW_EVERY = 1.0

#: Seconds between two looks at what a preloading supervisor's workers share with it, only to tell what others use of the machine.
SHARED_SELDOM = 30.0

#: A budget that has moved by this share since it was said last is said again, for it is others who have moved it,
MOVED = 0.25

#: but not within so many seconds.
SAY_EVERY = 60.0


class Supervisor:
    """Made once in the supervising process, before its first worker; workers inherit it over the fork."""

    def __init__(
        self,
        policy: Policy,
        server: str,
        workers: int,
        fleet: Fleet | None = None,
        *,
        forks: bool = False,
        beside: int = 0,
        top: int | None = None,
        name: str = "",
    ) -> None:
        """`fleet` None: the server can't bring a replacement first, so its workers take turns among themselves.

        `forks`: its workers are forks of this process, and share what it has loaded. `beside`: how many workers another pool has
        that lives on the same budget, and `top` the pid of the process that has started both; None: it is this one.
        """
        self._beside = beside
        self._top = top or os.getpid()
        self.policy = policy
        self.pid = os.getpid()
        self.board: Scoreboard | None = None
        self.preload = Preload(policy) if forks else None
        self._name = shortened(without_controls(name), LONGEST_NAME)
        self._sizes: dict[int, tuple[int, int] | None] | None = None
        """What each process of the pool holds, as read in this tick; None: none is under way."""
        self._usage, self._processes = Usage(held=self._held_by), Usage(SHARED_SELDOM, held=self._held_by)
        self._reading: Reading | None = None
        self._standing: Standing | None = None
        self._said: tuple[int | None, float] = (None, 0.0)
        """The budget that was said last, and when."""
        self._follow_at = 0.0
        self.capacity = self._told = self._measure(workers)
        """What it reckons with now, and what it has told its workers."""
        self._replacements: Replacements | None = None
        self._onlooker: Onlooker | None = None
        self._look_at = 0.0
        self._refused = self._full = False
        self._gone: deque[Slot] = deque()
        self._busy = False
        self._exporter: Exporter | None = None
        try:
            self.board, warnings = Scoreboard.create(workers, server)
            for warning in warnings:
                log.warning("%s", warning)
            self._replacements = None if fleet is None else Replacements(self.board, fleet)
            self._onlooker = Onlooker(self.board, self._sizes_of)
            # for processes that are spawned, and for `oomsafe status` beside them
            os.environ.pop("OOMSAFE_SCOREBOARD", None)
            if self.board.path:
                os.environ["OOMSAFE_SCOREBOARD"] = self.board.path
        except Exception as error:
            log.error("no scoreboard (%s): each worker keeps to its own limits, and `oomsafe status` does not show them", error)
        self._set_own_score()
        self._describe(say=True)
        attempt("asking who dies", "the server", self._say_who_dies)
        self._exporter = attempt("metrics", "the server", self._export)

    def _export(self) -> Exporter | None:
        board = self.board
        return None if board is None else Exporter(self.policy, lambda: board.descriptor, self._step)

    @property
    def name(self) -> str:
        """What the pool is called: as its user wants it, else by what its server knows; empty: nothing."""
        return self.policy.name or self._name

    def change(self, workers: int, policy: Policy | None = None) -> None:
        """The number of workers, or with a reload the policy, has changed; a reload also replaces all workers."""
        with self._alone():
            if policy is not None:
                self.policy = policy
                if self.preload is not None:
                    attempt("the reload of what is preloaded", "the server", partial(self.preload.reloaded, policy))
            if self._replacements is not None and (policy is not None or not workers):
                self._replacements.forget()
            self.capacity = self._measure(workers)
            self._describe(say=policy is not None)
            if self._exporter is not None:
                attempt("metrics", "the server", partial(self._exporter.follow, self.policy))

    def reserve(self) -> Slot | None:
        """Before a fork: the new worker's slot; None where there is none, and it protects itself unseen."""
        self.capacity = self._measure(self.capacity.workers)
        if self.preload is not None:
            attempt("freezing what is preloaded", "the server", self.preload.before_fork)
        with self._alone():
            slot = self.board.reserve() if self.board else None
        full, self._full = self._full, slot is None
        if slot is None and self.board is not None and not full:
            log.warning("all %d slots of the scoreboard are taken: the new worker is not seen by the pool", self.board.slots)
        return slot

    def born(self, slot: Slot | None, pid: int | None) -> None:
        """In the supervisor, after the fork, and as often as it likes: the process that it has started for this slot."""
        if slot is not None:
            self.born_seat(slot.number, slot.generation, pid)

    def born_seat(self, number: int | None, generation: int | None, pid: int | None) -> None:
        """The same, of a spawned worker."""
        if self.board is not None and number is not None and generation is not None and pid and os.getpid() == self.pid:
            self.board.born(number, generation, pid)

    def enlist(self, slot: Slot | None) -> None:
        """In the new worker, right after the fork and before it drops privileges: its slot, its name, its score."""
        if self.preload is not None:
            self.preload.after_fork()
        enlist(self.policy, self.pid, self._step(), slot)

    def seat(self, slot: Slot | None) -> Seat:
        """What a new process must be told: before it is spawned; in a fork, also afterwards."""
        address = self.board.address if self.board is not None and slot is not None else None
        number, generation = (slot.number, slot.generation) if slot is not None else (None, None)
        board = self.board if slot is not None else None
        return Seat(self.policy, self.capacity, self.pid, self._step(), address, number, generation, said(), board)

    def release(self, slot: Slot | None) -> None:
        """In the supervisor, when the worker is gone. May be called in the handler of a signal, where gunicorn before 24 reaps."""
        if slot is not None:
            self._gone.append(slot)
            with self._alone():
                pass

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """What a signal's handler releases meanwhile is released at the end: in the middle, two would write the same totals."""
        outer, self._busy = self._busy, True
        try:
            yield
        finally:
            if not outer:
                try:
                    while self._gone:
                        slot = self._gone.popleft()
                        self.release_seat(slot.number, slot.generation)
                finally:
                    self._busy = False  # one that comes right before this line waits for the next tick

    def release_seat(self, number: int | None, generation: int | None) -> bool:
        """The same, of a spawned worker. Returns whether it had never come to serve."""
        if self.board is None or number is None or generation is None or os.getpid() != self.pid:
            return False
        entry = next((entry for entry in self.board.roll() if (entry.number, entry.generation) == (number, generation)), None)
        failed = entry is not None and entry.state is State.STARTING
        if entry is not None and self._replacements is not None:
            self._replacements.gone(generation, not failed, time.monotonic())
        self.board.release(number, generation)
        return failed

    def not_started(self, number: int | None, generation: int | None, error: Exception) -> None:
        """The worker for which this slot was reserved could not be started at all: the others serve on."""
        if self.board is not None and number is not None:
            self.board.release(number, generation)
        if self._replacements is not None:
            self._replacements.not_started(generation or 0, error, time.monotonic())

    def tell_to_drain(self, number: int | None, generation: int | None) -> None:
        """There is one worker too many, and this is the one that goes."""
        if self.board is not None and number is not None and generation is not None:
            self.board.give_order(number, generation, Order.GO)

    @property
    def boot_pause(self) -> float:
        """Seconds until the next worker should be tried, since the last died before it served."""
        return 0.0 if self._replacements is None else max(0.0, self._replacements.ledger.not_before - time.monotonic())

    @property
    def serves(self) -> bool:
        """Whether a worker has come to serve that is still there: then one that fails to boot is no reason to give up."""
        return self.board is not None and any(entry.state is not State.STARTING for entry in self.board.roll())

    @property
    def pending(self) -> frozenset[int]:
        """The generations of the workers that are more than wanted: the ones that they replace are not on their way yet."""
        return frozenset() if self._replacements is None else self._replacements.ledger.pending

    @property
    def victims(self) -> frozenset[int]:
        """The generations of the workers that are on their way, and whose replacements are there."""
        return frozenset() if self._replacements is None else self._replacements.ledger.victims

    def tick(self) -> None:
        """Called by the server's own loop as often as it likes: is a worker to be replaced, has the supervisor outgrown their scores?"""
        now = time.monotonic()
        if self.board is None or os.getpid() != self.pid:
            return
        self._reading, self._sizes = None, {}
        try:
            self._do_what_is_due(now)
        finally:
            self._sizes = None

    def _do_what_is_due(self, now: float) -> None:
        with self._alone():
            if now >= self._follow_at:
                self._follow_at = now + FOLLOW_EVERY
                attempt("the look at the memory limit", "the server", self._follow)
            if self._exporter is not None:
                attempt("metrics", "the server", partial(self._exporter.tick, now))
            if self._onlooker is not None:
                self._onlooker.tick(self.policy, now)
            if self._replacements is not None:
                self._replacements.tick(self.policy, self.reading, now)
            if now >= self._look_at and not self.policy.dry_run:
                self._rescore_all(now)

    def _rescore_all(self, now: float) -> None:
        """A worker whose user differs from the supervisor's can't raise its own score, so it is done from here."""
        self._look_at = now + RESCORE_EVERY
        if self.board is not None:
            attempt("the scoreboard's file", "the server", self.board.mend)
        own = read_score()
        if own is None:
            return
        wanted = clamp_score(own + self._step())
        # a worker may have written any pid into its slot
        for pid, started in (*(self.board.processes if self.board else ()), *self.exporting):
            present = read_score(pid)
            if present is not None and present < wanted and is_alive(pid, started):
                self._rescore(pid, wanted)

    def _rescore(self, pid: int, wanted: int) -> None:
        try:
            write_score(wanted, pid)
        except ScoreRefused as error:
            if not self._refused:
                self._refused = True
                log.warning("%s", error)

    def close(self) -> None:
        """At the supervisor's end, whose process may become another pool's; in a fork of it, nothing."""
        if self._exporter is not None and os.getpid() == self.pid:
            attempt("metrics", "the server", self._exporter.close)
        if self.board is not None and os.getpid() == self.pid:
            if self.board.path and os.environ.get("OOMSAFE_SCOREBOARD") == self.board.path:
                del os.environ["OOMSAFE_SCOREBOARD"]
            self.board.remove()

    def reading(self) -> Reading:
        """What the kernel allows the pool, and what it has of it: read once a tick, by who asks first, and said on the scoreboard."""
        if self._reading is None:
            self.capacity = self._measure(self.capacity.workers)
            budget = resolve_limits(self.policy, self.capacity)[0].budget
            # up to where there is room for one more, it need not be told to the byte
            bound = None if budget is None else max(0, budget - (0 if self.board is None else fresh_of(self.board.roll()) or 0))
            used = self._usage.of(self.policy, self.capacity, bound, self._pids, time.monotonic())
            if self.board is not None:
                self.board.header.held = used
            self._reading = Reading(self.capacity, budget, used)
        return self._reading

    def _pids(self) -> list[int]:
        return [self.pid, *(self.board.pids if self.board is not None else ()), *(pid for pid, _ in self.exporting)]

    @property
    def exporting(self) -> list[tuple[int, int]]:
        """(pid, start time) of the process that serves the metrics, if there is one: a child that is no worker."""
        process = None if self._exporter is None else self._exporter.process
        return [] if process is None else [process]

    def _measure(self, workers: int) -> Capacity:
        """What the pool reckons with. A limit that is lowered holds at once, here and at the next look of each worker."""
        rss, held = sizes_of() or (None, None)
        seen = read_capacity(supervisor_rss=rss, workers=workers, beside=self._beside, held=self._held)
        seen = replace(seen, supervisor_held=held)
        self._standing = Standing(seen) if self._standing is None else follow(self._standing, seen, time.monotonic())
        return in_force(self._standing, seen)

    def _sizes_of(self, pid: int) -> tuple[int, int] | None:
        """As sizes_of(), read once a tick."""
        if self._sizes is None:
            return sizes_of(pid)
        if pid not in self._sizes:
            self._sizes[pid] = sizes_of(pid)
        return self._sizes[pid]

    def _held_by(self, pid: int) -> int | None:
        sizes = self._sizes_of(pid)
        return None if sizes is None else sizes[1]

    def _held(self) -> int:
        """What the pool's processes hold, in bytes, where no cgroup tells it: to the byte where much may be shared with this one."""
        own = self.board.pids if self.board is not None else []
        pids = [self._top, *(descendants_of(self._top) if self._beside else own)]
        shares = self.preload is not None and (anonymous_of(self.pid) or 0) >= SHARED_MUCH
        return self._processes.of_processes(pids, 0 if shares else math.inf, time.monotonic())

    def _follow(self) -> None:
        """What the kernel allows has moved, or what others use of it: workers that live are told."""
        budget, (said, at) = self.reading().budget, self._said
        if not reckons_as(self._told, self.capacity):
            anew = is_another_limit(self._told, self.capacity)
            drifted = said is None or budget is None or abs(budget - said) > said * MOVED
            self._describe(say=anew or (drifted and time.monotonic() - at >= SAY_EVERY), anew=anew)

    def _step(self) -> int:
        step = self.policy.worker_oom_score_adj
        return auto_step(self.capacity.supervisor_rss, self.capacity.effective) if step == "auto" else step

    def _describe(self, say: bool, anew: bool = True) -> None:
        self._told = self.capacity
        limits, warnings = resolve_limits(self.policy, self.capacity)
        if self.board is not None:
            workers = self.capacity.workers
            away = turns(self.policy, workers)
            self.board.header.describe(workers=workers, turns=away, limit=self.capacity.limit, budget=limits.budget, anew=anew)
            self.board.header.metric = limits.metric
            self.board.header.name = self.name
            self.board.header.allow(self.capacity)
        if say:
            self._said = limits.budget, time.monotonic()
            for warning in warnings:
                log.warning("%s", warning)
            log.info("%s", self._effective(limits))

    def _effective(self, limits: Limits) -> str:
        """The limits in force, with where they come from: once at boot, and at a reload."""
        return (
            f"oomsafe guards {counted(self.capacity.workers, 'workers')}{called(self.name)}: "
            f"{limits_in_force(self.policy, limits, self.capacity, ' each')}, supervisor {format_size(self.capacity.supervisor_rss)}, "
            f"workers' oom_score_adj +{self._step()}{dry(self.policy)}"
        )

    def _say_who_dies(self) -> None:
        cgroup = find_cgroup()
        folder = None if cgroup is None else cgroup.dies_whole()
        if folder is not None:
            log.info(
                "memory.oom.group is set in %s: when memory runs out there the kernel kills all processes at once, this supervisor too, "
                "whatever their oom_score_adj: only recycling in time helps",
                folder,
            )

    def _set_own_score(self) -> None:
        wanted = self.policy.supervisor_oom_score_adj
        try:
            if wanted is not None and not self.policy.dry_run:
                write_score(wanted)
        except ScoreRefused as error:
            log.warning("supervisor_oom_score_adj: %s", error)
        present = read_score()
        if present is not None and present + self._step() > SCORE_MAX:
            log.warning(
                "the supervisor's oom_score_adj is %d and nothing is above %d: the kernel can't be told to take a worker first",
                present, SCORE_MAX,
            )  # fmt: skip
