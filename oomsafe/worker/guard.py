"""The guard: in each worker, it measures every piece of work, and decides when this worker has had its day."""

from __future__ import annotations

import logging
import os
import sys
import time
from _thread import allocate_lock
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from oomsafe.errors import ScoreRefused
from oomsafe.kernel.capacity import read_capacity
from oomsafe.kernel.malloc import trim
from oomsafe.kernel.oom_score import raise_score, read_score
from oomsafe.kernel.process import OwnMemory
from oomsafe.log import failed, log, once
from oomsafe.policy.door import WAITS_FOR
from oomsafe.policy.limits import Capacity, Limits
from oomsafe.policy.readers import COUNT_CLEAN
from oomsafe.policy.reclaim import futile_after
from oomsafe.policy.recycle import (
    ASKS_FROM,
    SETTLED,
    Action,
    Decision,
    History,
    Order,
    Reason,
    Snapshot,
    came_by_a_step,
    decide,
    has_settled,
    outruns,
)
from oomsafe.policy.settings import Policy
from oomsafe.policy.state import State
from oomsafe.policy.trend import LATELY, SAMPLE_EVERY, Growth, Trend
from oomsafe.policy.units import MIB, format_size
from oomsafe.scoreboard import layout
from oomsafe.scoreboard.board import Scoreboard
from oomsafe.scoreboard.forks import own
from oomsafe.scoreboard.slot import Figures, Slot
from oomsafe.worker.background import Background
from oomsafe.worker.door import Door
from oomsafe.worker.farewell import farewell, history
from oomsafe.worker.gauge import Gauge
from oomsafe.worker.meter import PUBLISH_EVERY, Meter, Work
from oomsafe.worker.neighbours import Neighbours
from oomsafe.worker.pressure import SHORT_EVERY, Pressure
from oomsafe.worker.thresholds import Thresholds

if TYPE_CHECKING:
    from oomsafe.scoreboard.seat import Seat
    from oomsafe.scoreboard.view import PoolView
    from oomsafe.worker.siblings import Siblings

#: Seconds until a worker over its limit that may not go yet looks again.
LOOK_AGAIN = 0.005

#: Seconds between two times that a worker which asks to be replaced says what it holds, and wakes its supervisor.
ASK_EVERY = 0.1

#: A worker that will be over its limit within so many seconds, at the pace of the last moment, is measured more often.
LOOKS_AHEAD = 2.0

Recycle = Callable[[], None]


class Guard:
    """Measures this process's work and has it recycled above its limits.

    `recycle` is called once, from whichever thread saw the breach, when this worker should finish
    what it has in flight and end; None where nothing can be recycled: then `should_recycle` tells.
    `background` runs a slow function beside the work; None runs it in place, between two pieces.
    `poke` wakes the supervisor, which would see what this worker says at its next look; None: it can wait.
    `unit` names the work in logs. A guard belongs to the process that made it: make one after a fork.
    With a `board`, the worker serves when it says so by ready(). `parent` is the process that brings up another worker in
    this one's place: when it is gone, this worker stays. None: nothing is known of it. `siblings` are its other workers.
    Without arguments it is a pool of one.
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
    ) -> None:
        self.policy = policy or Policy()
        self.slot = slot or Slot.private()
        self.meter = Meter(self.slot, memory, look=self._look, admit=self._admit)
        """Each piece of work passes through it; adapters that must not pay for a call more go to it straight."""
        self.meter.counts_clean = self.policy.metric in COUNT_CLEAN
        self.pid = os.getpid()
        self.here = True
        """Whether this is the process that it guards: False in a fork of it."""
        own(self)
        self.should_recycle = False
        """Whether this worker should end, or has been told to."""
        self.at_the_door = False
        """Whether a server's adapter counts each request before any app has it: what comes over a bridge to WSGI is counted."""
        self._decided = False
        self._recycle = recycle
        self._background = background
        self._poke = poke
        self._unit = unit
        self._board = board
        self._neighbours = Neighbours(board, self.slot, parent, siblings, asks=recycle is not None)
        self._deciding = allocate_lock()
        self._gauge = Gauge()
        self._thresholds = Thresholds(self.policy, capacity or read_capacity(), self._gauge, self._neighbours, measure=read_capacity)
        self._history = History(ready_at=time.monotonic())
        self._trend = Trend()
        self._pressure = Pressure(self.policy, self._thresholds, self._neighbours, self._view)
        self._door = Door(self._pressure, self._neighbours)
        self._grew_fast_at = float("-inf")
        self._near: float = sys.maxsize
        """Bytes held from which its own limit is near: only there are figures read that stall it."""
        self._ready = self._asking = False
        if board is None:
            self.ready()

    @classmethod
    def of_seat(cls, seat: Seat, board: Scoreboard | None, slot: Slot | None, *, unit: str, **how: Any) -> Guard:
        """In a supervisor's worker, when it has loaded what it needs: its guard, to be told by ready() when the worker serves.

        `board` and `slot` are what it has taken of its seat, `how` is recycle, background and poke.
        """
        board = board if slot is not None else None
        return cls(seat.policy, unit=unit, board=board, slot=slot, capacity=seat.capacity, parent=os.getppid(), **how)

    def work(self, name: str) -> Work:
        """``with guard.work("name"): ...``: a piece of work, measured until the end of the block."""
        return self.meter.begin(name.encode("utf-8", "replace"))

    @property
    def leaving(self) -> bool:
        """Whether this worker has been told to end, and finishes what it has in flight."""
        return self.meter.leaving

    def ready(self) -> None:
        """The worker serves from now on: what it has now is what it needs. Later calls change nothing."""
        if self._ready or not self._is_here():
            return
        now = time.monotonic()
        self.meter.measure()
        if self._board is not None:
            self._neighbours.boot = self.slot.age
        self._history = History(ready_at=now)
        self._thresholds.set(self.meter.held if self.meter.rss_known else None, now, say=self._board is None)
        if self._neighbours.supervised:
            self._pressure.look(now, Growth())  # what the supervisor has seen may be a second old: as long as a leak takes
        self._take_limits()
        self._history = replace(self._history, ready_with=self.baseline)
        self._ready = True  # last: what has failed above is tried again at the next call
        self._look(now)
        if not self._decided:
            self.slot.set_state(State.SERVING)
        self._wake_supervisor()

    def say_limits(self, above: str) -> None:
        """One line at the boot of a process that no supervisor speaks for: its limits, and what becomes of it `above` the soft one."""
        from oomsafe.policy.boot_line import dry, limits_in_force  # here: most workers have a supervisor

        limits = limits_in_force(self.policy, self.limits, self._thresholds.capacity)
        log.info("oomsafe guards this process: %s; above its soft limit %s%s", limits, above, dry(self.policy))

    @property
    def limits(self) -> Limits:
        """In force for this worker."""
        return self._thresholds.limits

    @property
    def baseline(self) -> int | None:
        """What the limits are compared with, right after boot; bytes, None where it can't be read."""
        return self._thresholds.baseline

    def tick(self) -> None:
        """Called by the server's own loop, about once a second and as often as it likes: looks also when idle."""
        now = time.monotonic()
        if now >= self.meter.publish_at:
            try:
                self._look(now)
            except Exception as error:
                failed("tick", "the server", error)

    @property
    def pause(self) -> float:
        """Seconds that a server's loop may sleep until tick() has something to look at: a second at most."""
        return min(PUBLISH_EVERY, max(SHORT_EVERY, self.meter.publish_at - time.monotonic()))

    def pool(self) -> PoolView:
        """The pool that this worker is in, as it stands on the scoreboard; without one, this worker alone."""
        view = self._view()
        if self._board is not None:
            return view
        capacity = read_capacity()
        return replace(
            view, limit=capacity.limit, budget=self.limits.budget, held=capacity.held, others=capacity.others, source=str(capacity.source)
        )

    def _view(self) -> PoolView:
        from oomsafe.scoreboard.view import view_alone  # here: most workers are never asked

        return self._board.read() if self._board is not None else view_alone(self.slot.copy())

    def holds_up(self) -> bool:
        """While this worker leaves: whether the pool has no room for another until it is gone: then it must not wait for idle clients."""
        try:
            return not self.policy.dry_run and self._pressure.holds_up(time.monotonic())
        except Exception as error:
            failed("looking at the pool", "the server", error)
            return False

    def _admit(self, route: str) -> str | None:
        return route if self._board is None or not self.here else self._board.header.admit(route)

    def retire(self) -> None:
        """The worker has no work any more and ends: its last figures go to the scoreboard."""
        if not self._is_here():
            return
        try:
            if self._ready:  # else it ends before it has served: whoever finds it gone is to see that
                self.slot.set_state(State.LEAVING)
        except Exception as error:
            failed("retire", "the server", error)
        # a second is enough for any look in another thread; more would hold up the server's exit
        if self._deciding.acquire(timeout=1):
            self._publish(time.monotonic())
            self._deciding.release()

    def leave(self) -> None:
        """In a fork of its process, which says nothing of the worker that it comes from, and decides nothing for it."""
        self.here = self.meter.crowded = False
        self.meter.leave()
        self.slot.leave()
        self._deciding = allocate_lock()
        self.meter.publish_at = self.meter.look_at = sys.maxsize

    def _is_here(self) -> bool:
        """Asked where something is decided, for C code may fork as well."""
        if self.here and os.getpid() != self.pid:
            self.leave()
        return self.here

    def _look(self, now: float) -> None:
        if not self._is_here() or not self._deciding.acquire(blocking=False):
            return  # another thread is looking
        release = True
        try:
            if now >= self.meter.publish_at:
                self.meter.publish_at = now + PUBLISH_EVERY  # first: what fails below must not keep it from deciding
                self._refresh(now)
                if self._asking:
                    self._wake_supervisor()  # it may have been asleep, or have had nobody to spare
            due = self.meter.held > self.meter.alert or self._asking or self.meter.crowded or self._history.breached_since is not None
            if not self._decided and (due or self.slot.order is not Order.NONE):
                release = self._consider(now)
        finally:
            if release:
                self._deciding.release()

    def _refresh(self, now: float) -> None:
        """Once a second, more often while it grows: the memory, the limits, and what the others see of both."""
        try:
            if not self.meter.counts_clean:
                self.meter.file_dirty = self._gauge.file_dirty(self.meter.held, self.meter.rss, self._near, now)
            self.meter.measure()
            self._thresholds.follow(now)
            self._trend.add(now, self.meter.held)
            self._take_limits()
            self.slot.need(self._used(now), self._trend.growth(now, self.meter.held))
        except Exception as error:
            failed("tick", "the server", error)
        self._publish(now)

    def _consider(self, now: float) -> bool:
        """Decide and act. False: the rest happens in the background, which also releases the lock."""
        self.meter.look_at = now + LOOK_AGAIN
        used = self._used(now)
        self._note_breach(now, used)
        decision = self._decide(now, used)
        if decision.action is Action.RECLAIM:
            self._history = replace(self._history, reclaimed_at=now)
            return self._consider(now) if self.policy.dry_run else self._reclaim((used or 0) - (self.limits.early or 0))
        if decision.action is Action.RECYCLE:
            self._go(decision.reason, now, used)
        elif not self.policy.dry_run:
            self._door.look(now, used or 0, self.meter.soft_limit, self.meter.held, self._trend.growth(now, self.meter.held))
            self.meter.crowded = self._door.shut
            self._set_alert()
        return True

    def knock(self) -> None:
        """Work waits at the door: is there room by now? Only adapters that ask have it wait, and only then it is said."""
        now = time.monotonic()
        if self._door.shut:
            once(
                "door", logging.INFO, "%s keeps what comes waiting, %.1f s at most, for the memory of a worker that leaves: "
                "%s are left up to the limit; lower soft_limit, or have fewer workers", self, WAITS_FOR, format_size(self._pressure.room),
            )  # fmt: skip
        try:
            self._look(now)
        except Exception as error:
            self.meter.crowded = False
            failed("looking at the pool", "the server", error)

    def _note_breach(self, now: float, used: int | None) -> None:
        """Since when this worker has been over its limit, and how it came there."""
        if used is None or self.limits.early is None or used <= self.limits.early:
            self._history = replace(self._history, breached_since=None, breached_with=None)
        elif self._history.breached_since is None:
            growth, pace = self._trend.step(now, self.meter.held)
            step = came_by_a_step(self.limits, self._history.ready_with, growth)
            climbed = pace is None or pace * SAMPLE_EVERY >= self.limits.early * SETTLED
            self._history = replace(self._history, breached_since=now, breached_with=used, breached_by_step=step, climbed=climbed)
        self._trend.add(now, self.meter.held)

    def _decide(self, now: float, used: int | None) -> Decision:
        """decide(), and if this worker is to leave, it is on its way before another can ask."""
        held = self.meter.held if self.meter.rss_known else None
        growth = self._trend.growth(now, self.meter.held)
        if fast := outruns(self.limits.soft, growth.burst):
            self._grew_fast_at = now
        if fast or self._history.breached_since is not None or self.meter.held >= self._door.looks_from or self.meter.crowded:
            self._pressure.look(now, self._door.growth(growth))
        else:
            self._pressure.forget()
        with self._neighbours.look(self._pressure.short, self._pressure.full, self._pressure.out) as pool:
            decision = decide(self.policy, self.limits, Snapshot(used, held, *growth), self._history, pool, now)
            leaves = decision.action is Action.RECYCLE and not self.policy.dry_run and self._recycle is not None
            if leaves:
                self._neighbours.leaves(has_settled(self.policy, self.limits, used, self._history, now))
                self.slot.set_state(State.DRAINING)
        if decision.reason is Reason.SETTLED and used is not None:
            self._thresholds.stay(used, now)
            self._take_limits()
        elif decision.reason is Reason.ABANDONED:
            once(
                "abandoned", logging.WARNING, "%s stays, whatever it holds: its supervisor is gone, or has stood still for seconds, and "
                "nobody would bring up another worker in its place", self,
            )  # fmt: skip
        if leaves and pool.supervised and pool.order is Order.NONE:
            log.warning("%s ends without waiting for its supervisor: it grows so fast that the pool's memory is about to run out", self)
        if not leaves:
            self._ask(decision.action is Action.ASK, now, used)
        return decision

    def _ask(self, asking: bool, now: float, used: int | None) -> None:
        """Say on the scoreboard whether this worker asks to be replaced, and what it holds: its supervisor decides by that."""
        if asking:
            self._history = replace(self._history, asked_at=now)
        if asking is not self._asking:
            self._asking = asking
            self.slot.need(used, self._trend.growth(now, self.meter.held))
            self._publish(now)
            self.slot.set_state(State.WAITING if asking else State.SERVING)
            if asking:
                self._wake_supervisor()

    def _wake_supervisor(self) -> None:
        try:
            if self._poke is not None:
                self._poke()
        except OSError:
            pass  # it belongs to another user: it looks by itself within a second

    def _reclaim(self, over: int) -> bool:
        from oomsafe.worker.reclaim import collect  # here: only a worker over its limit pays for it

        before = self.meter.rss
        # a tenth of a second: what comes meanwhile would take it far above its limit, which matters where there is not much room
        fast, room = time.monotonic() - self._grew_fast_at < LATELY, self._pressure.room
        self.meter.crowded = fast and room is not None and room < (self.limits.soft or 0) * (self._neighbours.workers or 1)
        collect(others_wait=self._background is not None or self.meter.in_flight > 0)
        if self._background is None:
            self._reclaimed(before, over)
            return self._consider(time.monotonic())
        self._background(lambda: self._finish_reclaim(before, over))
        return False

    def _finish_reclaim(self, before: int, over: int) -> None:
        try:
            self._reclaimed(before, over)
            self._consider(time.monotonic())
        except Exception as error:
            self.meter.crowded = False
            failed("reclaim", "the server", error)
        finally:
            self._deciding.release()

    def _reclaimed(self, before: int, over: int) -> None:
        trim()
        self._gauge.forget()
        freed = max(0, before - self.meter.measure())
        if freed >= MIB:
            self._trend.forget()
        # from its end, for one that took long must not be followed by another at once
        futile = futile_after(self._history.futile, over, freed)
        self._history = replace(self._history, reclaimed_at=time.monotonic(), futile=futile)
        self.meter.counters.reclaims += 1
        self.meter.counters.reclaimed += freed
        level = logging.INFO if freed >= MIB else logging.DEBUG
        log.log(level, "%s reclaimed %s by gc and malloc_trim: rss %s -> %s", self, *map(format_size, (freed, before, self.meter.rss)))

    def _go(self, reason: Reason, now: float, used: int | None) -> None:
        """This worker's day is over."""
        self._decided = True
        # from here on nobody looks whether there is room: what comes yet, to one that leaves or to one that nobody can recycle, goes on
        self._door.open()
        self.meter.crowded = False
        self.should_recycle = not self.policy.dry_run
        self.meter.counters.recycles[layout.REASONS.index(reason.value)] += 1
        self._publish(now)
        log.log(logging.INFO if self._recycle or self.policy.dry_run else logging.WARNING, "%s", self._farewell(reason, now, used))
        if self.policy.dry_run or self._recycle is None:
            return
        try:
            raise_score(self.policy.draining_oom_score_adj)
        except ScoreRefused as error:  # under --user it always is: the worker goes without
            once("score", logging.DEBUG, "%s", error)
        self.meter.leaving = True
        self._wake_supervisor()  # what is in flight may take long: its replacement needn't wait for that
        self._recycle()

    def _farewell(self, reason: Reason, now: float, used: int | None) -> str:
        dry, here = self.policy.dry_run, self._recycle is not None
        doing = "would be recycled (dry run)" if dry else "recycling" if here else "should be recycled, and nothing here can"
        asked, breached = self._history.asked_at, self._history.breached_since
        stopped = None if self._asking or asked is None else now - asked
        why = farewell(self.limits, reason, used, self.meter.held, now - (breached or now), stopped)
        return f"{self} {doing}: {why}, {history(self.meter.counters.work, self._unit, self.meter.largest)}"

    def _take_limits(self) -> None:
        self.meter.limit(self._thresholds.soft)
        if not self.policy.dry_run:
            self._door.follow(time.monotonic(), self.meter.held)
        self._set_alert()
        self._history = replace(self._history, refused=self._thresholds.refused, stays=self._thresholds.stays)

    def _set_alert(self) -> None:
        """From how many bytes on the end of work has something to decide."""
        self._near = self._thresholds.alert
        if self._grows_fast and self._neighbours.supervised:
            self._near *= ASKS_FROM
        self.meter.alert = min(self._near, self._door.looks_from)

    @property
    def _grows_fast(self) -> bool:
        """Whether it will soon be over its limit, at the pace of the last moment; also right after boot, when that is not known."""
        pace = self._trend.pace
        return pace is None or (pace > 0 and self.meter.held + pace * LOOKS_AHEAD > self._thresholds.alert)

    def _look_within(self, now: float) -> float:
        """Seconds until the next look: a quarter of those that are left until it is over its limit, as fast as it grows."""
        if self._trend.pace is None:
            return SAMPLE_EVERY
        burst, left = self._trend.growth(now, self.meter.held).burst, self._thresholds.alert - self.meter.held
        return max(SHORT_EVERY, left / burst / 4) if burst > 0 else PUBLISH_EVERY

    def _used(self, now: float) -> int | None:
        """The figure that the soft limit is compared with."""
        return self._gauge.read(self.limits.metric, self.meter.held, self._near, now) if self.meter.rss_known else None

    def _publish(self, now: float) -> None:
        self.meter.publish_at = now + min(ASK_EVERY if self._asking else PUBLISH_EVERY, self._look_within(now))
        meter, known = self.meter, self.meter.rss_known
        pss, uss, private, *_ = self._gauge.shares or (None, None, None)
        try:
            figures = Figures(
                rss=meter.rss if known else None, peak_rss=meter.peak_rss if known else None, anon=meter.anon if known else None,
                pss=pss, uss=uss, private=private,
                baseline=self.baseline, soft=meter.soft_limit, hard=self.limits.hard,
                oom_score_adj=read_score(), in_flight=meter.in_flight,
            )  # fmt: skip
            self.meter.publish(figures)
        except Exception as error:  # whether others can see it or not, this worker protects itself
            failed("publish", "the server", error)

    def __str__(self) -> str:
        return f"worker {self.pid} (slot {self.slot.number})"
