"""A Policy and what the kernel allows, made into limits in bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from oomsafe.policy.readers import Metric
from oomsafe.policy.settings import Policy
from oomsafe.policy.units import Percent, Size, format_size

#: Where a soft limit is put below a hard one when the machine's size has turned their order round.
BELOW_HARD = 0.9

#: What each metric is without what a worker shares with a preloading supervisor.
OWN: dict[Metric, Metric] = {"anon": "private", "rss": "uss"}


#: Two levels whose headrooms differ by less than this share of their limit are as tight as each other: they are read one after the other.
AS_TIGHT = 1 / 64


class Kind(Enum):
    """Of what limits a pool's memory."""

    CGROUP = "cgroup"
    HIDDEN = "hidden"
    """A cgroup that can't be seen from here."""
    MACHINE = "machine"


class Source(NamedTuple):
    """Where a limit stands; as text, what logs and `oomsafe status` call it."""

    kind: Kind
    path: str = ""
    """The cgroup's folder; of a hidden one, that of the highest which can be seen."""
    version: int = 0
    """Of the cgroup's hierarchy."""
    file: str = ""
    """The file that has the limit, where it is not the one that everybody expects."""

    def __str__(self) -> str:
        if self.kind is Kind.MACHINE:
            return "this machine's memory"
        if self.kind is Kind.HIDDEN:
            return f"a cgroup above {self.path} that can't be seen"
        return f"{self.file and f'{self.file} of '}cgroup v{self.version} {self.path}"


#: Of a pool that nothing tighter limits.
MACHINE = Source(Kind.MACHINE)


class Level(NamedTuple):
    """A limit that holds for a pool: its cgroup's, an ancestor's, or the machine's memory. In bytes."""

    limit: int
    source: Source
    used: int | None
    """The working set of all that lives below it, the pool and others; None where it can't be read."""
    droppable: int = 0
    """Of that, what the kernel drops before it kills."""


@dataclass(frozen=True)
class Capacity:
    """What the kernel allows a pool, at the level that leaves it least. Sizes in bytes; None is a figure that could not be had."""

    limit: int | None
    """That of the level whose limit less its use is the smallest."""
    source: Source
    """Which level that is."""
    working_set: int | None = None
    """What is in use below that limit and can't be dropped (usage - inactive_file), by the pool and by others."""
    supervisor_rss: int | None = None
    """None also where there is no supervisor."""
    workers: int = 1
    beside: int = 0
    """Workers of another pool that lives on the same budget."""
    others: int | None = None
    """What is in use below that limit by others than the pool."""
    smallest: int | None = None
    """The smallest limit of all levels, whoever uses what; None: `limit` is."""
    unseen: str = ""
    """What can't be known of all this, for the log; empty for nothing."""
    droppable: int = 0
    """Of the working set, page cache: it is in use, and yet the kernel drops it before it kills."""
    supervisor_held: int | None = None
    """Its rss without file pages; None: not known."""

    @property
    def supervisor(self) -> int | None:
        """What the supervisor has that counts: clean file pages the kernel drops."""
        return self.supervisor_rss if self.supervisor_held is None else self.supervisor_held

    @property
    def undroppable(self) -> int | None:
        """What is in use that the kernel can't drop: when this meets the limit, it kills."""
        return None if self.working_set is None else max(0, self.working_set - self.droppable)

    @property
    def room(self) -> int | None:
        """What the pool may hold in all until the kernel's limit is met."""
        return None if self.limit is None else max(0, self.limit - (self.others or 0))

    @property
    def held(self) -> int | None:
        """What the pool holds of it, in the measure of `room`."""
        return None if self.working_set is None else max(0, self.working_set - (self.others or 0))

    @property
    def whence(self) -> str:
        """Where the limit comes from, what others use of it, and what of that is not known: for the log."""
        used = ""
        if self.others and self.limit and self.others > self.limit * AS_TIGHT:
            used = f", others use {format_size(self.others)}"
        return f"{self.source}{used}{self.unseen and f'; {self.unseen}'}"

    @property
    def effective(self) -> int | None:
        """The effective limit: what no process of the pool could ever have more than."""
        return self.limit if self.smallest is None else self.smallest


@dataclass(frozen=True)
class Limits:
    """The limits of one worker in bytes; None means that this one does not apply."""

    soft: int | None
    """Above it the worker is recycled."""
    hard: int | None = None
    budget: int | None = None
    """The pool's: what itself may hold."""
    early: int | None = None
    """This worker's own soft limit, lowered by its share of jitter: from here it asks for its turn."""
    metric: Metric = "anon"
    """What `soft` and `early` are compared with; `hard` is compared with rss where that counts clean file pages, else with anon."""


def resolve_limits(policy: Policy, capacity: Capacity, jitter_share: float = 0.0) -> tuple[Limits, list[str]]:
    """Limits for one worker, and warnings to log: what depends on the machine never stops a start.

    `jitter_share` is the worker's own random number, 0 <= jitter_share <= 1.
    A limit that the machine can't reach is replaced by auto; without any capacity, auto and
    percentages have nothing to be a share of, and are None.
    """
    warnings: list[str] = []
    budget, effective = _budget(policy, capacity, warnings), capacity.effective
    hard = None if policy.hard_limit is None else _bytes(policy.hard_limit, effective)
    if hard is None and policy.hard_limit is not None:
        warnings.append(f"hard_limit {policy.hard_limit} is a share of a limit that could not be read: it is not used")
    if hard is not None and effective is not None and hard > effective:
        warnings.append(_too_big("hard_limit", policy.hard_limit, hard, capacity, "no hard limit is used"))
        hard = None
    soft, metric = _soft_limit(policy, capacity, budget, warnings)
    if soft is not None and hard is not None and soft >= hard:
        lowered = int(hard * BELOW_HARD)
        if policy.soft_limit != "auto":
            warnings.append(
                f"soft_limit {format_size(soft)} is not below hard_limit {format_size(hard)} on this machine: "
                f"{format_size(lowered)} is used in its place"
            )
        soft = lowered
    early = None if soft is None else soft - int(soft * policy.jitter * jitter_share)
    return Limits(soft=soft, hard=hard, budget=budget, early=early, metric=metric), warnings


def tightest(levels: Sequence[Level], own: int) -> Level | None:
    """The level with the smallest headroom, the nearest of those that are as tight; None of none.

    Where the use of one can't be read, it is taken to be the pool's `own`.
    """

    def headroom(level: Level) -> int:
        return level.limit - (own if level.used is None else level.used)

    least = min(map(headroom, levels), default=0)
    return next((level for level in levels if headroom(level) <= least + level.limit * AS_TIGHT), None)


def in_bytes(size: Size | None, total: int | None) -> int | None:
    """A size that may be a share of `total`, in bytes; None for none, and for a share of what is not known."""
    return None if size is None else _bytes(size, total)


def turns(policy: Policy, workers: int) -> int:
    """How many of `workers` may be recycling at once: at least 1, else none ever could."""
    if isinstance(policy.max_unavailable, Percent):
        return max(1, policy.max_unavailable.of(workers))
    return policy.max_unavailable


def _budget(policy: Policy, capacity: Capacity, warnings: list[str]) -> int | None:
    """What the pool itself may hold: a share of what others leave it, or bytes that are not above that."""
    budget, room = _bytes(policy.budget, capacity.room), capacity.room
    if budget is None or room is None or budget <= room:
        return budget
    if capacity.effective is not None and budget > capacity.effective:
        warnings.append(_too_big("budget", policy.budget, budget, capacity, "90% is used in its place"))
    return int(room * 0.9)


def _soft_limit(policy: Policy, capacity: Capacity, budget: int | None, warnings: list[str]) -> tuple[int | None, Metric]:
    # an equal share is one of a worker's own memory: what it shares with a preloading supervisor is the supervisor's
    own: Metric = OWN.get(policy.metric, policy.metric)
    if policy.soft_limit == "auto":
        return _auto(capacity, budget, warnings), own
    soft = _bytes(policy.soft_limit, capacity.effective)
    if soft is None:
        warnings.append(f"soft_limit {policy.soft_limit} is a share of a limit that could not be read: it is not used")
    elif capacity.effective is not None and soft > capacity.effective:
        auto = _auto(capacity, budget, warnings)
        warnings.append(_too_big("soft_limit", policy.soft_limit, soft, capacity, f"auto ({format_size(auto)}) is used in its place"))
        return auto, own
    return soft, policy.metric


def _auto(capacity: Capacity, budget: int | None, warnings: list[str]) -> int | None:
    """An equal share for each worker of what the supervisor leaves of the budget."""
    if budget is None:
        warnings.append("no memory limit could be read, so soft_limit auto can't be worked out: set soft_limit to recycle workers")
        return None
    left = budget - (capacity.supervisor or 0)
    if left <= 0:
        others = f" (others use {format_size(capacity.others)} of {format_size(capacity.limit)})" if capacity.others else ""
        warnings.append(
            f"soft_limit auto can't be worked out: the supervisor alone has {format_size(capacity.supervisor)}, "
            f"the budget is {format_size(budget)}{others}; raise the memory limit, or set soft_limit"
        )
        return None
    return left // max(1, capacity.workers + capacity.beside)


def _bytes(size: Size | str, total: int | None) -> int | None:
    if isinstance(size, Percent):
        return None if total is None else size.of(total)
    assert isinstance(size, int)
    return size


def _too_big(field: str, given: object, size: int, capacity: Capacity, instead: str) -> str:
    shown = f"{given} ({format_size(size)})" if isinstance(given, Percent) else format_size(size)
    where = f" ({capacity.source})" if capacity.effective == capacity.limit else ""
    return f"{field} {shown} is above the effective limit {format_size(capacity.effective)}{where}: {instead}"
