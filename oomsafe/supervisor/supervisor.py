"""The supervisor's part: the pool's scoreboard, a slot for each worker, and which process the kernel kills first.

Nothing here starts a thread or waits: a server's adapter calls it from the server's own hooks.
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
from oomsafe.kernel.kept_sizes import KeptSizes
from oomsafe.kernel.oom_score import read_score, write_score
from oomsafe.kernel.process import anonymous_of, descendants_of, is_alive, start_time
from oomsafe.kernel.systemd import OomPolicy, service_of
from oomsafe.log import attempt, log, said
from oomsafe.policy.boot_line import called, dry, limits_in_force
from oomsafe.policy.last_words import Present, Worker
from oomsafe.policy.limits import Capacity, Limits, resolve_limits, turns
from oomsafe.policy.readers import LONGEST_NAME, SCORE_MAX
from oomsafe.policy.reclaim import SHARED_MUCH
from oomsafe.policy.recycle import Order
from oomsafe.policy.settings import Policy
from oomsafe.policy.standing import Standing, follow, in_force, is_another_limit, reckons_as
from oomsafe.policy.state import State
from oomsafe.policy.text import printable, shortened, without_controls
from oomsafe.policy.units import counted, format_size
from oomsafe.policy.victims import auto_raise, clamp_score
from oomsafe.scoreboard.board import Scoreboard
from oomsafe.scoreboard.forks import own
from oomsafe.scoreboard.seat import Seat, enlist
from oomsafe.scoreboard.slot import Slot
from oomsafe.scoreboard.usage import Usage, reads_processes
from oomsafe.supervisor.announce import Announcer
from oomsafe.supervisor.backstop import Backstop, in_flight
from oomsafe.supervisor.budget import Budget
from oomsafe.supervisor.caps import Caps
from oomsafe.supervisor.deaths import Deaths, Ended
from oomsafe.supervisor.exporter import Exporter
from oomsafe.supervisor.inspections import Inspections
from oomsafe.supervisor.last_words import LastWords
from oomsafe.supervisor.onlooker import Onlooker
from oomsafe.supervisor.orders import Orders
from oomsafe.supervisor.preload import Preload
from oomsafe.supervisor.probes import Probes
from oomsafe.supervisor.replacements import Fleet, Reading, Replacements, fresh_of
from oomsafe.supervisor.shedding import SheddingLine
from oomsafe.supervisor.throttling import ThrottlingLine

#: Seconds between two checks of the workers' scores, which depend on the supervisor's size.
RESCORE_EVERY = 5.0

#: Seconds between two measurements of what the kernel allows: limits are changed while processes run, and other processes use memory.
FOLLOW_EVERY = 1.0

#: Seconds between two measurements of what workers share with a preloading supervisor; only used to compute what others use of the machine.
SHARED_SELDOM = 30.0

#: A budget is logged again if other processes have moved it by more than this share since it was last logged.
MOVED = 0.25

#: Seconds that must pass before it is logged again for that reason.
SAY_EVERY = 60.0


class Supervisor:
    """Created once in the supervising process, before its first worker; forked workers inherit it."""

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
        """`fleet` None: the server can't start a replacement first, so its workers take turns among themselves.

        `forks`: its workers are forks of this process, and share what it has loaded. `beside`: how many workers another pool
        has that uses the same budget; `top`: the pid of the process that has started both pools, None: this process.
        `name`: what the server knows the pool by; empty: nothing.
        """
        self._beside = beside
        self._top = top or os.getpid()
        self.policy = policy
        self.pid = os.getpid()
        self.board: Scoreboard | None = None
        self.preload = Preload(policy) if forks else None
        self._name = shortened(without_controls(name), LONGEST_NAME)
        self._started = start_time() or 0
        self._sizes = KeptSizes()
        own(self._sizes)
        self._usage, self._processes = Usage(held=self._sizes.held), Usage(SHARED_SELDOM, held=self._sizes.held)
        self._reading: Reading | None = None
        self._standing: Standing | None = None
        self._said: tuple[int | None, float] = (None, 0.0)
        """The budget that was last logged, and when."""
        self._follow_at = 0.0
        self.capacity = self._published = self._measure(workers)
        """`capacity` is what it reckons with now; `_published` is what it last published for its workers."""
        self._replacements: Replacements | None = None
        self._onlooker: Onlooker | None = None
        self._probes: Probes | None = None
        self._inspections: Inspections | None = None
        self._orders: Orders | None = None
        self.backstop: Backstop | None = None
        self._budget: Budget | None = None
        self._shedding: SheddingLine | None = None
        self.says_others = True
        """Whether to log that the kernel has killed other processes of this cgroup: an adapter may know more of them."""
        self._caps: Caps | None = None
        self._throttling = ThrottlingLine()
        self._rescore_at = 0.0
        self._refused = self._full = False
        self._gone: deque[tuple[Slot, Ended | None]] = deque()
        self._busy = False
        self._exporter: Exporter | None = None
        self._server = server
        self._dies_whole = False
        self._oom_policy: OomPolicy | None = None
        self._last_words: LastWords | None = None
        self._begin(workers, server, fleet)
        self._set_own_score()
        self._describe(say=True)
        attempt("asking who dies", "the server", self._say_who_dies)
        self._exporter = attempt("metrics", "the server", self._export)
        self._last_words = attempt("last words", "the server", partial(LastWords, f"{server} {self.name}", policy.termination_log))
        attempt("the words of the last pool", "the server", self._say_what_became_of_the_last)

    def _begin(self, workers: int, server: str, fleet: Fleet | None) -> None:
        """Create the scoreboard, and the parts that work on it."""
        try:
            self.board, warnings = Scoreboard.create(workers, server)
            for warning in warnings:
                log.warning("%s", warning)
            self._replacements = None if fleet is None else Replacements(self.board, fleet)
            self._onlooker = Onlooker(self.board, self._sizes.sizes_if)
            self._probes = Probes(self.board, self.reading)
            self._inspections = Inspections(self.board, self.reading)
            self._orders = Orders(self.board, self._probes, self._inspections)
            self.backstop = Backstop(self.board, self._sizes.sizes_if)
            self._budget = None if fleet is None else Budget(self.board, self._sizes.sizes_if, fleet.may_surge)
            self._shedding = SheddingLine(self.board)
            self._caps = Caps(self.board, self._sizes)
            # for spawned processes, and for `oomsafe status` started by one of them
            os.environ.pop("OOMSAFE_SCOREBOARD", None)
            if self.board.path:
                os.environ["OOMSAFE_SCOREBOARD"] = self.board.path
        except Exception as error:
            log.error("no scoreboard (%s): each worker keeps to its own limits, and `oomsafe status` does not show them", error)
        self.deaths = Deaths(self.board, lambda: self.capacity)
        """How its workers ended."""
        if self.backstop is not None:
            self.backstop.killed = self.deaths.killed
        if self.policy.on_death is not None:
            self.deaths.announce = Announcer(self.policy.on_death)

    def _export(self) -> Exporter | None:
        board = self.board
        return None if board is None else Exporter(self.policy, lambda: board.descriptor, self._raise)

    @property
    def name(self) -> str:
        """The pool's name: from the policy, else the server's; empty: it has none."""
        return self.policy.name or self._name

    def change(self, workers: int, policy: Policy | None = None) -> None:
        """The number of workers has changed or, at a reload, also the policy; a reload replaces all workers."""
        with self._alone():
            if policy is not None:
                self.policy = policy
                if self.preload is not None:
                    attempt("the reload of what is preloaded", "the server", partial(self.preload.reloaded, policy))
            if self._replacements is not None and (policy is not None or not workers):
                self._replacements.forget()
            if self._probes is not None and policy is not None:
                self._probes.reloaded()
            self.capacity = self._measure(workers)
            self._describe(say=policy is not None)
            if self._exporter is not None:
                attempt("metrics", "the server", partial(self._exporter.follow, self.policy))

    def reserve(self) -> Slot | None:
        """Before a fork: the new worker's slot; None if there is none: the worker then protects itself without the scoreboard."""
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
        """In the supervisor, after the fork: record the process that was started for this slot. May be called repeatedly."""
        if slot is not None:
            self.born_seat(slot.number, slot.generation, pid)

    def born_seat(self, number: int | None, generation: int | None, pid: int | None) -> None:
        """The same for a spawned worker."""
        if self.board is not None and number is not None and generation is not None and pid and os.getpid() == self.pid:
            self.board.born(number, generation, pid)

    def enlist(self, slot: Slot | None) -> None:
        """In the new worker, right after the fork and before it drops privileges: claim its slot, set its name and its score."""
        if self.preload is not None:
            self.preload.after_fork()
        enlist(self.policy, self.pid, self._raise(), slot)

    def seat(self, slot: Slot | None) -> Seat:
        """What a new process needs. Called before a process is spawned; for a fork, it may also be called after the fork."""
        address = self.board.address if self.board is not None and slot is not None else None
        number, generation = (slot.number, slot.generation) if slot is not None else (None, None)
        board = self.board if slot is not None else None
        # a function of the user's may not pickle, and only the supervisor calls it
        policy = replace(self.policy, on_death=None) if callable(self.policy.on_death) else self.policy
        return Seat(policy, self.capacity, self.pid, self._raise(), address, number, generation, said(), board)

    def release(self, slot: Slot | None, ended: Ended | None = None) -> None:
        """In the supervisor, when the worker is gone; `ended` says how, None: a caller that records its death itself, or does not know.

        May be called in a signal handler, where gunicorn before 24 reaps workers: what is logged is logged by the next tick.
        """
        if slot is not None:
            self._gone.append((slot, ended))
            with self._alone():
                pass

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Inside, slots that a signal handler releases are queued, and released at the end: otherwise both would write the same totals."""
        outer, self._busy = self._busy, True
        try:
            yield
        finally:
            if not outer:
                try:
                    while self._gone:
                        slot, ended = self._gone.popleft()
                        self.release_seat(slot.number, slot.generation, ended)
                finally:
                    self._busy = False  # a slot that is queued right before this line is released at the next tick

    def release_seat(self, number: int | None, generation: int | None, ended: Ended | None = None) -> bool:
        """The same for a spawned worker, at once. Returns whether the worker had never served."""
        if os.getpid() != self.pid:
            return False
        if ended is not None:
            attempt("the death of a worker", "the server", lambda: self.deaths.record(self.deaths.read(number, generation, ended)))
        if self.board is None or number is None or generation is None:
            return False
        entry = next((entry for entry in self.board.roll() if (entry.number, entry.generation) == (number, generation)), None)
        failed = entry is not None and entry.state is State.STARTING
        if entry is not None and self._replacements is not None:
            self._replacements.gone(generation, not failed, time.monotonic())
        self.board.release(number, generation)
        return failed

    def not_started(self, number: int | None, generation: int | None, error: Exception) -> None:
        """The worker for which this slot was reserved could not be started at all; the others keep serving."""
        if self.board is not None and number is not None:
            self.board.release(number, generation)
        if self._replacements is not None:
            self._replacements.not_started(generation or 0, error, time.monotonic())

    def tell_to_drain(self, number: int | None, generation: int | None) -> None:
        """Order this worker to drain, whether or not it is over its limit."""
        if self.board is not None and number is not None and generation is not None:
            self.board.give_order(number, generation, Order.GO)

    @property
    def boot_pause(self) -> float:
        """Seconds until the next worker should be started, because the last one died before it served."""
        return 0.0 if self._replacements is None else max(0.0, self._replacements.ledger.not_before - time.monotonic())

    @property
    def serves(self) -> bool:
        """Whether there is a worker that has finished its boot: then another one that fails to boot is no reason to give up."""
        return self.board is not None and any(entry.state is not State.STARTING for entry in self.board.roll())

    @property
    def pending(self) -> frozenset[int]:
        """The generations of replacements that are extra workers for now, because the workers that they replace do not leave yet."""
        return frozenset() if self._replacements is None else self._replacements.ledger.pending

    @property
    def victims(self) -> frozenset[int]:
        """The generations of workers that leave and already have a replacement."""
        return frozenset() if self._replacements is None else self._replacements.ledger.victims

    def tick(self) -> None:
        """Do what is due, such as replacing workers and adjusting scores. Called by the server's own loop, as often as it likes."""
        now = time.monotonic()
        if self.board is None or os.getpid() != self.pid:
            return
        self._reading = None
        attempt("the deaths of workers", "the server", self.deaths.settle)
        self._sizes.begin()
        try:
            self._do_what_is_due(now)
        finally:
            self._sizes.end()

    def watch(self) -> float:
        """Between two ticks: keep workers that grow at once from taking more than the pool has left. Never raises.

        Returns the seconds after which a server's loop should call it again, if it can; inf: not before the next tick.
        """
        if self._caps is None or os.getpid() != self.pid:
            return math.inf
        pause = attempt("caps", "the server", self._caps.watch)
        return math.inf if pause is None else pause

    def _do_what_is_due(self, now: float) -> None:
        with self._alone():
            if now >= self._follow_at or (self._caps is not None and self._caps.others_serve()):
                self._follow_at = now + FOLLOW_EVERY
                self._follow_all(now)
            if self._exporter is not None:
                attempt("metrics", "the server", partial(self._exporter.tick, now))
            if self._onlooker is not None:
                self._onlooker.tick(self.policy, now)
            if self.backstop is not None:
                self.backstop.tick(self.policy, self._hard_limit, self._is_within_budget, now)
            attempt("orders and probes", "the server", self._heed_operator)
            if self._replacements is not None:
                self._replacements.tick(self.policy, self.reading, now)
            if self._budget is not None:
                shares = self.preload is not None and self.preload.bytes is not None
                self._budget.tick(self.policy, self.reading, shares, now)
            if self._shedding is not None and self.policy.shed:
                self._shedding.tick(self.policy, now)
            if self._oom_policy is not None:
                attempt("systemd's OOMPolicy", "the server", self._say_oom_policy)
            if self._last_words is not None and self._last_words.wanted:
                attempt("last words", "the server", partial(self._leave_words, self._last_words, now))
            if now >= self._rescore_at:
                self._rescore_at = now + RESCORE_EVERY
                if self.board is not None:
                    attempt("the scoreboard's file", "the server", self.board.mend)
                if not self.policy.dry_run:
                    self._rescore_all()

    def _heed_operator(self) -> None:
        if self._orders is not None:
            self._orders.tick(self.policy)
        if self._probes is not None:
            self._probes.tick(self.policy)
        if self._inspections is not None:
            self._inspections.tick()

    def _follow_all(self, now: float) -> None:
        """Measure what is measured once a second."""
        attempt("descriptors of the workers", "the server", self._keep)
        attempt("reading the memory limit", "the server", self._follow)
        attempt("the kernel's count of OOM kills", "the server", self._follow_kills)
        attempt("throttling", "the server", partial(self._throttling.tick, self.capacity.levels, now))
        if self._caps is not None:
            attempt("caps", "the server", partial(self._caps.follow, self.policy, self._hard_limit(), self.capacity))

    def _follow_kills(self) -> None:
        """Note when the kernel kills, so that a kill of another process explains no later death of a worker."""
        kills = self.deaths.counter.read()
        others = self.deaths.counter.others() if self.says_others and kills is not None and kills.own else 0
        if others:
            log.warning(
                "the kernel's OOM killer took %d of this cgroup's processes that were no worker of this pool: programs that workers have "
                "started, or others in the cgroup", others,
            )  # fmt: skip

    def _rescore_all(self) -> None:
        """Raise the scores that are too low. This is done from here because a worker of another user can't raise its own score."""
        own = read_score()
        if own is None:
            return
        wanted = clamp_score(own + self._raise())
        # not board.pids, because a worker may have written any pid into its slot
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

    def _present(self) -> Present:
        """The pool at this moment, for its last words."""
        capacity, _, held = self.reading()
        now = time.time()
        workers = []
        for worker in self.board.read().workers if self.board is not None else ():
            held = worker.figures.rss if worker.used is None else worker.used
            workers.append(Worker(f"worker {worker.pid} (slot {worker.slot})", held, in_flight(worker, now)))
        return Present(
            pool=f"{self._server}{called(self.name)}",
            supervisor=self.pid,
            held=held,
            limit=capacity.limit,
            used=capacity.undroppable,
            source=str(capacity.source),
            dies_whole=self._dies_whole,
            workers=workers,
            deaths=self.deaths.lines,
            died=self.deaths.died,
        )

    def _leave_words(self, words: LastWords, now: float) -> None:
        """Write down what this pool would have died of, if that is due."""
        capacity = self.reading().capacity
        used = capacity.undroppable
        words.tick(self._present, used / capacity.limit if capacity.limit and used is not None else None, now)

    def _say_what_became_of_the_last(self) -> None:
        line = None if self._last_words is None else self._last_words.of_the_last()
        if line is not None:
            log.warning("%s", line)

    def close(self) -> None:
        """At the supervisor's end; its process may go on and create another pool. In a fork of it, this does nothing."""
        if os.getpid() == self.pid:
            attempt("the deaths of workers", "the server", self.deaths.settle)
            if self._last_words is not None:
                self._last_words.goodbye()
        if self._exporter is not None and os.getpid() == self.pid:
            attempt("metrics", "the server", self._exporter.close)
        if self.board is not None and os.getpid() == self.pid:
            if self.board.path and os.environ.get("OOMSAFE_SCOREBOARD") == self.board.path:
                del os.environ["OOMSAFE_SCOREBOARD"]
            self.board.remove()
        if os.getpid() == self.pid:
            self._sizes.close()

    def reading(self) -> Reading:
        """What the kernel allows the pool, and what it holds: read once a tick, at the first call, and published on the scoreboard."""
        if self._reading is None:
            self.capacity = self._measure(self.capacity.workers)
            budget = resolve_limits(self.policy, self.capacity)[0].budget
            bound = self._bound(budget) if reads_processes(self.policy, self.capacity) else None
            used = self._usage.of(self.policy, self.capacity, bound, self._pids, time.monotonic())
            if self.board is not None:
                self.board.header.held = used
                self.board.header.droppable = self.capacity.droppable if used is not None and used == self.capacity.held else 0
            self._reading = Reading(self.capacity, budget, used)
        return self._reading

    def _bound(self, budget: int | None) -> int | None:
        """While there is room for one more worker, below this many bytes, what the pool holds need not be exact."""
        fresh = None if self.board is None else fresh_of(self.board.roll())
        return None if budget is None else max(0, budget - (fresh or 0))

    def _hard_limit(self) -> int | None:
        return None if self.policy.hard_limit is None else resolve_limits(self.policy, self.capacity)[0].hard

    def _is_within_budget(self) -> bool:
        """Whether the pool is within its budget; also True if that is not known."""
        _, budget, used = self.reading()
        return budget is None or used is None or used <= budget

    def _pids(self) -> list[int]:
        return [self.pid, *(self.board.pids if self.board is not None else ()), *(pid for pid, _ in self.exporting)]

    @property
    def exporting(self) -> list[tuple[int, int]]:
        """(pid, start time) of the process that serves the metrics, if there is one: a child that is not a worker."""
        process = None if self._exporter is None else self._exporter.process
        return [] if process is None else [process]

    def _measure(self, workers: int) -> Capacity:
        """The capacity that the pool reckons with. A lowered limit takes effect at once here, and at each worker's next tick."""
        rss, held = self._sizes.sizes(self.pid) or (None, None)
        capacity = read_capacity(supervisor_rss=rss, workers=workers, beside=self._beside, held=self._held)
        capacity = replace(capacity, supervisor_held=held)
        self._standing = Standing(capacity) if self._standing is None else follow(self._standing, capacity, time.monotonic())
        return in_force(self._standing, capacity)

    def _held(self) -> int:
        """What the pool's processes hold, in bytes, if no cgroup counts it. Exact if they may share much with this process."""
        own = self.board.pids if self.board is not None else []
        pids = [self._top, *(descendants_of(self._top) if self._beside else own)]
        shares = self.preload is not None and (anonymous_of(self.pid) or 0) >= SHARED_MUCH
        return self._processes.of_processes(pids, 0 if shares else math.inf, time.monotonic())

    def _keep(self) -> None:
        """Keep a descriptor of each process that is measured each second, this one included."""
        self._sizes.follow([(self.pid, self._started), *(self.board.born_processes if self.board is not None else ()), *self.exporting])

    def _follow(self) -> None:
        """Measure the capacity again. If the kernel's limit has changed, or what others use, publish that for the living workers."""
        budget, (said, at) = self.reading().budget, self._said
        if not reckons_as(self._published, self.capacity):
            anew = is_another_limit(self._published, self.capacity)
            drifted = said is None or budget is None or abs(budget - said) > said * MOVED
            self._describe(say=anew or (drifted and time.monotonic() - at >= SAY_EVERY), anew=anew)

    def _raise(self) -> int:
        wanted = self.policy.worker_oom_score_adj
        return auto_raise(self.capacity.supervisor_rss, self.capacity.effective) if wanted == "auto" else wanted

    def _describe(self, say: bool, anew: bool = True) -> None:
        self._published = self.capacity
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
        """The log line with the limits in force and where they come from."""
        return (
            f"oomsafe guards {counted(self.capacity.workers, 'workers')}{called(self.name)}: "
            f"{limits_in_force(self.policy, limits, self.capacity, ' each')}, supervisor {format_size(self.capacity.supervisor_rss)}, "
            f"workers' oom_score_adj +{self._raise()}{dry(self.policy)}"
        )

    def _say_who_dies(self) -> None:
        cgroup = find_cgroup()
        folder = None if cgroup is None else cgroup.dies_whole()
        self._dies_whole = folder is not None
        if folder is not None:
            log.info(
                "memory.oom.group is set in %s: when memory runs out there the kernel kills all processes at once, this supervisor too, "
                "whatever their oom_score_adj: only recycling in time helps",
                folder,
            )
        service = None if cgroup is None or folder is not None else service_of(cgroup)
        try:
            self._oom_policy = None if service is None else OomPolicy(service)
        except OSError:
            return  # there is no systemctl here

    def _say_oom_policy(self) -> None:
        """What systemd would do, once systemctl has said it."""
        asked = self._oom_policy
        answer = None if asked is None else asked.answer()
        if asked is None or answer is None:
            return
        self._oom_policy = None
        if answer == "stop":
            log.info(
                "%s has OOMPolicy=stop, systemd's default: when the kernel kills one of its processes, systemd stops the whole service; "
                "set OOMPolicy=continue, and only a worker is lost", printable(asked.service),
            )  # fmt: skip

    def _set_own_score(self) -> None:
        wanted = self.policy.supervisor_oom_score_adj
        try:
            if wanted is not None and not self.policy.dry_run:
                write_score(wanted)
        except ScoreRefused as error:
            log.warning("supervisor_oom_score_adj: %s", error)
        present = read_score()
        if present is not None and present + self._raise() > SCORE_MAX:
            log.warning(
                "the supervisor's oom_score_adj is %d and nothing is above %d: the kernel can't be told to take a worker first",
                present, SCORE_MAX,
            )  # fmt: skip
