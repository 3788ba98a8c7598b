"""The guard: in each worker, it measures every piece of work, and decides when this worker has had its day."""

from __future__ import annotations

import gc
import logging
import os
import random
import sys
import time
from _thread import allocate_lock
from collections.abc import Callable
from dataclasses import replace

from oomsafe.errors import ScoreRefused
from oomsafe.kernel.capacity import read_capacity
from oomsafe.kernel.malloc import trim
from oomsafe.kernel.oom_score import read_score, write_score
from oomsafe.kernel.process import OwnMemory, shared_out
from oomsafe.policy.decide import Action, Decision, History, Pool, Reason, Snapshot, above_baseline, decide, within_reach
from oomsafe.policy.limits import Capacity, Limits, resolve_limits
from oomsafe.policy.settings import Policy
from oomsafe.policy.text import printable
from oomsafe.policy.units import format_change, format_size
from oomsafe.policy.victims import clamp_score
from oomsafe.pool import layout
from oomsafe.pool.meter import PUBLISH_EVERY, Meter, log
from oomsafe.pool.scoreboard import Scoreboard
from oomsafe.pool.slot import Figures, Slot
from oomsafe.pool.view import PoolView, view_alone

#: Seconds until a worker over its limit that may not go yet looks again.
LOOK_AGAIN = 0.02

#: Seconds between two samples of pss and uss: one holds the process's mmap_lock for 2.5 ms a GiB.
SHARED_OUT_EVERY = 5.0

#: A worker over its limit after so little work may just need that much; so many in a row, and it does.
FIRST_WORK, EARLY_BREACHES = 3, 3

Recycle = Callable[[], None]
Background = Callable[[Callable[[], None]], None]


class Guard(Meter):
    """Measures this process's work and has it recycled above its limits.

    `recycle` is called once, from whichever thread saw the breach, when this worker should finish
    what it has in flight and end; None where nothing can be recycled: then `should_recycle` tells.
    `background` runs a slow function beside the work; None runs it in place, between two pieces.
    `unit` names the work in logs. A guard belongs to the process that made it: make one after a fork.
    Without arguments it is a pool of one.
    """

    def __init__(
        self,
        policy: Policy | None = None,
        *,
        recycle: Recycle | None = None,
        background: Background | None = None,
        unit: str = "pieces of work",
        board: Scoreboard | None = None,
        slot: Slot | None = None,
        capacity: Capacity | None = None,
        memory: OwnMemory | None = None,
    ) -> None:
        super().__init__(slot or Slot.private(), memory)
        self.policy = policy or Policy()
        self.pid = os.getpid()
        self.should_recycle = False
        """Whether this worker has been told to end."""
        self._recycle = recycle
        self._background = background
        self._unit = unit
        self._board = board
        self._deciding = allocate_lock()
        self._jitter_share = random.random()  # noqa: S311  it spreads load, it guards nothing
        self._capacity = capacity or read_capacity()
        self._shared: tuple[int, int] | None = None
        self._shared_at = float("-inf")
        self._history = History(ready_at=time.monotonic())
        self.baseline = self._used(self._history.ready_at)
        """What the limits are compared with, right after boot; bytes, None where it can't be read."""
        self.limits = Limits(soft=None)
        self._set_limits(say=board is None)
        self.slot.set_state(layout.SERVING)
        self._look(self._history.ready_at)

    def tick(self) -> None:
        """Called by the server's own loop, about once a second and as often as it likes: looks also when idle."""
        now = time.monotonic()
        if now >= self._publish_at:
            try:
                self.measure()
                self._look(now)
            except Exception as error:
                self.failed("tick", error)

    def pool(self) -> PoolView:
        """The pool that this worker is in, as it stands on the scoreboard; without one, this worker alone."""
        return self._board.read() if self._board is not None else view_alone(self.slot.copy())

    def retire(self) -> None:
        """The worker ends: its last figures go to the scoreboard."""
        with self._deciding:
            self._publish(time.monotonic())

    def _look(self, now: float) -> None:
        if not self._deciding.acquire(blocking=False):
            return  # another thread is looking
        release = True
        try:
            if now >= self._publish_at:
                self._follow_pool()
                self._publish(now)
            if not self.should_recycle:
                release = self._consider(now)
        finally:
            if release:
                self._deciding.release()

    def _consider(self, now: float) -> bool:
        """Decide and act. False: the rest happens in the background, which also releases the lock."""
        self._look_at = now + LOOK_AGAIN
        used = self._used(now)
        breached = used is not None and self.limits.early is not None and used > self.limits.early
        since = (self._history.breached_since or now) if breached else None
        self._history = replace(self._history, breached_since=since)
        decision = self._decide(now, used)
        if decision.action is Action.RECLAIM:
            self._history = replace(self._history, reclaimed_at=now)
            return self._reclaim()
        if decision.action is Action.RECYCLE:
            self._go(decision.reason, now, used)
        return True

    def _decide(self, now: float, used: int | None) -> Decision:
        """decide(), holding the pool's turn while it may be taken."""
        rss = self.rss if self.rss_known else None
        seen = Snapshot(used=used, rss=rss)
        locked = self._board is not None and rss is not None and rss > self._alert and self._board.try_lock()
        try:
            decision = decide(self.policy, self.limits, seen, self._history, self._pool(locked, now), now)
            if decision.action is Action.RECYCLE:
                decision = self._unless_needed_at_boot(decision, locked, used)
            if decision.action is Action.RECYCLE and not self.policy.dry_run:
                self.slot.set_state(layout.DRAINING)
            return decision
        finally:
            if locked and self._board is not None:
                self._board.unlock()

    def _pool(self, locked: bool, now: float) -> Pool:
        young = now - self._history.ready_at < self.policy.min_lifetime
        over_budget = young and self.rss > self._alert and self._over_budget()
        if self._board is None or self.policy.dry_run:
            return Pool(over_budget=over_budget)
        if not locked:
            return Pool(draining=sys.maxsize, over_budget=over_budget)  # somebody else is taking a turn
        draining, starting, turns = self._board.others(self.slot)
        return Pool(draining, starting, turns, over_budget)

    def _over_budget(self) -> bool:
        working_set = read_capacity().working_set
        return working_set is not None and self.limits.budget is not None and working_set > self.limits.budget

    def _unless_needed_at_boot(self, decision: Decision, locked: bool, used: int | None) -> Decision:
        """An app that loads its models with its first work would be recycled for ever: see it, and stop."""
        if decision.reason is not Reason.SOFT or not locked or self._board is None:
            return decision
        first = self.counters.work <= FIRST_WORK
        if first and self._board.early_breaches >= EARLY_BREACHES:
            self._refuse("with its first work", used)
            return Decision(Action.SERVE, Reason.REFUSED)
        self._board.early_breaches = self._board.early_breaches + 1 if first else 0
        return decision

    def _reclaim(self) -> bool:
        before = self.rss
        gc.collect()  # here even on an event loop: it holds the GIL wherever it runs, and finalizers expect this thread
        if self._background is None:
            self._reclaimed(before)
            return self._consider(time.monotonic())
        self._background(lambda: self._finish_reclaim(before))
        return False

    def _finish_reclaim(self, before: int) -> None:
        try:
            self._reclaimed(before)
            self._consider(time.monotonic())
        except Exception as error:
            self.failed("reclaim", error)
        finally:
            self._deciding.release()

    def _reclaimed(self, before: int) -> None:
        trim()
        self._shared_at = float("-inf")
        freed = max(0, before - self.measure())
        self.counters.reclaims += 1
        self.counters.reclaimed += freed
        log.info("%s reclaimed %s by gc and malloc_trim: rss %s -> %s", self, *map(format_size, (freed, before, self.rss)))

    def _go(self, reason: Reason, now: float, used: int | None) -> None:
        """This worker's day is over."""
        self.should_recycle = True
        self.counters.recycles[layout.REASONS.index(reason.value)] += 1
        self._publish(now)
        log.log(logging.INFO if self._recycle or self.policy.dry_run else logging.WARNING, "%s", self._farewell(reason, now, used))
        if self.policy.dry_run or self._recycle is None:
            return
        self._raise_score(self.policy.draining_oom_score_adj)
        self._recycle()

    def _farewell(self, reason: Reason, now: float, used: int | None) -> str:
        hard = reason is Reason.HARD
        kind, figure = ("rss", self.rss) if hard else (self.policy.metric, used)
        limit = self.limits.hard if hard else self.limits.early
        since = now - (self._history.breached_since or now)
        doing = (
            "would be recycled (dry_run)"
            if self.policy.dry_run
            else "recycling"
            if self._recycle
            else "should be recycled, and nothing here can"
        )
        growth, name = self.largest
        largest = f"; largest growth in one of them: {printable(name)} ({format_change(growth)})" if growth else ""
        jittered = "" if hard or limit == self.limits.soft else f" (of {format_size(self.limits.soft)}, jitter)"
        named = "hard" if hard else "soft"
        return (
            f"{self} {doing}: {kind} {format_size(figure)} > {named} limit {format_size(limit)}{jittered} for {since:.1f} s, "
            f"after {self.counters.work} {self._unit}{largest}"
        )

    def _set_limits(self, say: bool) -> None:
        limits, warnings = resolve_limits(self.policy, self._capacity, self._jitter_share)
        for warning in warnings if say else ():
            log.warning("%s", warning)
        self.limits = above_baseline(within_reach(limits, self.baseline), self.baseline)
        if self.limits.soft != limits.soft:
            self.limits = replace(self.limits, soft=limits.soft, early=limits.soft)
            self._refuse("right after boot", self.baseline)
        else:
            self._history = replace(self._history, refused=False)
        self._set_alert()

    def _refuse(self, when: str, needed: int | None) -> None:
        self._history = replace(self._history, refused=True)
        self._set_alert()
        if self._board is None or self._board.first_to_refuse():
            log.error(
                "soft limit %s is not used: a worker needs %s %s, so it would be recycled for ever; "
                "set soft_limit well above %s, or have fewer workers or more memory",
                format_size(self.limits.soft), format_size(needed), when, format_size(needed),
            )  # fmt: skip

    def _set_alert(self) -> None:
        self.soft_limit = None if self._history.refused else self.limits.early
        self._alert = min((limit for limit in (self.soft_limit, self.limits.hard) if limit is not None), default=sys.maxsize)

    def _follow_pool(self) -> None:
        """A share of the budget changes with the number of workers (SIGTTIN, SIGTTOU)."""
        if self._board is not None and self._board.workers != self._capacity.workers:
            self._capacity = replace(self._capacity, workers=self._board.workers)
            self._set_limits(say=False)

    def _used(self, now: float) -> int | None:
        """The figure that the soft limit is compared with."""
        if not self.rss_known:
            return None
        if self.policy.metric == "rss" or (hasattr(self, "limits") and self.rss <= self._alert):
            return self.rss  # pss and uss are never above it, so below the limit it says enough
        if now - self._shared_at >= SHARED_OUT_EVERY:
            self._shared, self._shared_at = shared_out(), now
        if self._shared is None:
            return self.rss
        return self._shared[0] if self.policy.metric == "pss" else self._shared[1]

    def _publish(self, now: float) -> None:
        self._publish_at = now + PUBLISH_EVERY
        pss, uss = self._shared or (None, None)
        rss, peak = (self.rss, self.peak_rss) if self.rss_known else (None, None)
        figures = Figures(rss, peak, self.baseline, self.soft_limit, self.limits.hard, pss, uss, read_score(), self.clock.in_flight)
        with self._lock:
            self.slot.publish(figures, self.counters)

    def _raise_score(self, step: int) -> None:
        present = read_score()
        if present is None or not step:
            return
        try:
            write_score(clamp_score(present + step))
        except ScoreRefused as error:
            self.say_once("score", logging.WARNING, "%s", error)

    def __str__(self) -> str:
        return f"worker {self.pid} (slot {self.slot.number})"
