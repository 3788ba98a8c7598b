"""The guard: in each worker, it measures every piece of work, and decides when the worker must be recycled."""

from __future__ import annotations

import logging
import os
import sys
import time
from _thread import allocate_lock
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from oomsafe.errors import ScoreRefused
from oomsafe.kernel.capacity import read_capacity
from oomsafe.kernel.oom_score import raise_score
from oomsafe.kernel.process import OwnMemory
from oomsafe.log import attempt, failed, log, once
from oomsafe.policy.limits import Capacity, Limits
from oomsafe.policy.probed import Stage
from oomsafe.policy.readers import COUNT_CLEAN
from oomsafe.policy.reclaim import futile_after
from oomsafe.policy.recycle import (
    PATIENT,
    Action,
    Decision,
    History,
    Order,
    Reason,
    Snapshot,
    decide,
    has_settled,
    note_breach,
    outruns,
    within,
)
from oomsafe.policy.settings import Policy
from oomsafe.policy.state import State
from oomsafe.policy.trend import Growth, Trend
from oomsafe.policy.units import MIB, counted, format_size
from oomsafe.scoreboard import layout
from oomsafe.scoreboard.board import Scoreboard
from oomsafe.scoreboard.forks import own
from oomsafe.scoreboard.slot import Slot
from oomsafe.worker.background import Background
from oomsafe.worker.baseline import Beginning, baseline_of
from oomsafe.worker.cadence import ASK_EVERY, Cadence
from oomsafe.worker.door import Door
from oomsafe.worker.examination import Examination
from oomsafe.worker.gauge import Gauge
from oomsafe.worker.hard_limit import HardLimit
from oomsafe.worker.idle import Idle
from oomsafe.worker.life import Life
from oomsafe.worker.meter import PUBLISH_EVERY, Meter, Work
from oomsafe.worker.neighbours import Neighbours
from oomsafe.worker.pressure import SHORT_EVERY, Pressure
from oomsafe.worker.recycle_line import say_it_stays, why
from oomsafe.worker.report import Report
from oomsafe.worker.suspects import Blame, Suspects
from oomsafe.worker.thresholds import Thresholds

if TYPE_CHECKING:
    from oomsafe.policy.grant import Grant
    from oomsafe.scoreboard.header import Header
    from oomsafe.scoreboard.own_board import OwnBoard
    from oomsafe.scoreboard.seat import Seat
    from oomsafe.scoreboard.view import PoolView
    from oomsafe.worker.siblings import Siblings

#: Seconds until a worker that is over its limit but may not leave yet checks again.
CHECK_AGAIN = 0.005

Recycle = Callable[[], None]


class Guard:
    """Measures this process's work, and has the process recycled above its limits.

    `recycle` is called once, in the thread that noticed the breach, when this worker should finish
    what it has in flight and end; None: nothing can be recycled, and only `should_recycle` is set.
    `background` runs a slow function beside the work; None: it runs in place, between two pieces of work.
    `poke` wakes the supervisor; None: the supervisor reads what this worker publishes at its next tick.
    `unit` names the work in logs and in status, in the plural. A guard belongs to the process that created it: create one after a fork.
    With a `board`, the worker serves once ready() is called; without one, at once. `parent` is the process that starts another worker in
    this one's place: if it is gone, this worker stays. None: the parent is not known. `siblings` are the parent's other workers.
    `own_board` is the scoreboard of a process without a supervisor; None: `oomsafe status` does not show such a process.
    Without arguments, the guard is a pool of one.
    """

    def __init__(
        self,
        policy: Policy | None = None,
        *,
        recycle: Recycle | None = None,
        background: Background | None = None,
        poke: Callable[[], None] | None = None,
        unit: str = "pieces of work",
        board: Scoreboard | None = None,
        slot: Slot | None = None,
        capacity: Capacity | None = None,
        memory: OwnMemory | None = None,
        parent: int | None = None,
        siblings: Siblings | None = None,
        own_board: OwnBoard | None = None,
    ) -> None:
        self.policy = policy or Policy()
        self._own_board = own_board
        self.slot = slot or (Slot.private() if own_board is None else own_board.slot)
        self.meter = Meter(self.slot, memory, check=self._check, admit=self._admit)
        """Measures each piece of work. Adapters that must save a call use it directly."""
        self.meter.counts_clean = self.policy.metric in COUNT_CLEAN
        self.pid = os.getpid()
        self.here = True
        """Whether this is the guarded process; False in a fork of it."""
        own(self)
        self.should_recycle = False
        """Whether this worker should end, or has been ordered to."""
        self.at_the_door = False
        """Whether a server's adapter counts each request before it reaches the app, so that a middleware must not count it again."""
        self._decided = False
        self._recycle = recycle
        self._background = background
        self._unit = unit
        self._board = board
        self._neighbours = Neighbours(board, self.slot, parent, siblings, asks=recycle is not None)
        self._deciding = allocate_lock()
        self._gauge = Gauge()
        self._thresholds = Thresholds(self.policy, capacity or read_capacity(), self._gauge, self._neighbours, measure=read_capacity)
        self._history = History(ready_at=time.monotonic())
        self._trend = Trend()
        self._suspects = Suspects(self.meter)
        self._life = Life()
        self._examination = Examination(self.meter, self.slot, self._header, str(self), unit)
        self._idle = Idle(self.meter, self._header)
        self.hard_limit = HardLimit(self.meter, str(self), self.slot)
        self._pressure = Pressure(self.policy, self._thresholds, self._neighbours, self._neighbours.view)
        self._door = Door(self._pressure, self._neighbours, self.policy.shed and board is not None)
        self._cadence = Cadence(self.meter, self._trend, self._thresholds, self._neighbours, self._door, self._life)
        self._report = Report(self.slot, self.meter, self._gauge, self._trend, self._thresholds, self._cadence, poke)
        self._ages_at: float = sys.maxsize
        """When this worker will have served for its lifetime, on the monotonic clock; sys.maxsize: never."""
        self._call_at = 0.0
        self._starved = False
        """It could not be measured for lack of memory. Said once there is some again, because a line takes memory, too."""
        self._ready = self._retired = False
        self._left_for: Reason | None = None
        """Why it is recycled; None: it is not."""
        self._began = Beginning(self._history.ready_at, None, None)
        if board is None:
            self.ready()

    @classmethod
    def of_seat(cls, seat: Seat, board: Scoreboard | None, slot: Slot | None, *, unit: str, **how: Any) -> Guard:
        """In a supervisor's worker, once it has loaded what it needs: its guard. Call ready() when the worker serves.

        `board` and `slot` are the result of seat.take(); `how` is recycle, background and poke.
        """
        board = board if slot is not None else None
        return cls(seat.policy, unit=unit, board=board, slot=slot, capacity=seat.capacity, parent=os.getppid(), **how)

    def work(self, name: str) -> Work:
        """``with guard.work("name"): ...`` measures a piece of work until the end of the block."""
        return self.meter.begin(name.encode("utf-8", "replace"))

    @property
    def leaving(self) -> bool:
        """Whether this worker has been ordered to end, and is finishing what it has in flight."""
        return self.meter.leaving

    def ready(self) -> None:
        """The worker serves from now on: what it holds now is its baseline. Later calls change nothing."""
        if self._ready or not self._is_here():
            return
        now = time.monotonic()
        self.meter.measure()
        if self._board is not None:
            self._neighbours.boot = self.slot.age
        self._history = History(ready_at=now)
        self._thresholds.set(self.meter.held if self.meter.rss_known else None, now, say=self._board is None)
        if self._neighbours.supervised:
            self._pressure.update(now, Growth())  # the supervisor's figures may be a second old, in which a leak can fill the memory
        self._take_limits()
        self._history = replace(self._history, ready_with=self.baseline)
        self._began = Beginning(now, self.meter.held if self.meter.rss_known else None, None)
        self._life.begin(self.meter.held)
        self._idle.begin(self.meter.held, now)
        if self._header is not None:
            self._header.unit = self._unit.partition(" (")[0]
        attempt("the line at boot", "the server", self._say_room)
        if self._recycle is not None:
            baseline = attempt("counting objects at boot", "the server", partial(baseline_of, self._header))
            self._began = self._began._replace(baseline=baseline)
        self._suspects.follow(now)
        self._ready = True  # last, so that if something fails above, the next call tries again
        self._check(now)
        if not self._decided:
            self.slot.set_state(State.SERVING)
        self._report.wake_supervisor()

    @property
    def _header(self) -> Header | None:
        """Of the scoreboard that this worker is on; None: it is on none."""
        return self._board.header if self._board is not None else None if self._own_board is None else self._own_board.header

    def _say_room(self) -> None:
        """One line by the first worker of a load: what it has right after boot, and what that leaves."""
        baseline, soft = self.baseline, None if self._thresholds.refused else self.limits.soft
        if self._header is None or baseline is None or soft is None or not self._header.first_to_refuse(layout.SAID_ROOM):
            return
        from oomsafe.policy.boot_line import room_after_boot  # here: one worker of all says it

        who = "this process has" if self._board is None else "workers have"
        is_little, line = room_after_boot(who, baseline, soft)
        log.log(logging.WARNING if is_little else logging.INFO, "%s", line)

    def say_limits(self, above: str) -> None:
        """At the boot of a process without a supervisor, log its limits, and what happens to it above them: `above`."""
        from oomsafe.policy.boot_line import called, dry, limits_in_force  # imported here, because most workers have a supervisor

        limits = limits_in_force(self.policy, self.limits, self._thresholds.capacity)
        name = called(self._own_board.name if self._own_board is not None else self.policy.name or "")
        past = "" if self.limits.max_lifetime is None else ", or past its max_lifetime,"
        log.info("oomsafe guards this process%s: %s; above its soft limit%s %s%s", name, limits, past, above, dry(self.policy))

    @property
    def limits(self) -> Limits:
        """The limits in force for this worker."""
        return self._thresholds.limits

    @property
    def baseline(self) -> int | None:
        """What this worker held right after boot, in the metric of the soft limit; bytes, None if it can't be read."""
        return self._thresholds.baseline

    def tick(self) -> None:
        """Measure and decide if that is due, also when idle. Called by the server's own loop, at least about once a second."""
        now = time.monotonic()
        if now >= self.meter.publish_at:
            try:
                self._check(now)
            except MemoryError:
                self._starved = True
            except Exception as error:
                failed("tick", "the server", error)

    @property
    def pause(self) -> float:
        """Seconds that a server's loop may sleep until tick() has something to do: a second at most."""
        return min(PUBLISH_EVERY, max(SHORT_EVERY, self.meter.publish_at - time.monotonic()))

    def pool(self) -> PoolView:
        """This worker's pool, read from the scoreboard; without one, this worker as a pool of one."""
        view = self._neighbours.view()
        if self._board is not None:
            return view
        capacity = read_capacity()
        return replace(
            view, limit=capacity.limit, budget=self.limits.budget, held=capacity.held, others=capacity.others, source=str(capacity.source),
            metric=self.limits.metric,
        )  # fmt: skip

    def holds_up(self) -> bool:
        """Whether the memory of this leaving worker keeps the pool from serving: then it must not wait for idle clients."""
        return self._pressure.holds_up(time.monotonic())

    def _admit(self, route: str) -> str | None:
        return route if self._board is None or not self.here else self._board.header.admit(route)

    def retire(self) -> None:
        """The worker has no work any more and ends: publish its last figures. Later calls change nothing: some servers end in two steps."""
        if self._retired or not self._is_here():
            return
        self._retired = True
        try:
            if self._ready:  # else it ends before it has served, and its slot must still show that
                self.slot.set_state(State.LEAVING)
        except Exception as error:
            failed("retire", "the server", error)
        # a second is enough for any check in another thread; waiting longer would delay the server's exit
        if self._deciding.acquire(timeout=1):
            self._report.publish(time.monotonic())
            self._deciding.release()
        self.forget_row()
        self._examination.end()
        if self.meter.leaving and not self._examination.slows:  # what a tracer holds is no matter of the app's
            attempt("taking stock", "the server", self._take_stock)

    def _take_stock(self) -> None:
        from oomsafe.worker.stocktaking import say_stock  # imported here, because only a worker that was recycled needs it

        self._follow_life()
        say_stock(self, self._life, self._began, header=self._header, reason=self._left_for)

    def forget_row(self) -> None:
        """This process serves no more: lift its hard limit, and remove its own scoreboard, if it has one, from `oomsafe status`."""
        self.hard_limit.lift()
        if self._own_board is not None:
            self._own_board.remove()

    def leave(self) -> None:
        """In a fork of the guarded process: publish nothing and decide nothing for the worker, which is the parent."""
        self.here = self.meter.crowded = False
        self._examination.leave()
        self.meter.leave()
        self.slot.leave()
        self.hard_limit.leave()
        self._deciding = allocate_lock()
        self.meter.publish_at = self.meter.check_at = sys.maxsize

    def _is_here(self) -> bool:
        """Whether this is the guarded process. Checked before each decision, because C code may fork without calling leave()."""
        if self.here and os.getpid() != self.pid:
            self.leave()
        return self.here

    def _check(self, now: float) -> None:
        if not self._is_here() or not self._deciding.acquire(blocking=False):
            return  # another thread is doing this
        release, measured = True, now >= self.meter.publish_at
        try:
            if measured:
                self.meter.publish_at = now + PUBLISH_EVERY  # first, so that a failure below does not prevent decisions
                self._refresh(now)
                if self._examination.inspects:
                    attempt("an inspection", "the server", partial(self._follow_inspection, now))
                if self._report.asks:
                    self._report.wake_supervisor()  # again: it may have been asleep, or had no worker to spare
            elif self._life.young:
                self._follow_life()  # with the figures that the end of this work has read anyway
                self._cadence.set_alert()
            due = (
                self.meter.held > self._cadence.alert or self._report.asks or self.meter.crowded or self._history.breached_since is not None
            )
            due = due or now >= self._ages_at or self.hard_limit.spent or self.slot.operator_orders
            due = due or self._examination.waits_for_replacement
            if not self._decided and (due or self.slot.order is not Order.NONE):
                release = self._consider(now)
            elif measured and self._may_reclaim and self._idle.due(now):
                tried = self._idle.tried
                release = self._give_back(f"{self}, which is idle,", lambda freed: tried(freed, time.monotonic()), idle=True)
        finally:
            if release:
                self._deciding.release()

    def _refresh(self, now: float) -> None:
        """Once a second, more often while the worker grows: measure its memory, update its limits, and publish both."""
        try:
            if not self.meter.counts_clean:
                self.meter.file_dirty = self._gauge.file_dirty(self.meter.held, self.meter.rss, self._cadence.near, now)
            self.meter.measure()
            self._thresholds.follow(now, self.meter.held)
            self._trend.add(now, self.meter.held)
            self._suspects.follow(now)
            self._follow_life()
            self._take_limits()
            self._report.need(now, self._used(now), self._need_not_stay(now))
            self.hard_limit.follow(self.limits.hard if self.policy.refuses_memory else None)
            if self._examination.was_probed or self.slot.probe_order is not None:
                soft, used = self.limits.early, self._used(now)
                room = None if soft is None or used is None else soft - used
                self._examination.follow_probe(now, room, replaced=self._recycle is not None)
        except MemoryError:
            self._starved = True
        except Exception as error:
            failed("tick", "the server", error)
        self._report.publish(now)
        if self._starved:
            self._starved = False
            once("starved", logging.WARNING, "%s had no memory left for a moment, not even to measure itself: it does that again", self)

    def _follow_life(self) -> None:
        """Note what it holds after so much work."""
        leap, self.meter.leap = self.meter.leap, 0
        self._life.follow(self.meter.counters.work, self.meter.held, leap)

    def _consider(self, now: float) -> bool:
        """Decide and act. Returns False if the rest happens in the background, which then releases the lock."""
        self.meter.check_at = now + CHECK_AGAIN
        used = self._used(now)
        self._history = replace(self._history, spent=self.hard_limit.spent, ordered=self._why_it_need_not_stay())
        self._history = note_breach(self._history, self.limits, used, *self._trend.jump(now, self.meter.held), now)
        self._trend.add(now, self.meter.held)
        decision = self._decide(now, used)
        if decision.action is Action.RECLAIM:
            self._history = replace(self._history, reclaimed_at=now)
            return self._consider(now) if self.policy.dry_run else self._reclaim((used or 0) - (self.limits.early or 0))
        if decision.action is Action.RECYCLE:
            self._go(decision.reason, now, used)
        elif not self.policy.dry_run or self.policy.shed:
            self._door.update(now, used or 0, self.meter.soft_limit, self.meter.held, self._trend.growth(now, self.meter.held))
            self.meter.crowded = not self.policy.dry_run and (self._door.shut or self._door.sheds)
            if self.policy.dry_run and self._door.sheds:
                attempt("the line about shedding", "the server", self._say_it_sheds)
            self._cadence.set_alert()
        return True

    def knock(self) -> None:
        """New work waits at the door: check whether there is room by now, and log that it waits. Only some adapters let work wait."""
        now = time.monotonic()
        self._door.say_that_it_waits(str(self))
        try:
            self._check(now)
        except Exception as error:
            self.meter.crowded = False
            failed("reading the pool", "the server", error)

    @property
    def sheds(self) -> bool:
        """Whether new work is refused now, but for exempt paths: then it need not wait."""
        return self.meter.crowded and self._door.sheds

    def refuses(self, path: str) -> bool:
        """Whether new work for this path is to be refused. If so, it is counted, and the first of the pool logs it."""
        if not self.sheds or self.meter.leaving or path in self.policy.shed_exempt:
            return False
        self.meter.counters.aborts[layout.ABORTS.index("shed")] += 1
        attempt("the line about shedding", "the server", self._say_it_sheds)
        return True

    def _say_it_sheds(self) -> None:
        header = self._header
        if header is None or header.has_said(layout.SAID_SHEDS) or not header.first_to_refuse(layout.SAID_SHEDS):
            return
        dry, exempt = self.policy.dry_run, self.policy.shed_exempt
        log.warning(
            "%s: %s left up to the limit of %s, and recycling can't keep up: new %s %s%s", self, format_size(self._pressure.room),
            format_size(self._pressure.limit), self._unit, "would get 503 (dry run)" if dry else "get 503 for now",
            f", except {', '.join(exempt)}" if exempt else "",
        )  # fmt: skip

    def _decide(self, now: float, used: int | None) -> Decision:
        """Call decide(). If this worker must leave, its state becomes DRAINING before another worker can decide."""
        held = self.meter.held if self.meter.rss_known else None
        room = self.hard_limit.room
        growth = within(self._trend.growth(now, self.meter.held), room)
        if fast := outruns(self.limits.soft, growth.burst):
            self._door.grew_fast(now)
        if fast or self._history.breached_since is not None or self.meter.held >= self._door.checks_from or self.meter.crowded:
            self._pressure.update(now, within(self._door.growth(growth), room), bounded=room is not None)
            if self._pressure.short and self._neighbours.supervised:
                # this worker may be below its limit, and the supervisor still order it to go, because the pool is above its budget
                self.meter.publish_at = min(self.meter.publish_at, now + ASK_EVERY)
                if now >= self._call_at:
                    self._call_at = now + ASK_EVERY
                    self._report.wake_supervisor()
        else:
            self._pressure.forget()
        with self._neighbours.pool(self._pressure.short, self._pressure.full, self._pressure.out) as pool:
            decision = decide(self.policy, self.limits, Snapshot(used, held, *growth), self._history, pool, now)
            leaves = decision.action is Action.RECYCLE and not self.policy.dry_run and self._recycle is not None
            if leaves:
                settled = has_settled(self.policy, self.limits, used, self._history, now)
                self._neighbours.leaves(None if decision.reason in PATIENT else settled)
                self.slot.set_state(State.DRAINING)
        if decision.reason is Reason.SETTLED and used is not None:
            self._thresholds.stay(used, now, attempt("the figures of a need", "the server", self._need))
            self._take_limits()
        elif decision.reason is Reason.ABANDONED:
            say_it_stays(str(self))
        if leaves and pool.supervised and pool.order is Order.NONE:
            log.warning("%s ends without waiting for its supervisor: it grows so fast that the pool's memory is about to run out", self)
        if not leaves:
            asks = decision.action is Action.ASK
            self._history = replace(self._history, asked_at=now) if asks else self._history
            self._report.ask(asks, now, used, self._need_not_stay(now))
        return decision

    def _need(self) -> Grant:
        """What the pool's recycled workers say about this one, which has settled above its soft limit."""
        from oomsafe.policy.grant import grant  # imported here: it needs Python's statistics, which take 1 MiB

        return grant(self._neighbours.view().retired)

    def _need_not_stay(self, now: float) -> bool:
        """Whether it has served for its lifetime, was probed, or an operator has ordered it to be recycled: not for its memory."""
        return now >= self._ages_at or self._history.ordered is not None

    def _why_it_need_not_stay(self) -> Reason | None:
        """OPERATOR, who has ordered it to be recycled, or PROBED; None: neither, or it can't be recycled."""
        ordered = self.slot.operator_orders
        if ordered and self._recycle is None:
            once("operator", logging.WARNING, "%s should be recycled by an operator's order, and nothing here can", self)
        if self._recycle is None:
            return None
        return Reason.OPERATOR if ordered else Reason.PROBED if self._examination.waits_for_replacement else None

    def probe(self, work: int = 2000, seconds: float = 60.0) -> bool:
        """Trace this process's allocations for so many pieces of work and so many seconds at most; the log says which lines keep memory.

        It begins within about two seconds. False: this process is traced already. Call it in a worker, not in its supervisor.
        """
        return self._examination.probe(work, seconds)

    def _follow_inspection(self, now: float) -> None:
        if self._examination.follow_inspection(now, self._began):
            self._gauge.keep()
            self.meter.publish_at = min(self.meter.publish_at, now + ASK_EVERY)
        else:
            self._gauge.forget()

    def _reclaim(self, over: int) -> bool:
        """Give memory back, and decide again. `over`: bytes above the limit. Returns False if that happens in the background."""
        self.meter.crowded = self._door.waits_for_reclaim(time.monotonic(), self.limits.soft)
        return self._give_back(str(self), partial(self._reclaimed, over))

    def _reclaimed(self, over: int, freed: int) -> None:
        # the time of its end, so that a reclaim that took long is not followed by another at once
        now = time.monotonic()
        self._history = replace(self._history, reclaimed_at=now, futile=futile_after(self._history.futile, over, freed))
        self._consider(now)

    @property
    def _may_reclaim(self) -> bool:
        """Whether memory may be given back in this worker, below its limit too."""
        return self._ready and self.policy.reclaim and not self.policy.dry_run and not self._decided and not self._examination.was_probed

    def _give_back(self, who: str, then: Callable[[int], None], idle: bool = False) -> bool:
        """See Reclaim.run."""
        from oomsafe.worker.reclaim import Reclaim  # imported here, because only a worker that has grown needs it

        def given_back(freed: int) -> None:
            # what was measured before says nothing about the process as it is now
            self._gauge.forget()
            if freed >= MIB:
                self._trend.forget()
            then(freed)

        return Reclaim(self.meter, self._background, who).run(given_back, self._deciding.release, idle=idle)

    def _go(self, reason: Reason, now: float, used: int | None) -> None:
        """Recycle this worker, or log that it should be recycled."""
        self._decided = self.policy.dry_run or self._recycle is not None or reason is not Reason.LIFETIME
        self._left_for = reason
        # from here on, new work no longer waits for room: the worker leaves, or can't be recycled at all
        self._door.open()
        self.meter.crowded = False
        self.should_recycle = not self.policy.dry_run
        self.meter.counters.recycles[layout.REASONS.index(reason.value)] += 1
        self._report.publish(now)
        blame = self._blame(reason, now)
        line = self._line(reason, now, used, blame.text)
        log.log(logging.INFO if self._recycle or self.policy.dry_run else logging.WARNING, "%s", line)
        header = self._header
        if header is not None:
            attempt("the line about a recycle", "the server", lambda: header.note_recycle(line, blame.route))
        if not self._decided:
            self._thresholds.outlive()  # that it is past its lifetime is logged once; its memory is still watched
            self._take_limits()
        if self.policy.dry_run or self._recycle is None:
            return
        try:
            raise_score(self.policy.draining_oom_score_adj)
        except ScoreRefused as error:  # always so under --user: the worker leaves with its old score
            once("score", logging.DEBUG, "%s", error)
        self.meter.leaving = True
        self._report.wake_supervisor()  # what is in flight may take long, and the replacement need not wait for that
        self._recycle()

    def _blame(self, reason: Reason, now: float) -> Blame:
        if reason is Reason.LIFETIME:
            return Blame()
        blame = attempt("looking for who made it grow", "the server", partial(self._suspects.blame, now)) or Blame()
        probed = None if self._header is None else self._header.probed
        if probed is None or probed.stage is not Stage.DONE:
            return blame
        return blame._replace(text=f"{blame.text}; by the last probe {probed.text}")

    def _line(self, reason: Reason, now: float, used: int | None, blamed: str) -> str:
        dry, here = self.policy.dry_run, self._recycle is not None
        doing = "would be recycled (dry run)" if dry else "recycling" if here else "should be recycled, and nothing here can"
        cause = why(self.limits, reason, used, self.meter.held, self._history, self._report.asks, now)
        return f"{self} {doing}: {cause}, after {counted(self.meter.counters.work, self._unit)}{blamed}"

    def _take_limits(self) -> None:
        if self._own_board is not None:
            self._own_board.describe(self._thresholds.capacity, self.limits)
        self.meter.limit(self._thresholds.soft)
        if not self.policy.dry_run or self.policy.shed:
            self._door.follow(time.monotonic(), self.meter.held)
        self._cadence.set_alert()
        self._history = replace(self._history, refused=self._thresholds.refused, stays=self._thresholds.stays)
        self._ages_at = sys.maxsize if self.limits.lifetime is None else self._history.ready_at + self.limits.lifetime

    def _used(self, now: float) -> int | None:
        """What the worker holds, in the metric of the soft limit; bytes, None if it can't be read."""
        return self._gauge.read(self.limits.metric, self.meter.held, self._cadence.near, now) if self.meter.rss_known else None

    def __str__(self) -> str:
        return f"worker {self.pid} (slot {self.slot.number})"
