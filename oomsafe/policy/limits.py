"""Limits in bytes, from a Policy and what the kernel allows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from oomsafe.policy.readers import Metric
from oomsafe.policy.settings import Policy
from oomsafe.policy.units import Percent, Size, format_size

#: A soft limit that is above the hard limit on this machine is lowered to this share of the hard limit.
BELOW_HARD = 0.9

#: For a metric that counts memory shared with a preloading supervisor, the one that does not.
OWN: dict[Metric, Metric] = {"anon": "private", "rss": "uss"}


#: Two levels whose headrooms differ by less than this share of their limit count as equally tight:
#: they are read at different moments.
AS_TIGHT = 1 / 64


class Kind(Enum):
    """The kind of limit on a pool's memory."""

    CGROUP = "cgroup"
    HIDDEN = "hidden"
    """A cgroup that can't be seen from here."""
    MACHINE = "machine"


class Source(NamedTuple):
    """Where a limit comes from; str() gives its name in logs and `oomsafe status`."""

    kind: Kind
    path: str = ""
    """The cgroup's folder; for a hidden cgroup, that of the highest visible one."""
    version: int = 0
    """The version of the cgroup hierarchy, 1 or 2."""
    file: str = ""
    """The file with the limit, if it is not the usual one."""

    def __str__(self) -> str:
        if self.kind is Kind.MACHINE:
            return "this machine's memory"
        if self.kind is Kind.HIDDEN:
            return f"a cgroup above {self.path} that can't be seen"
        return f"{self.file and f'{self.file} of '}cgroup v{self.version} {self.path}"


#: The source for a pool that nothing tighter limits.
MACHINE = Source(Kind.MACHINE)


class Level(NamedTuple):
    """One level that may limit a pool: its cgroup, an ancestor of it, or the machine. Sizes in bytes."""

    source: Source
    limit: int | None
    """Above it the kernel kills: memory.max, v1's memory.limit_in_bytes, MemTotal. None: there is no limit, or it is `unread`."""
    high: int | None = None
    """Above it the kernel throttles, though it does not kill yet: memory.high. None: there is none (v1 has no such file), or `unread`."""
    used: int | None = None
    """The working set of everything below this level, the pool and others; None if it can't be read, or was not read."""
    droppable: int = 0
    """The part of `used` that the kernel drops before it kills."""
    usage: int | None = None
    """Everything charged to this level, including page cache: what the kernel compares with `limit`. None as for `used`."""
    unread: tuple[str, ...] = ()
    """Names of limit files that exist and can't be read, or hold no number."""

    @property
    def effective(self) -> int | None:
        """The smaller of `limit` and `high`; None if neither is known."""
        if self.limit is None or self.high is None:
            return self.high if self.limit is None else self.limit
        return min(self.limit, self.high)

    @property
    def headroom(self) -> int | None:
        """What is left up to the effective limit, negative above it; None if the limit or the use is None."""
        return None if self.effective is None or self.used is None else self.effective - self.used

    @property
    def bound_by(self) -> Source:
        """`source`, naming memory.high if that is the smaller limit."""
        return self.source if self.effective == self.limit else self.source._replace(file="memory.high")


@dataclass(frozen=True)
class Capacity:
    """What the kernel allows a pool, at the level that leaves it least. Sizes in bytes; None is a figure that is not known."""

    limit: int | None
    """The limit of the level whose limit less its use is the smallest."""
    source: Source
    """That level."""
    working_set: int | None = None
    """What the pool and others use below that limit (usage - inactive_file)."""
    supervisor_rss: int | None = None
    """None also if there is no supervisor."""
    workers: int = 1
    beside: int = 0
    """Workers of another pool that shares the budget."""
    others: int | None = None
    """What processes outside the pool use below that limit."""
    smallest: int | None = None
    """The smallest limit of all levels, regardless of use; None: it is `limit`."""
    unseen: str = ""
    """What can't be known about these figures, for the log; empty if everything is known."""
    droppable: int = 0
    """The part of the working set that is page cache: in use, and yet the kernel drops it before it kills."""
    supervisor_held: int | None = None
    """The supervisor's rss without file pages; None: not known."""
    levels: tuple[Level, ...] = field(default=(), compare=False)
    """All levels as they were read, the nearest first and the machine last; empty in a worker.

    At ancestors without a limit the use was not read: see kernel.capacity.read_levels(). Comparing capacities ignores this field, as
    use changes all the time.
    """

    @property
    def supervisor(self) -> int | None:
        """What counts of the supervisor's memory: not file pages, if these are known, because the kernel drops clean ones."""
        return self.supervisor_rss if self.supervisor_held is None else self.supervisor_held

    @property
    def undroppable(self) -> int | None:
        """What is in use and can't be dropped: when this reaches the limit, the kernel kills."""
        return None if self.working_set is None else max(0, self.working_set - self.droppable)

    @property
    def room(self) -> int | None:
        """What the whole pool may hold before it hits the kernel's limit."""
        return None if self.limit is None else max(0, self.limit - (self.others or 0))

    @property
    def held(self) -> int | None:
        """What the pool holds, to be compared with `room`."""
        return None if self.working_set is None else max(0, self.working_set - (self.others or 0))

    @property
    def whence(self) -> str:
        """For the log: where the limit comes from, what others use of it, and what is not known."""
        used = ""
        if self.others and self.limit and self.others > self.limit * AS_TIGHT:
            used = f", others use {format_size(self.others)}"
        return f"{self.source}{used}{self.unseen and f'; {self.unseen}'}"

    @property
    def effective(self) -> int | None:
        """The effective limit: no process of the pool can ever hold more than this."""
        return self.limit if self.smallest is None else self.smallest


@dataclass(frozen=True)
class Limits:
    """The limits of one worker: in bytes, its lifetime in seconds; None means no such limit."""

    soft: int | None
    """The soft limit before jitter."""
    hard: int | None = None
    budget: int | None = None
    """What the whole pool may hold."""
    early: int | None = None
    """This worker's own soft limit, lowered by its share of jitter: above it the worker asks to be recycled."""
    metric: Metric = "anon"
    """What `soft` and `early` are compared with; `hard` is compared with rss if this counts clean file pages, else with anon."""
    max_lifetime: float | None = None
    """How long a worker may serve."""
    lifetime: float | None = None
    """The same for this worker: lowered by its share of jitter."""


def resolve_limits(policy: Policy, capacity: Capacity, jitter_share: float = 0.0) -> tuple[Limits, list[str]]:
    """The limits for one worker, and warnings to log: a problem that depends on the machine never stops a start.

    `jitter_share` is the worker's own random number, 0 <= jitter_share <= 1.
    A soft limit that the machine can't reach is replaced by auto. If no limit is known, auto and
    percentages can't be computed, and are None.
    """
    warnings: list[str] = []
    budget, effective = _budget(policy, capacity, warnings), capacity.effective
    wanted = None if policy.hard_limit == "auto" else policy.hard_limit
    hard = None if wanted is None else _bytes(wanted, effective)
    if hard is None and wanted is not None:
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
    if policy.hard_limit == "auto":
        hard = _auto_hard(capacity, soft, warnings)
    early = None if soft is None else soft - int(soft * policy.jitter * jitter_share)
    most = policy.max_lifetime
    lifetime = None if most is None else max(policy.min_lifetime, most * (1 - policy.jitter * jitter_share))
    return Limits(soft=soft, hard=hard, budget=budget, early=early, metric=metric, max_lifetime=most, lifetime=lifetime), warnings


def tightest(levels: Sequence[Level], own: int) -> Level | None:
    """The level with the smallest headroom; of several that are equally tight, the nearest to the pool. None if no limit applies.

    If the use of a level can't be read, the pool's `own` is used instead.
    """
    rooms = [
        (level, limit, limit - (own if level.used is None else level.used)) for level in levels if (limit := level.effective) is not None
    ]
    least = min((room for _, _, room in rooms), default=0)
    return next((level for level, limit, room in rooms if room <= least + limit * AS_TIGHT), None)


def in_bytes(size: Size | None, total: int | None) -> int | None:
    """`size` in bytes; a percentage is of `total`. None if `size` is None, or if it is a percentage and `total` is not known."""
    return None if size is None else _bytes(size, total)


def turns(policy: Policy, workers: int) -> int:
    """How many of `workers` may recycle at once: at least 1, or no worker ever could."""
    if isinstance(policy.max_unavailable, Percent):
        return max(1, policy.max_unavailable.of(workers))
    return policy.max_unavailable


def _budget(policy: Policy, capacity: Capacity, warnings: list[str]) -> int | None:
    """What the pool itself may hold: a share of what others leave it, or a number of bytes up to that."""
    budget, room = _bytes(policy.budget, capacity.room), capacity.room
    if budget is None or room is None or budget <= room:
        return budget
    if capacity.effective is not None and budget > capacity.effective:
        warnings.append(_too_big("budget", policy.budget, budget, capacity, "90% is used in its place"))
    return int(room * 0.9)


def _soft_limit(policy: Policy, capacity: Capacity, budget: int | None, warnings: list[str]) -> tuple[int | None, Metric]:
    # an equal share applies to a worker's own memory: what it shares with a preloading supervisor counts as the supervisor's
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


def _auto_hard(capacity: Capacity, soft: int | None, warnings: list[str]) -> int | None:
    """What the kernel's limit leaves one worker while every other one is at its soft limit: then the pool still is within it."""
    if soft is None or capacity.room is None:
        missing = "memory limit could be read" if capacity.room is None else "soft limit is in force"
        warnings.append(f"no {missing}, so hard_limit auto can't be worked out: set hard_limit to a size")
        return None
    others = max(0, capacity.workers + capacity.beside - 1)
    left = capacity.room - (capacity.supervisor or 0) - others * soft
    if left > soft:
        return left
    warnings.append(
        f"hard_limit auto can't be worked out: while {others} other workers are at their soft limit of {format_size(soft)}, the limit of "
        f"{format_size(capacity.limit)} leaves one worker {format_size(max(0, left))}: no hard limit is used; lower soft_limit, or have "
        "fewer workers or more memory"
    )
    return None


def _bytes(size: Size | str, total: int | None) -> int | None:
    if isinstance(size, Percent):
        return None if total is None else size.of(total)
    assert isinstance(size, int)
    return size


def _too_big(field: str, given: object, size: int, capacity: Capacity, instead: str) -> str:
    shown = f"{given} ({format_size(size)})" if isinstance(given, Percent) else format_size(size)
    where = f" ({capacity.source})" if capacity.effective == capacity.limit else ""
    return f"{field} {shown} is above the effective limit {format_size(capacity.effective)}{where}: {instead}"
