"""What an operator is alerted to: the conditions, how long each must last, and when it is over. Pure.

`oomsafe watch` follows them here; deploy/prometheus/oomsafe.rules.yml has the same ones for Prometheus, with the same figures.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType
from typing import Any, NamedTuple

from oomsafe.policy.units import counted, format_duration, format_size

#: Seconds without it, after which an alert is over: what comes and goes is one alert.
CALM = 60.0

#: A rise within a time is remembered in so many parts of it.
PARTS = 60

#: How many pools that are gone are remembered, and for how many seconds: another one that begins in that time ends the alert.
LOST_MOST, LOST_FOR = 256, 3600.0

#: The ends of workers that count as the OOM killer's.
KILLS = ("oom_confirmed", "oom_likely")

#: The recycles that don't count towards a storm: those are asked for.
ASKED_FOR = ("max_lifetime", "operator", "probed")


class Alert(str, Enum):
    """A condition. To add one: its terms below, its case in breaches(), its rule, the rule's two tests, its row in docs/alerts.md."""

    WORKER_NEAR_HARD_LIMIT = "worker_near_hard_limit"
    POOL_NEAR_LIMIT = "pool_near_limit"
    RECYCLE_STORM = "recycle_storm"
    KERNEL_KILL = "kernel_kill"
    SUPERVISOR_NOT_SAFE = "supervisor_not_safe"
    NO_WORKER_SERVES = "no_worker_serves"
    BUDGET_EXCEEDED = "budget_exceeded"
    LIMIT_REFUSED = "limit_refused"
    SHEDDING = "shedding"
    CULPRIT_FOUND = "culprit_found"
    LEAK_FOUND = "leak_found"
    POOL_GONE = "pool_gone"

    def __str__(self) -> str:
        return self.value

    @property
    def rule(self) -> str:
        """Its name in Prometheus: ``OomsafeKernelKill``."""
        return "Oomsafe" + "".join(word.capitalize() for word in self.value.split("_"))


class Terms(NamedTuple):
    """When an alert fires."""

    severity: str
    lasts: float = 0.0
    """Seconds for which the condition must hold."""
    threshold: float = 0.0
    """What the condition's figure is compared with; its unit stands beside each."""
    within: float = 0.0
    """Seconds within which a count must rise by more than the threshold; 0: it is not about a count."""


TERMS = {
    # the share of the hard limit
    Alert.WORKER_NEAR_HARD_LIMIT: Terms("warning", lasts=60, threshold=0.9),
    # the share of the effective limit that is left
    Alert.POOL_NEAR_LIMIT: Terms("critical", lasts=60, threshold=0.05),
    # recycles for each worker
    Alert.RECYCLE_STORM: Terms("warning", threshold=3, within=600),
    # kills
    Alert.KERNEL_KILL: Terms("critical", within=600),
    # bytes
    Alert.SUPERVISOR_NOT_SAFE: Terms("critical", lasts=60),
    # workers
    Alert.NO_WORKER_SERVES: Terms("critical", lasts=60),
    # bytes above the budget
    Alert.BUDGET_EXCEEDED: Terms("warning", lasts=300),
    # limits
    Alert.LIMIT_REFUSED: Terms("warning", lasts=60),
    # requests
    Alert.SHEDDING: Terms("warning", lasts=120, within=60),
    # workers
    Alert.CULPRIT_FOUND: Terms("info", within=21600),
    # bytes for each piece of work
    Alert.LEAK_FOUND: Terms("info", lasts=60),
    Alert.POOL_GONE: Terms("critical"),
}


class PoolKey(NamedTuple):
    """One pool. Printable."""

    name: str
    server: str
    supervisor: int
    started: int
    """The supervisor's start time in clock ticks since boot."""
    board: str = ""
    """The path of its scoreboard."""

    def __str__(self) -> str:
        return f"{self.name or self.server} (supervisor {self.supervisor})"


@dataclass(frozen=True, kw_only=True)
class Worker:
    """One worker of a reading. Sizes in bytes; None: not known, or no such limit."""

    name: str
    used: int | None = None
    soft: int | None = None
    """What `used` is compared with."""
    held: int | None = None
    hard: int | None = None
    """What `held` is compared with."""

    @property
    def share(self) -> float | None:
        """What it holds as a share of its hard limit; None: not known."""
        return self.held / self.hard if self.held is not None and self.hard else None

    @property
    def is_near(self) -> bool:
        """Whether it is near its hard limit. One that is not above its soft limit has its usual size: the two limits are close."""
        if self.used is not None and self.soft is not None and self.used <= self.soft:
            return False
        return self.share is not None and self.share > TERMS[Alert.WORKER_NEAR_HARD_LIMIT].threshold


Key = tuple[Alert, str]
"""A count: the alert that it is for, and which of that alert's counts it is."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A pool at one moment. Sizes in bytes; None: not known. Text is printable."""

    limit: int | None = None
    others: int | None = None
    held: int | None = None
    """Without page cache that the kernel drops before it kills."""
    budget: int | None = None
    margin: float | None = None
    """By how many of the kernel's points the lowest-ranked worker is above the supervisor."""
    wanted: int = 0
    serving: int = 0
    workers: Sequence[Worker] = ()
    refused: Sequence[str] = ()
    counts: Mapping[Key, int] = field(default_factory=dict)
    """Counts that only rise."""
    leak: int | None = None
    """What each piece of work leaks; None: the last recycled workers don't show a leak."""
    last_death: str = ""
    """The line about the last death; empty: none."""
    last_recycle: str = ""


class Breach(NamedTuple):
    """A condition that holds now."""

    text: str
    figures: dict[str, Any]
    """JSON data."""
    subjects: frozenset[str] = frozenset({""})
    """Each of them must be so for as long as the terms say; one that takes another's place begins anew."""


class Event(NamedTuple):
    """An alert begins to fire, or is over."""

    alert: Alert
    firing: bool
    pool: PoolKey
    since: float
    """When the condition began, on the clock of `now`."""
    figures: dict[str, Any]
    text: str


class Rise:
    """By how much a count has risen within the last seconds, in bounded memory."""

    def __init__(self, within: float, at: float, count: int) -> None:
        """It was `count` at `at`."""
        self._within, self._last, self._risen = within, count, 0
        self._parts = [(at, 0)]
        """When the rise began to be the second figure."""

    def add(self, at: float, count: int) -> int:
        """The count is `count` at `at`. Returns its rise within the last `within` seconds, or since it was known."""
        # a count that falls was begun anew
        self._risen += count - self._last if count >= self._last else count
        self._last = count
        before, risen = self._parts[-1]
        if self._risen != risen:
            if len(self._parts) > 1 and at - before < self._within / PARTS:
                self._parts[-1] = before, self._risen
            else:
                self._parts.append((at, self._risen))
        while len(self._parts) > 1 and self._parts[1][0] <= at - self._within:
            del self._parts[0]
        return self._risen - self._parts[0][1]


class Track(NamedTuple):
    """How one alert of one pool stands. Seconds on the clock of `now`."""

    since: Mapping[str, float] = MappingProxyType({})
    """Since when each subject has been so."""
    fires_since: float | None = None
    """When what it fires for began; None: it does not fire."""
    last: float = 0.0
    """When it was last so."""

    def follow(self, subjects: Set[str], now: float, lasts: float, calm: float) -> Track:
        """How it stands now that it is so for these subjects."""
        since = {subject: self.since.get(subject, now) for subject in subjects}
        last = now if subjects else self.last
        if self.fires_since is not None:
            return Track(since, None if now - last >= calm else self.fires_since, last)
        began = min(since.values(), default=now)
        return Track(since, began if subjects and now - began >= lasts else None, last)


class _Followed:
    """One pool."""

    def __init__(self, now: float) -> None:
        self.began = now
        self.tracks: dict[Alert, Track] = {}
        self.rises: dict[Key, Rise] = {}
        self.reading = Reading()

    def rise(self, reading: Reading, now: float, new: bool) -> dict[Key, int]:
        """By how much each count has risen within its alert's time. `new`: the pool has begun since the last readings, so all counts."""
        first = not self.rises
        for key, count in reading.counts.items():
            if key not in self.rises:
                # a count that joins the others, such as a route that is called for the first time, begins at 0
                self.rises[key] = Rise(TERMS[key[0]].within, now, count if first and not new else 0)
        return {key: self.rises[key].add(now, count) for key, count in reading.counts.items()}


class Watch:
    """Several pools over time. Each alert of a pool alternates: it fires, it is over."""

    def __init__(self, calm: float = CALM) -> None:
        """`calm`: seconds without it, after which an alert is over."""
        self._calm = calm
        self._pools: dict[PoolKey, _Followed] = {}
        self._lost: dict[PoolKey, float] = {}
        """When each pool was gone."""

    def read(self, pool: PoolKey, reading: Reading, now: float, *, new: bool = False) -> list[Event]:
        """A pool was read. `new`: it has begun while others were watched, so what it has counted by now happened since."""
        followed = self._pools.setdefault(pool, _Followed(now))
        rises = followed.rise(reading, now, new)
        followed.reading = reading
        found = breaches(reading, rises)
        events = self._returned(pool, followed, now)
        for alert, terms in TERMS.items():
            breach, before = found.get(alert), followed.tracks.get(alert, Track())
            after = before.follow(breach.subjects if breach else frozenset(), now, terms.lasts, self._calm)
            followed.tracks[alert] = after
            if breach is not None and before.fires_since is None and after.fires_since is not None:
                events.append(Event(alert, True, pool, after.fires_since, breach.figures, breach.text))
            elif before.fires_since is not None and after.fires_since is None:
                events.append(_over(alert, pool, before.fires_since, now, "it is over"))
        return events

    def ended(self, pool: PoolKey, now: float, *, in_order: bool, orphans: int = 0) -> list[Event]:
        """A pool's supervisor has ended. `orphans`: how many workers live on without it."""
        followed = self._pools.pop(pool, None)
        tracks = followed.tracks if followed is not None else {}
        events = [
            _over(alert, pool, track.fires_since, now, "the pool has ended")
            for alert, track in tracks.items()
            if track.fires_since is not None
        ]
        self._lost = {gone: since for gone, since in self._lost.items() if now - since < LOST_FOR}
        # one that took the place of a pool that is gone, and is gone before it was back: that pool is still gone
        again = followed is not None and any(since <= followed.began for since in self._namesakes(pool).values())
        if not in_order and not again and len(self._lost) < LOST_MOST:
            self._lost[pool] = now
            breach = _gone(followed.reading if followed is not None else Reading(), orphans)
            events.append(Event(Alert.POOL_GONE, True, pool, now, breach.figures, breach.text))
        return events

    def _namesakes(self, pool: PoolKey) -> dict[PoolKey, float]:
        """The pools of this name that are gone."""
        return {gone: since for gone, since in self._lost.items() if (gone.name, gone.server) == (pool.name, pool.server)}

    def _returned(self, pool: PoolKey, followed: _Followed, now: float) -> list[Event]:
        """A pool that is gone is back once another of its name has lasted."""
        if not self._lost or now - followed.began < self._calm:
            return []
        back = {gone: since for gone, since in self._namesakes(pool).items() if since <= followed.began}
        for gone in back:
            del self._lost[gone]
        return [_over(Alert.POOL_GONE, gone, since, now, f"supervisor {pool.supervisor} is in its place") for gone, since in back.items()]


def breaches(reading: Reading, rises: Mapping[Key, int]) -> dict[Alert, Breach]:
    """The conditions that hold now. `rises`: by how much each count has risen within its alert's time."""
    found = {
        Alert.WORKER_NEAR_HARD_LIMIT: _near_hard(reading),
        Alert.POOL_NEAR_LIMIT: _near_limit(reading),
        Alert.RECYCLE_STORM: _storm(reading, rises),
        Alert.KERNEL_KILL: _kills(reading, rises),
        Alert.SUPERVISOR_NOT_SAFE: _not_safe(reading),
        Alert.NO_WORKER_SERVES: _none_serves(reading),
        Alert.BUDGET_EXCEEDED: _above_budget(reading),
        Alert.LIMIT_REFUSED: _refused(reading),
        Alert.SHEDDING: _sheds(rises),
        Alert.CULPRIT_FOUND: _culprit(reading, rises),
        Alert.LEAK_FOUND: _leak(reading),
    }
    return {alert: breach for alert, breach in found.items() if breach is not None}


def _over(alert: Alert, pool: PoolKey, since: float, now: float, why: str) -> Event:
    seconds = max(0.0, now - since)
    return Event(alert, False, pool, since, {"seconds": round(seconds, 1)}, f"{why}; it began {format_duration(seconds)} ago")


def _near_hard(reading: Reading) -> Breach | None:
    near = sorted((worker for worker in reading.workers if worker.is_near), key=lambda worker: -(worker.share or 0))
    if not near:
        return None
    first, others = near[0], len(near) - 1
    more = f", and {counted(others, 'others')} are near theirs" if others else ""
    text = f"{first.name} holds {format_size(first.held)}, {first.share or 0:.0%} of its hard limit {format_size(first.hard)}{more}"
    figures = {"worker": first.name, "held": first.held, "hard_limit": first.hard, "workers": len(near)}
    return Breach(text, figures, frozenset(worker.name for worker in near))


def _near_limit(reading: Reading) -> Breach | None:
    if reading.limit is None or reading.held is None:
        return None
    left = reading.limit - (reading.others or 0) - reading.held
    if left >= TERMS[Alert.POOL_NEAR_LIMIT].threshold * reading.limit:
        return None
    others = f", others {format_size(reading.others)}" if reading.others else ""
    room = f"{format_size(max(0, left))} left up to the limit of {format_size(reading.limit)}"
    text = f"{room}: the pool holds {format_size(reading.held)}{others}"
    return Breach(text, {"left": left, "limit": reading.limit, "held": reading.held, "others": reading.others})


def _storm(reading: Reading, rises: Mapping[Key, int]) -> Breach | None:
    terms, recycles = TERMS[Alert.RECYCLE_STORM], _sum(rises, Alert.RECYCLE_STORM)
    workers = max(1, len(reading.workers))
    if recycles <= terms.threshold * workers:
        return None
    text = f"{counted(recycles, 'recycles')} within {format_duration(terms.within)}, with {counted(workers, 'workers')}"
    last = f". The last: {reading.last_recycle}" if reading.last_recycle else ""
    return Breach(text + last, {"recycles": recycles, "workers": workers, "last": reading.last_recycle or None})


def _kills(reading: Reading, rises: Mapping[Key, int]) -> Breach | None:
    kills = {name: count for (alert, name), count in rises.items() if alert is Alert.KERNEL_KILL and count > 0}
    if not kills:
        return None
    shown = ", ".join(f"{count} {name}" for name, count in kills.items())
    text = f"the kernel's OOM killer took {counted(sum(kills.values()), 'workers')} ({shown})"
    last = f". The last death: {reading.last_death}" if reading.last_death else ""
    return Breach(text + last, {**{name: kills.get(name, 0) for name in KILLS}, "last": reading.last_death or None})


def _not_safe(reading: Reading) -> Breach | None:
    if reading.margin is None or reading.margin >= TERMS[Alert.SUPERVISOR_NOT_SAFE].threshold:
        return None
    below = round(-reading.margin)
    text = f"the kernel may kill the supervisor first: a worker is {format_size(below)} of the kernel's OOM points below it"
    return Breach(text, {"margin": -below})


def _none_serves(reading: Reading) -> Breach | None:
    if reading.serving or not reading.wanted:
        return None
    text = f"no worker serves: {counted(len(reading.workers), 'workers')} of {reading.wanted} live, and start or leave"
    return Breach(text, {"workers": len(reading.workers), "wanted": reading.wanted})


def _above_budget(reading: Reading) -> Breach | None:
    if reading.held is None or reading.budget is None or reading.held <= reading.budget:
        return None
    return Breach(
        f"the pool holds {format_size(reading.held)} > budget {format_size(reading.budget)}",
        {"held": reading.held, "budget": reading.budget},
    )


def _refused(reading: Reading) -> Breach | None:
    if not reading.refused:
        return None
    text = f"{' and '.join(reading.refused)} {'is' if len(reading.refused) == 1 else 'are'} not used: below what a worker needs"
    return Breach(text, {"limits": list(reading.refused)}, frozenset(reading.refused))


def _sheds(rises: Mapping[Key, int]) -> Breach | None:
    terms, shed = TERMS[Alert.SHEDDING], _sum(rises, Alert.SHEDDING)
    if shed <= terms.threshold:
        return None
    return Breach(f"{counted(shed, 'new requests')} got 503 within {format_duration(terms.within)}", {"requests": shed})


def _culprit(reading: Reading, rises: Mapping[Key, int]) -> Breach | None:
    routes = {name: count for (alert, name), count in rises.items() if alert is Alert.CULPRIT_FOUND and count > 0}
    if not routes:
        return None
    shown = ", ".join(f"{name} ({counted(count, 'workers')})" for name, count in sorted(routes.items(), key=lambda pair: -pair[1])[:3])
    last = f". The last recycle: {reading.last_recycle}" if reading.last_recycle else ""
    return Breach(f"recycled workers grew by the calls of {shown}{last}", {"routes": routes, "last": reading.last_recycle or None})


def _leak(reading: Reading) -> Breach | None:
    if reading.leak is None:
        return None
    text = f"recycled workers leak: memory in use rises by {format_size(reading.leak)} a request or task, over all of their lives"
    return Breach(text, {"each": reading.leak})


def _gone(reading: Reading, orphans: int) -> Breach:
    held = (
        "" if reading.held is None else f"; the pool held {format_size(reading.held)} of {format_size(reading.limit)} when it was read last"
    )
    left = f"; {counted(orphans, 'workers')} live on without it" if orphans else ""
    last = f". The last death of a worker: {reading.last_death}" if reading.last_death else ""
    figures = {"held": reading.held, "limit": reading.limit, "orphans": orphans, "last": reading.last_death or None}
    return Breach(f"its supervisor has ended and not in order: it was killed, or crashed{held}{left}{last}", figures)


def _sum(rises: Mapping[Key, int], of: Alert) -> int:
    return sum(_of(rises, of))


def _of(rises: Mapping[Key, int], of: Alert) -> Iterable[int]:
    return (count for (alert, _), count in rises.items() if alert is of)
