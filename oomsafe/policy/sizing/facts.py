"""What is known of a pool and of the place that it runs in, measured or given. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from oomsafe.policy.limits import MACHINE, Source
from oomsafe.policy.reclaim import SHARED_MUCH


class Style(Enum):
    """How workers use processors, which decides how many of them keep those busy."""

    BLOCKING = "blocking"
    """A worker waits while its work waits: gunicorn's sync and gthread."""
    LOOP = "loop"
    """A worker does other work while its work waits: event loops, gevent. Or its work is computing, as Celery assumes."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Sizes in bytes, times in seconds; None is a figure that is not known."""

    limit: int
    """The limit that leaves the pool least."""
    source: Source | str = MACHINE
    others: int | None = None
    """What others use below that limit."""
    cpus: float | None = None
    """Processors that the pool may use."""
    style: Style = Style.BLOCKING
    fresh: int
    """What a worker holds right after boot: anonymous and shared memory, with what it shares with its supervisor."""
    shared: int | None = None
    """The part of that which it shares with its supervisor."""
    supervisor: int | None = None
    """What the supervisor holds, with what it shares with its workers. 0: there is none."""
    growth: float | None = None
    """Bytes that a worker keeps of each piece of work."""
    balloon: int | None = None
    """The most that a single piece of work makes its worker grow by."""
    rate: float | None = None
    """Pieces of work a second, of the whole pool."""
    boot: float | None = None
    """Seconds that a worker takes to boot."""
    workers: int | None = None
    """How many workers it has now; None: there is no pool yet."""
    unit: str = "requests"
    """What pieces of work are called, in the plural."""

    @property
    def preloads(self) -> bool:
        """Whether workers share so much with their supervisor that it must not be counted as each one's own."""
        return self.shared is not None and self.shared >= SHARED_MUCH

    @property
    def own(self) -> int:
        """What counts of a fresh worker against its soft limit: all, or without what it shares if that is much."""
        return max(1, self.fresh - (self.shared or 0)) if self.preloads else max(1, self.fresh)

    @property
    def common(self) -> int:
        """What is shared, and counted once, as the supervisor's; 0 if that is little."""
        return (self.shared or 0) if self.preloads else 0

    @property
    def parent(self) -> int:
        """What the supervisor counts for: 0 if that is not known, and never less than what its workers share with it."""
        return max(self.supervisor or 0, self.common)

    @property
    def pace(self) -> float | None:
        """Bytes a second that the whole pool grows by; None: not known."""
        return 0.0 if self.growth == 0 else None if self.growth is None or self.rate is None else self.growth * self.rate

    @property
    def room(self) -> int:
        """What others leave the pool of the limit; if their use is not known, all of it."""
        return max(0, self.limit - (self.others or 0))


def preloaded(facts: Facts, size: int) -> Facts:
    """The same pool if its supervisor loaded `size` bytes of what each worker loads now, before it forks them."""
    size = min(size, facts.fresh - 1)
    before = facts.shared or 0
    return replace(facts, shared=size, supervisor=max(0, (facts.supervisor or 0) - before) + size)
