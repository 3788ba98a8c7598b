"""Ends poison loops: counts how often each task was killed for memory, in a place that outlives worker, node and container.

The notes are kept in the result backend if it can store keys (Redis, memcached, files, ...); else, and while the backend is down, in a
local file; in memory if neither is available. There are two kinds of notes for a task, and one for a node:

- ``run``: exists while an acks_late task runs, so it stays behind if everything dies at once. For a redelivered task, the child writes it
  before the task runs and removes it after; for a task that is delivered for the first time, MainProcess does so once the task has run for
  a while (see redelivery.py). MainProcess removes the note of a child whose end it has noticed, so warm and cold shutdowns, revokes,
  limits, an operator's kill of a child and a lost connection leave no note.
- ``deaths``: the deaths that count against the task, and its runs that may not have ended. MainProcess increments the count when the
  kernel killed a child; so does a node that receives the message again and finds the ``run`` of a node that is gone. The note is removed
  when a run ends by itself.
- ``node``: a lease, renewed by MainProcess every RENEW seconds while such tasks run there. While it is younger than LEASE, the node counts
  as alive for processes that can't see it. The lease also lists the tasks that had grown there, and says whether a task ran alone.
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

#: Seconds for which a backend that has failed is not used, because each task would wait for it.
LEFT_ALONE = 30.0

#: Seconds between two renewals of a node's lease.
RENEW = 15.0

#: Seconds for which a lease is valid. One renewal may fail and be tried again, or the node may be paused for as long as that takes.
LEASE = 60.0

#: The most runs of one task that are remembered while their end is not known.
MOST_OPEN = 8

#: The most tasks that a node's note lists as grown.
MOST_GROWN = 32

#: The most notes that are kept in memory, if they can be kept nowhere else.
MOST_IN_MEMORY = 1000

_PLAIN = re.compile(r"[A-Za-z0-9._-]{1,200}")

#: (boot, kills, pid, start time, PID namespace, beginning in seconds since 1970). A plain tuple, because it is stored as a JSON list.
Begun = tuple[str, "int | None", int, int, str, float]


class Standing(NamedTuple):
    """What is known about a task whose message is redelivered."""

    held: Count
    open: int
    """How many of its runs were on nodes that may be gone; from here that is only known once their lease has expired."""


class Notes:
    """The notes that one process reads and writes. `node` is MainProcess's pid. No method raises."""

    def __init__(self, backend: Any, node: int) -> None:
        self._backend = backend if isinstance(backend, BaseKeyValueStoreBackend) else None
        self._keep = Keep()
        self._memory: dict[str, bytes] = {}
        self._retry_at = 0.0
        self._node = (node, start_time(node) or 0, pid_namespace())
        self._boot = boot_id()

    def begins(self, task_id: str) -> None:
        """Note a run, before the task runs."""
        self._set(f"run-{task_id}", json.dumps([*self._now(), *self._node, time.time()]).encode())

    def ended(self, task_id: str) -> None:
        """Its run has ended, but neither by itself nor by a death for memory."""
        self._delete(f"run-{task_id}")

    def ended_well(self, task_id: str) -> None:
        """Its run has ended by itself, successfully or not: earlier deaths no longer count against the task."""
        self._delete(f"run-{task_id}", f"deaths-{task_id}")

    def forgive(self, task_id: str) -> None:
        """The same for a task that has no ``run`` note."""
        self._delete(f"deaths-{task_id}")

    def died(self, task_id: str, anew: bool = False) -> int:
        """Count that the kernel has killed its child, and return the number of deaths; `anew`: earlier ones belong to another message."""
        count, runs = (Count(), ()) if anew else self._held(task_id)
        self._hold(task_id, count._replace(deaths=count.deaths + 1), runs)
        self.ended(task_id)
        return count.deaths + 1

    def again(self, task_id: str) -> Standing:
        """A message is redelivered: find out what happened to the earlier runs, count the deaths, and return the result."""
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
            # the count is written first: if this node dies between the two, a run counts twice, which is better than not at all
            self._hold(task_id, count, tuple(kept[-MOST_OPEN:]))
            self.ended(task_id)
        return Standing(count, unknown)

    def renew(self, alone: bool, grown: Mapping[str, int]) -> None:
        """Renew this node's lease. `grown`: bytes by id of each task that has grown; `alone`: one task runs, and none starts beside it."""
        most = sorted(grown.items(), key=lambda task: -task[1])[:MOST_GROWN]
        note = [time.time(), alone, {_short(task_id): growth for task_id, growth in most}]
        self._set(_node_key(self._boot, *self._node), json.dumps(note).encode())

    def gives_up(self) -> None:
        """Remove this node's lease: the node ends, and no task runs on it any more."""
        self._delete(_node_key(self._boot, *self._node))

    def sweep(self) -> None:
        """Remove old notes from the local folder. Called once, when a node starts."""
        self._local("sweep", self._keep.sweep)

    def _now(self) -> Run:
        return Run(self._boot, machine_kills())

    def _fate(self, run: Begun, now: Run) -> Fate:
        boot, kills, pid, started, namespace, _ = run
        # if the boot id can't be read (ProcSubset=pid), the pid may be another machine's
        lives = is_alive(pid, started) if boot and boot == self._boot and namespace == self._node[2] else None
        return fate_of(Run(boot, kills), now, lives, lives is None and self._is_leased(run))

    def _is_leased(self, run: Begun) -> bool:
        key = _node_key(run[0], *run[2:5])
        age = self._age(key)
        if age is None:
            stamps = [at for note in self._get_all(key) if (at := _lease(note)[0]) is not None]
            age = time.time() - max(stamps, default=run[5])  # without a lease, the run's beginning counts: the lease is about to be written
        return age < LEASE

    def _age(self, key: str) -> float | None:
        """The age of this note in seconds by Redis's clock, because the machines' clocks may differ. None if that is not known."""

        def ask(store: Any) -> float | None:
            left = store.client.pttl(_key(key)) if hasattr(getattr(store, "client", None), "pttl") else -1
            return OLD - left / 1000 if left > 0 else None

        return self._remote("get", ask)

    def _left_behind(self, run: Begun) -> tuple[bool, dict[str, int]]:
        """(alone, grown) from the last lease of a run's node."""
        notes = [_lease(note) for note in self._get_all(_node_key(run[0], *run[2:5]))]
        at, alone, grown = max(notes, key=lambda note: note[0] or 0.0, default=(None, False, {}))
        return (alone, grown) if at is not None else (False, {})

    def _held(self, task_id: str) -> tuple[Count, tuple[Begun, ...]]:
        """The greatest of all stored counts, because one may have been kept here while the backend was down."""
        return max(map(_count, self._get_all(f"deaths-{task_id}")), default=(Count(), ()), key=lambda held: (held[0], len(held[1])))

    def _hold(self, task_id: str, count: Count, runs: tuple[Begun, ...]) -> None:
        self._set(f"deaths-{task_id}", json.dumps([*count, runs]).encode())

    def _get(self, key: str) -> bytes | None:
        return next(iter(self._get_all(key)), None)

    def _get_all(self, key: str) -> list[bytes]:
        """The notes under this key in the backend, in the local file and in memory, in this order; a place without one is left out."""
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
                client.setex(_key(key), int(OLD), note)  # Redis without Celery's retries, which take half a minute
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

        # the local one too, in case it was written while the backend did not answer: to delete costs less than to check
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
    """The backend's key for a note; Celery's own begin with celery-. A name that a backend might not accept is replaced by its digest."""
    kind, _, name = key.partition("-")
    return f"oomsafe-{kind}-{name if _PLAIN.fullmatch(name) else _digest(name)}"


def _digest(name: str) -> str:
    return "sha256:" + hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()


def _short(task_id: str) -> str:
    return _digest(task_id)[7:23]


def _node_key(boot: str, pid: int, started: int, namespace: str) -> str:
    return f"node-{_digest(json.dumps([boot, pid, started, namespace]))[7:47]}"


def _begun(note: Any) -> Begun | None:
    """Parse a noted run; None: the note is not valid."""
    try:
        boot, kills, pid, started, namespace, at = json.loads(note) if isinstance(note, bytes) else note
        return str(boot), None if kills is None else int(kills), int(pid), int(started), str(namespace), float(at)
    except (ValueError, TypeError, OverflowError):
        return None


def _count(note: bytes) -> tuple[Count, tuple[Begun, ...]]:
    """Parse a note of deaths; an empty count if it is not valid."""
    try:
        deaths, doubts, runs = json.loads(note)
        found = [run for one in list(runs)[:MOST_OPEN] if (run := _begun(one)) is not None]
        return Count(min(10**6, max(0, int(deaths))), min(10**6, max(0, int(doubts)))), tuple(found)
    except (ValueError, TypeError, OverflowError):
        return Count(), ()


def _lease(note: bytes) -> tuple[float | None, bool, dict[str, int]]:
    """Parse a lease: (time of renewal, alone, grown); a time of None: the note is not valid."""
    try:
        at, alone, grown = json.loads(note)
        return float(at), bool(alone), {str(task): int(growth) for task, growth in dict(grown).items()}
    except (ValueError, TypeError, OverflowError):
        return None, False, {}
