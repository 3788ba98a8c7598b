"""One worker's limits: computed from its policy, and checked against what it needed right after boot."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from oomsafe.log import log
from oomsafe.policy.limits import Capacity, Limits, resolve_limits
from oomsafe.policy.recycle import SETTLED_FOR, SETTLED_WORKERS, above_baseline, settled_limits, within_reach
from oomsafe.policy.settings import Policy
from oomsafe.policy.standing import Standing, follow, in_force, is_another_limit
from oomsafe.policy.units import format_duration, format_size
from oomsafe.scoreboard import layout
from oomsafe.worker.gauge import Gauge
from oomsafe.worker.neighbours import Neighbours

if TYPE_CHECKING:
    from oomsafe.policy.grant import Grant

#: Seconds between two measurements of what the kernel allows, in a worker without a supervisor that publishes it.
MEASURE_EVERY = 1.0


class Thresholds:
    """One worker's limits in force. `measure` returns what the kernel allows, and is used if no supervisor publishes that."""

    def __init__(
        self, policy: Policy, capacity: Capacity, gauge: Gauge, neighbours: Neighbours, measure: Callable[[], Capacity] | None = None
    ) -> None:
        self.limits = Limits(soft=None)
        self.refused = False
        """The soft limit is below what a worker needs: recycling would never end."""
        self.baseline: int | None = None
        """What it held right after boot, in the limits' metric; bytes, None if it can't be read."""
        self._policy = policy
        self.capacity = capacity
        """What the limits are computed from."""
        self._measure = measure
        self._standing = Standing(capacity)
        self._measure_at = 0.0
        self._gauge = gauge
        self._neighbours = neighbours
        self._boot_held: int | None = None
        self._stays_until = math.inf
        self._granted = (0, False)
        """Of a worker that stays: its limit before, in bytes, and whether it is granted more for as long as it holds more than that."""
        self._outlived = False
        self._jitter_share = random.random()  # noqa: S311  it spreads load, it guards nothing

    @property
    def soft(self) -> int | None:
        """This worker's own soft limit in bytes; None: there is none."""
        return None if self.refused else self.limits.early

    @property
    def stays(self) -> bool:
        """Whether the soft limit is temporarily raised, because this worker settled above it."""
        return self._stays_until < math.inf

    @property
    def alert(self) -> float:
        """When the worker holds this many bytes, there is something to decide."""
        return min((limit for limit in (self.soft, self.limits.hard) if limit is not None), default=sys.maxsize)

    @property
    def budget(self) -> int | None:
        """The pool's budget in bytes; None: not known."""
        return self.limits.budget

    def set(self, held: int | None, now: float, say: bool) -> None:
        """Compute the limits. `held` is what a worker that has just booted holds, in bytes; None keeps the known baseline."""
        limits, warnings = resolve_limits(self._policy, self.capacity, self._jitter_share)
        for warning in warnings if say else ():
            log.warning("%s", warning)
        if held is not None:
            self._boot_held, self.baseline = held, self._gauge.read(limits.metric, held, 0, now)
        self.limits = above_baseline(within_reach(limits, self.baseline, self._boot_held), self.baseline)
        self.refused, self._stays_until = False, math.inf
        if self.limits.soft != limits.soft:
            self.limits = replace(self.limits, soft=limits.soft, early=limits.soft)
            self._refuse(self.baseline)
        if self._outlived or self._boots_too_long():
            self.limits = replace(self.limits, lifetime=None)
        if limits.hard is not None and self.limits.hard is None and self._neighbours.first_to_refuse(layout.REFUSES_HARD):
            log.error("hard limit %s is not used: a worker has %s right after boot", *map(format_size, (limits.hard, self._boot_held)))

    def _refuse(self, needed: int | None) -> None:
        """Do without the soft limit; the first worker of the pool that must do so logs it."""
        self.refused = True
        if self._neighbours.first_to_refuse(layout.REFUSES_SOFT):
            log.error(
                "soft limit %s is not used: a worker needs %s (%s) right after boot, so it would be recycled forever; "
                "set soft_limit well above %s, or have fewer workers or more memory",
                format_size(self.limits.soft), format_size(needed), self.limits.metric, format_size(needed),
            )  # fmt: skip

    def outlive(self) -> None:
        """Do without a lifetime from now on: it is over, and nothing here can recycle this worker."""
        self._outlived = True
        self.limits = replace(self.limits, lifetime=None)

    def _boots_too_long(self) -> bool:
        """Whether a boot takes longer than a lifetime, so that workers would boot all the time; the first worker to find out logs it."""
        most, boot = self._policy.max_lifetime, self._neighbours.boot
        if most is None or self._neighbours.measures_itself or most > boot:
            return False
        if self._neighbours.first_to_refuse(layout.REFUSES_LIFETIME):
            log.error(
                "max_lifetime %s is not used: a worker takes %s to boot, so workers would be replaced all the time; "
                "set max_lifetime well above %s", format_duration(most), format_duration(boot), format_duration(boot),
            )  # fmt: skip
        return True

    def stay(self, used: int, now: float, granted: Grant | None) -> None:
        """Raise the limit temporarily above `used`: this worker has settled above its soft limit, as others did before it.

        What it needs, it is granted again whenever the time is over, as long as it still holds as much. `granted` None: nothing is known.
        """
        before, self.limits = self.limits, settled_limits(self.limits, used)
        self._stays_until = now + SETTLED_FOR
        needed, figures = (granted.needed, granted.why) if granted is not None else (False, "")
        self._granted = (before.early or 0, needed)
        if self._neighbours.first_to_refuse(layout.STAYS_ABOVE):
            log.warning(
                "a worker has settled at %s (%s), above its soft limit of %s, as the %d before it did: each got there in one jump and "
                "grew no further, so recycling it would not help%s; its limit is %s for %s. If a worker needs that much, "
                "raise soft_limit",
                format_size(used), before.metric, format_size(before.soft), SETTLED_WORKERS, figures, format_size(self.limits.soft),
                "as long as it holds that much" if needed else f"{SETTLED_FOR / 60:.0f} min",
            )  # fmt: skip

    def follow(self, now: float, held: int) -> None:
        """Compute the limits again if the number of workers (SIGTTIN, SIGTTOU) or what the kernel allows has changed.

        Also lower a temporarily raised limit again when its time is over. `held`: what the worker holds, in bytes.
        """
        before, self.capacity = self.capacity, self._present(now)
        anew = is_another_limit(before, self.capacity)
        moved = self.capacity != before and not self.stays
        if now >= self._stays_until and self._needs_it_still(held, now):
            self._stays_until = now + SETTLED_FOR
        if anew or moved or self.capacity.workers != before.workers or now >= self._stays_until:
            self.set(None, now, say=False)
        if anew and self._neighbours.measures_itself:
            soft, budget = format_size(self.soft), format_size(self.budget)
            log.info(
                "the memory limit has changed: soft limit %s, budget %s of %s (%s)",
                soft, budget, format_size(self.capacity.limit), self.capacity.source,
            )  # fmt: skip

    def _needs_it_still(self, held: int, now: float) -> bool:
        """Whether a worker that stays, because it needs more than its limit, would be above that limit again."""
        limit, needed = self._granted
        used = self._gauge.read(self.limits.metric, held, 0, now) if needed else None
        return used is not None and used > limit

    def _present(self, now: float) -> Capacity:
        """The present capacity, as published by the supervisor or, without one, measured by this worker itself."""
        workers, allowed = self._neighbours.workers, self._neighbours.allowed
        capacity = self.capacity if workers is None else replace(self.capacity, workers=workers)
        if allowed is not None:
            _, limit, smallest, others, supervisor = allowed
            return replace(capacity, limit=limit, smallest=smallest, others=others, supervisor_held=supervisor, levels=())
        if self._measure is None or not self._neighbours.measures_itself or now < self._measure_at:
            return capacity
        self._measure_at = now + MEASURE_EVERY
        measured = self._measure()
        self._standing = follow(self._standing, measured, now)
        force = in_force(self._standing, measured)
        # the pool's use is measured where it is needed for a decision
        return replace(
            force,
            working_set=None,
            droppable=0,
            levels=(),
            supervisor_rss=capacity.supervisor_rss,
            supervisor_held=capacity.supervisor_held,
            workers=capacity.workers,
            beside=capacity.beside,
        )
