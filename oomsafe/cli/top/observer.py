"""Reads the pools again and again, the shown ones each time and the others less often, and keeps what is needed to tell their growth."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import cached_property

from oomsafe.cli.pools import Found, find_pools
from oomsafe.policy.time_to_limit import kept, pace_of, time_to_limit
from oomsafe.policy.trend import Sample
from oomsafe.scoreboard.live import live
from oomsafe.scoreboard.places import living_boards
from oomsafe.scoreboard.view import PoolView, WorkerView

#: Seconds between two readings of a pool that is not shown: one worker takes 40 us, and as much again to ask the kernel what it holds.
SELDOM = 5.0

#: Seconds for which a pool is shown after its end.
GONE_FOR = 30.0

#: The most seconds that one round may take; pools for which no time is left keep their last figures.
ROUND = 1.0


@dataclass(frozen=True)
class Worker:
    """One worker, and how fast it grows."""

    view: WorkerView
    samples: tuple[Sample, ...] = ()
    """What it held, in bytes, on the monotonic clock."""

    @cached_property
    def pace(self) -> float | None:
        """Bytes a second, negative if it shrinks; None: it has not been observed for long enough.

        Only worked out for workers that are shown: that takes 30 us for each.
        """
        return pace_of(self.samples)

    @property
    def limit(self) -> int | None:
        """What it is shown against, in bytes: its soft limit, without one its hard limit; None: it has neither."""
        figures = self.view.figures
        return figures.soft if figures.soft is not None else figures.hard

    @property
    def busy(self) -> int:
        """How much work it has in flight: what it publishes is as old as the one request that it may be in."""
        return max(self.view.figures.in_flight, len(self.view.in_flight))

    @property
    def share(self) -> float | None:
        """How much of its limit it holds; None: one of both is not known."""
        return self.view.used / self.limit if self.view.used is not None and self.limit else None

    @property
    def seconds(self) -> float | None:
        """The time to its limit; see time_to_limit()."""
        return time_to_limit(self.view.used, self.limit, self.pace)


@dataclass(frozen=True)
class Observed:
    """One pool as it was last read."""

    path: str
    pool: PoolView | None = None
    """None: it could never be read."""
    workers: tuple[Worker, ...] = ()
    problem: str = ""
    """Why there are no present figures: one line, printable."""
    read_at: float = float("-inf")
    """When it was read, on the monotonic clock."""
    gone_at: float | None = None
    """When its supervisor was found to have ended; None: it runs."""

    @property
    def found(self) -> Found | None:
        """For an order to it; None: it can't be read, or has ended."""
        return None if self.pool is None or self.gone_at is not None else Found(self.path, self.pool)


class Observer:
    """All pools of this user, for root those of all; with `only`, the one with this scoreboard."""

    def __init__(self, only: str | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._only = only
        self._clock = clock
        self._pools: dict[str, Observed] = {}
        self._samples: dict[tuple[str, int], tuple[Sample, ...]] = {}
        """By scoreboard and generation of the worker."""

    def observe(self, shown: Collection[str] | None) -> list[Observed]:
        """Read what is due, and return every pool, in the order of their names. `shown`: the scoreboards on the screen; None: all."""
        now = self._clock()
        paths = [self._only] if self._only else living_boards()
        for path in paths:
            before = self._pools.get(path)
            is_shown = before is None or shown is None or path in shown
            if before is None or ((is_shown or now - before.read_at >= SELDOM) and self._clock() - now < ROUND):
                self._pools[path] = self._read(path, before or Observed(path), is_shown)
        for path in self._pools.keys() - set(paths):
            self._end(path, now)
        present = {(each.path, worker.view.generation) for each in self._pools.values() for worker in each.workers}
        self._samples = {key: samples for key, samples in self._samples.items() if key in present}
        return sorted(self._pools.values(), key=_place)

    def _read(self, path: str, before: Observed, is_shown: bool) -> Observed:
        problems: list[str] = []
        found = find_pools([path], problems.append, routes=False)
        now = self._clock()
        if not found:
            return replace(before, workers=(), problem=problems[0] if problems else "it can't be read", read_at=now)
        # the figures of a pool that is not shown may be as old as its workers' last, which publish once a second
        pool = live(found[0].pool) if is_shown else found[0].pool
        return Observed(path, pool, tuple(self._worker(path, worker, now) for worker in pool.workers), read_at=now)

    def _worker(self, path: str, worker: WorkerView, now: float) -> Worker:
        key = path, worker.generation
        samples = self._samples.get(key, ())
        if worker.used is not None:
            samples = self._samples[key] = kept(samples, Sample(now, worker.used))
        return Worker(worker, samples)

    def _end(self, path: str, now: float) -> None:
        before = self._pools[path]
        gone_at = now if before.gone_at is None else before.gone_at
        if before.pool is None or now - gone_at >= GONE_FOR:
            del self._pools[path]
        else:
            ended = f"{'process' if before.pool.is_single_process else 'its supervisor'} {before.pool.supervisor} has ended"
            self._pools[path] = replace(before, workers=(), problem=ended, gone_at=gone_at)


def _place(observed: Observed) -> tuple[bool, str, int, str]:
    """By name; those that can't be read come last."""
    pool = observed.pool
    return (True, "", 0, observed.path) if pool is None else (False, pool.name, pool.supervisor, observed.path)
