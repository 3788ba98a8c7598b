"""Where one worker's limits stand: worked out from its policy, and held against what it needed right after boot."""

from __future__ import annotations

import math
import random
import sys
from dataclasses import replace

from oomsafe.policy.decide import SETTLED_FOR, SETTLED_WORKERS, above_baseline, settled_limits, within_reach
from oomsafe.policy.limits import Capacity, Limits, resolve_limits
from oomsafe.policy.settings import Policy
from oomsafe.policy.units import format_size
from oomsafe.pool import layout
from oomsafe.pool.gauge import Gauge
from oomsafe.pool.log import log
from oomsafe.pool.neighbours import Neighbours


class Thresholds:
    """One worker's limits in force."""

    def __init__(self, policy: Policy, capacity: Capacity, gauge: Gauge, neighbours: Neighbours) -> None:
        self.limits = Limits(soft=None)
        self.refused = False
        """The soft limit is below what a worker needs: recycling would never end."""
        self.baseline: int | None = None
        """What the limits are compared with, right after boot; bytes, None where it can't be read."""
        self._policy = policy
        self._capacity = capacity
        self._gauge = gauge
        self._neighbours = neighbours
        self._boot_rss: int | None = None
        self._stays_until = math.inf
        self._jitter_share = random.random()  # noqa: S311  it spreads load, it guards nothing

    @property
    def soft(self) -> int | None:
        """This worker's own soft limit in bytes; None while there is none."""
        return None if self.refused else self.limits.early

    @property
    def stays(self) -> bool:
        """Whether the soft limit has been raised for a while, for this worker had settled above it."""
        return self._stays_until < math.inf

    @property
    def alert(self) -> float:
        """rss from which there is something to decide."""
        return min((limit for limit in (self.soft, self.limits.hard) if limit is not None), default=sys.maxsize)

    @property
    def budget(self) -> int | None:
        """The pool's, in bytes."""
        return self.limits.budget

    def set(self, rss: int | None, now: float, say: bool) -> None:
        """Work them out for a worker that has just booted, and has `rss` bytes; None: that is not known."""
        limits, warnings = resolve_limits(self._policy, self._capacity, self._jitter_share)
        for warning in warnings if say else ():
            log.warning("%s", warning)
        if rss is not None:
            self._boot_rss, self.baseline = rss, self._gauge.read(limits.metric, rss, 0, now)
        self.limits = above_baseline(within_reach(limits, self.baseline, self._boot_rss), self.baseline)
        self.refused, self._stays_until = False, math.inf
        if self.limits.soft != limits.soft:
            self.limits = replace(self.limits, soft=limits.soft, early=limits.soft)
            self._refuse(self.baseline)
        if limits.hard is not None and self.limits.hard is None and self._neighbours.first_to_refuse(layout.REFUSES_HARD):
            log.error("hard limit %s is not used: a worker has %s right after boot", *map(format_size, (limits.hard, self._boot_rss)))

    def _refuse(self, needed: int | None) -> None:
        """Do without the soft limit; the first worker of the pool that must says so."""
        self.refused = True
        if self._neighbours.first_to_refuse(layout.REFUSES_SOFT):
            log.error(
                "soft limit %s is not used: a worker needs %s (%s) right after boot, so it would be recycled for ever; "
                "set soft_limit well above %s, or have fewer workers or more memory",
                format_size(self.limits.soft), format_size(needed), self.limits.metric, format_size(needed),
            )  # fmt: skip

    def stay(self, used: int, now: float) -> None:
        """This worker has settled above its soft limit, as others did before it: for a while its limit is above what it has."""
        before, self.limits = self.limits, settled_limits(self.limits, used)
        self._stays_until = now + SETTLED_FOR
        if self._neighbours.first_to_refuse(layout.STAYS_ABOVE):
            log.warning(
                "a worker has settled at %s (%s), above its soft limit of %s, as the %d before it did: each came there in one step and grew "
                "no further, so recycling it would not help; its limit is %s for %.0f min. If a worker needs that much, raise soft_limit",
                format_size(used), before.metric, format_size(before.soft), SETTLED_WORKERS, format_size(self.limits.soft),
                SETTLED_FOR / 60,
            )  # fmt: skip

    def follow_pool(self, now: float) -> None:
        """A share of the budget changes with the number of workers (SIGTTIN, SIGTTOU); a limit that was raised comes down again."""
        workers = self._neighbours.workers
        changed = workers is not None and workers != self._capacity.workers
        if workers is not None and changed:
            self._capacity = replace(self._capacity, workers=workers)
        if changed or now >= self._stays_until:
            self.set(None, now, say=False)
