"""The poison loop's end: how often each task has been killed for memory, where it outlives worker, node and container.

Kept in the result backend where it can keep a key (Redis, memcached, files, ...), else in a local file; and there as well
while the backend is down; in memory where neither can be had. Two notes a task, one a node:

- ``run``: there while an acks_late task runs, so it stays when all die at once. Of one that has come before, the child writes it
  before it runs and removes it after; of one that comes for the first time, MainProcess does when it lasts (see redelivery.py).
  MainProcess removes it for a child whose end it has seen; so warm and cold shutdowns, revokes, limits, an
  operator's kill of a child and a lost connection leave none.
- ``deaths``: what is held against the task, and its runs of which nobody knows yet whether they have ended. Counted up by
  MainProcess when the kernel killed a child, and by whichever node is handed the message again and finds the ``run`` of a node that
  is gone. Removed when a run comes to an end of its own.
- ``node``: a lease, renewed by MainProcess every RENEW seconds while such tasks run there. While it is younger than LEASE, its node
  lives for all who can't see its process. It also has who had grown there, and whether one task was kept alone.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from celery.backends.base import BaseKeyValueStoreBackend

from oomsafe.kernel.oom_kills import boot_id, machine_kills, pid_namespace
from oomsafe.kernel.process import is_alive, start_time
from oomsafe.log import once
from oomsafe.policy.poison import Count, Fate, Run, fate_of, grew
from oomsafe.scoreboard.keep import LONGEST, OLD, Keep

T = TypeVar("T")

#: Seconds for which a backend that has failed is not asked again: each task would wait for it.
LEFT_ALONE = 30.0

#: Seconds between two renewals of a node's lease.
RENEW = 15.0

#: Seconds for which a lease is good: a renewal may fail once and be tried again, and a node may be paused for as long.
LEASE = 60.0

#: Runs of one task whose end is not known, that are remembered.
MOST_OPEN = 8

#: Tasks that had grown, that a node's note has.
MOST_GROWN = 32

#: Notes that are kept in memory where they can be kept nowhere else.
MOST_IN_MEMORY = 1000

_PLAIN = re.compile(r"[A-Za-z0-9._-]{1,200}")

#: (boot, kills, pid, start time, PID namespace, when it began in seconds since 1970): JSON has no tuples of its own.
Begun = tuple[str, "int | None", int, int, str, float]


class Standing(NamedTuple):
    """What is known of a task whose message comes again."""

    held: Count
    open: int
    """Runs of it on nodes that may be gone, which can't be seen from here before their lease has expired."""


class Notes:
    """Of one process; `node` is MainProcess's pid. No method raises."""

    def __init__(self, backend: Any, node: int) -> None:
        self._backend = backend if isinstance(backend, BaseKeyValueStoreBackend) else None
        self._keep = Keep()
        self._memory: dict[str, bytes] = {}
        self._retry_at = 0.0
        self._node = (node, start_time(node) or 0, pid_namespace())
        self._boot = boot_id()

    def begins(self, task_id: str) -> None:
        """Before it runs."""
        self._set(f"run-{task_id}", json.dumps([*self._now(), *self._node, time.time()]).encode())

    def ended(self, task_id: str) -> None:
        """It has run to an end that was not a death for memory, nor its own."""
        self._delete(f"run-{task_id}")

    def ended_well(self, task_id: str) -> None:
        """It has run to an end of its own, also a failure: nothing that was before is held against it."""
        self._delete(f"run-{task_id}", f"deaths-{task_id}")

    def forgive(self, task_id: str) -> None:
        """The same, of one that has no ``run``."""
        self._delete(f"deaths-{task_id}")

    def died(self, task_id: str, anew: bool = False) -> int:
        """The kernel has killed its child. Returns how often it has by now; `anew`: what was before was another message's."""
        count, runs = (Count(), ()) if anew else self._held(task_id)
        self._hold(task_id, count._replace(deaths=count.deaths + 1), runs)
        self.ended(task_id)
        return count.deaths + 1

    def again(self, task_id: str) -> Standing:
        """A message comes for the second time: what has become of the runs before?"""
        count, before = self._held(task_id)
        note = _begun(self._get(f"run-{task_id}"))
        runs = before if note is None or note in before else (*before, note)
        kept, unknown, now = [], 0, self._now()
        for run in runs:
            fate = self._fate(run, now)
            if fate is Fate.KILLED:
                alone, grown = self._left_behind(run)
                count = count.after_its_node(alone, grew(_short(task_id), grown))
            elif fate is Fate.OPEN or (fate is Fate.LIVES and run[2:5] != self._node):
                kept.append(run)
                unknown += fate is Fate.OPEN
        if note is not None or len(kept) < len(before):
            # first what is held against it: should this node die between the two, a run counts twice and not never
            self._hold(task_id, count, tuple(kept[-MOST_OPEN:]))
            self.ended(task_id)
        return Standing(count, unknown)

    def renew(self, alone: bool, grown: Mapping[str, int]) -> None:
        """This node lives. `grown`: bytes by task id, of those that have; `alone`: it runs one task, and starts none beside it."""
        most = sorted(grown.items(), key=lambda task: -task[1])[:MOST_GROWN]
        note = [time.time(), alone, {_short(task_id): growth for task_id, growth in most}]
        self._set(_node_key(self._boot, *self._node), json.dumps(note).encode())

    def gives_up(self) -> None:
        """This node ends, and no task runs on it any more."""
        self._delete(_node_key(self._boot, *self._node))

    def sweep(self) -> None:
        """Once, when a node starts."""
        self._local("sweep", self._keep.sweep)

    def _now(self) -> Run:
        return Run(self._boot, machine_kills())

    def _fate(self, run: Begun, now: Run) -> Fate:
        boot, kills, pid, started, namespace, _ = run
        # where no machine may tell its boot (ProcSubset=pid), a pid may be another machine's
        lives = is_alive(pid, started) if boot and boot == self._boot and namespace == self._node[2] else None
        return fate_of(Run(boot, kills), now, lives, lives is None and self._is_leased(run))

    def _is_leased(self, run: Begun) -> bool:
        key = _node_key(run[0], *run[2:5])
        age = self._age(key)
        if age is None:
            stamps = [at for note in self._get_all(key) if (at := _lease(note)[0]) is not None]
            age = time.time() - max(stamps, default=run[5])  # a lease that is not there yet is about to be
        return age < LEASE

    def _age(self, key: str) -> float | None:
        """Seconds since Redis was given this note, by its own clock: the machines' may differ. None where that can't be known."""

        def ask(store: Any) -> float | None:
            left = store.client.pttl(_key(key)) if hasattr(getattr(store, "client", None), "pttl") else -1
            return OLD - left / 1000 if left > 0 else None

        return self._remote("get", ask)

    def _left_behind(self, run: Begun) -> tuple[bool, dict[str, int]]:
        """(alone, grown) as the node of a run last noted them."""
        notes = [_lease(note) for note in self._get_all(_node_key(run[0], *run[2:5]))]
        at, alone, grown = max(notes, key=lambda note: note[0] or 0.0, default=(None, False, {}))
        return (alone, grown) if at is not None else (False, {})

    def _held(self, task_id: str) -> tuple[Count, tuple[Begun, ...]]:
        """A count that was kept here while the backend was down goes on from there: the greatest of all."""
        return max(map(_count, self._get_all(f"deaths-{task_id}")), default=(Count(), ()), key=lambda held: (held[0], len(held[1])))

    def _hold(self, task_id: str, count: Count, runs: tuple[Begun, ...]) -> None:
        self._set(f"deaths-{task_id}", json.dumps([*count, runs]).encode())

    def _get(self, key: str) -> bytes | None:
        return next(iter(self._get_all(key)), None)

    def _get_all(self, key: str) -> list[bytes]:
        """What the backend has, what the local file has, what memory has; of those that have it."""
        there = self._remote("get", lambda store: store.get(_key(key)))
        found = (
            there.encode() if isinstance(there, str) else there,
            self._local("get", lambda: self._keep.get(key)),
            self._memory.get(key),
        )
        return [note for note in found if note is not None]

    def _set(self, key: str, note: bytes) -> None:
        def put(store: Any) -> bool:
            client = getattr(store, "client", None)
            if client is not None and hasattr(client, "setex"):
                client.setex(_key(key), int(OLD), note)  # Redis, without Celery's retries: those take half a minute
            else:
                store.set(_key(key), note)
            return True

        def keep() -> bool:
            self._keep.set(key, note)
            return True

        if len(note) <= LONGEST and not self._remote("set", put) and not self._local("set", keep):
            self._memory.pop(key, None)
            self._memory[key] = note
            while len(self._memory) > MOST_IN_MEMORY:
                del self._memory[next(iter(self._memory))]

    def _delete(self, *keys: str) -> None:
        def drop(store: Any) -> None:
            client = getattr(store, "client", None)
            if client is not None and hasattr(client, "setex"):
                client.delete(*map(_key, keys))  # Redis, all in one
                return
            for key in keys:
                store.delete(_key(key))

        # not the local one beside a backend that answers, but for the case that it did not: that costs less than to ask
        self._remote("delete", drop)
        for key in keys:
            self._local("delete", lambda key=key: self._keep.delete(key))  # type: ignore[misc]
            self._memory.pop(key, None)

    def _remote(self, what: str, do: Callable[[Any], T]) -> T | None:
        if self._backend is None or time.monotonic() < self._retry_at:
            return None
        try:
            return do(self._backend)
        except Exception as error:
            self._retry_at = time.monotonic() + LEFT_ALONE
            self._say("the result backend", what, error, "they are kept in a local file meanwhile")
            return None

    def _local(self, what: str, do: Callable[[], T]) -> T | None:
        try:
            return do()
        except Exception as error:
            so = "without a backend that can, it is forgotten with this node; set OOMSAFE_STATE to a folder of this user's alone"
            self._say("the local file", what, error, so)
            return None

    def _say(self, where: str, what: str, error: Exception, so: str) -> None:
        once(
            ("poison", where), logging.WARNING, "%s can't keep how often a task was killed (%s: %s: %s): %s",
            where, what, type(error).__name__, error, so,
        )  # fmt: skip


def _key(key: str) -> str:
    """Beside Celery's own, which begin with celery-. What somebody chose that no backend must be given is named by its digest."""
    kind, _, name = key.partition("-")
    return f"oomsafe-{kind}-{name if _PLAIN.fullmatch(name) else _digest(name)}"


def _digest(name: str) -> str:
    return "sha256:" + hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()


def _short(task_id: str) -> str:
    return _digest(task_id)[7:23]


def _node_key(boot: str, pid: int, started: int, namespace: str) -> str:
    return f"node-{_digest(json.dumps([boot, pid, started, namespace]))[7:47]}"


def _begun(note: Any) -> Begun | None:
    """A run, as it was noted; None: that is no note of ours."""
    try:
        boot, kills, pid, started, namespace, at = json.loads(note) if isinstance(note, bytes) else note
        return str(boot), None if kills is None else int(kills), int(pid), int(started), str(namespace), float(at)
    except (ValueError, TypeError, OverflowError):
        return None


def _count(note: bytes) -> tuple[Count, tuple[Begun, ...]]:
    """What is held against a task; nothing, where that is no note of ours."""
    try:
        deaths, doubts, runs = json.loads(note)
        found = [run for one in list(runs)[:MOST_OPEN] if (run := _begun(one)) is not None]
        return Count(min(10**6, max(0, int(deaths))), min(10**6, max(0, int(doubts)))), tuple(found)
    except (ValueError, TypeError, OverflowError):
        return Count(), ()


def _lease(note: bytes) -> tuple[float | None, bool, dict[str, int]]:
    """(when it was renewed, alone, grown); a time of None: that is no note of ours."""
    try:
        at, alone, grown = json.loads(note)
        return float(at), bool(alone), {str(task): int(growth) for task, growth in dict(grown).items()}
    except (ValueError, TypeError, OverflowError):
        return None, False, {}
