"""The poison loop's end: how often each task has been killed for memory, where it outlives worker, node and container.

Kept in the result backend where it can keep a key (Redis, memcached, files, ...), else in a local file;
and there as well while the backend is down: what is asked for is the greater of both. Two notes a task:

- ``run``: there while an acks_late task runs, so it stays when all die at once. Of one that has come before, the child writes it
  before it runs and removes it after; of one that comes for the first time, MainProcess does when it lasts (see redelivery.py).
  MainProcess removes it for a child whose end it has seen; so warm and cold shutdowns, revokes, limits, an
  operator's kill of a child and a lost connection leave none.
- ``deaths``: counted up by MainProcess when the kernel killed a child, and by whichever node is handed the message
  again and finds a ``run`` whose node is gone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any, TypeVar

from celery.backends.base import BaseKeyValueStoreBackend

from oomsafe.kernel.oom_kills import boot_id, machine_kills, pid_namespace
from oomsafe.kernel.process import is_alive, start_time
from oomsafe.policy.poison import Run, is_a_death
from oomsafe.pool.keep import LONGEST, OLD, Keep
from oomsafe.pool.log import log

T = TypeVar("T")

#: Seconds for which a backend that has failed is not asked again: each task would wait for it.
LEFT_ALONE = 30.0


class Poison:
    """Of one process; `node` is MainProcess's pid. No method raises."""

    def __init__(self, backend: Any, node: int) -> None:
        self._backend = backend if isinstance(backend, BaseKeyValueStoreBackend) else None
        self._keep = Keep()
        self._retry_at = 0.0
        self._said: set[str] = set()
        self._node = [node, start_time(node) or 0, pid_namespace()]
        self._boot = boot_id()

    def begins(self, task_id: str) -> None:
        """Before it runs."""
        self._set(f"run-{task_id}", json.dumps([*self._now(), *self._node]).encode())

    def ended(self, task_id: str) -> None:
        """It has run to an end that was not a death for memory."""
        self._delete(f"run-{task_id}")

    def died(self, task_id: str) -> int:
        """The kernel has killed it. Returns how often it has by now."""
        deaths = self.deaths(task_id) + 1
        self._set(f"deaths-{task_id}", str(deaths).encode())
        self.ended(task_id)
        return deaths

    def again(self, task_id: str) -> int:
        """A message comes for the second time. Returns how often the kernel has killed its task."""
        note = self._get(f"run-{task_id}")
        if note is not None and self._counts(note):
            return self.died(task_id)
        return self.deaths(task_id)

    def deaths(self, task_id: str) -> int:
        """How often the kernel has killed it."""
        note = self._get(f"deaths-{task_id}") or b"0"
        return int(note) if note.isdigit() and len(note) < 9 else 0

    def sweep(self) -> None:
        """Once, when a node starts."""
        self._local("sweep", self._keep.sweep)

    def _now(self) -> Run:
        return Run(self._boot, machine_kills())

    def _counts(self, note: bytes) -> bool:
        try:
            boot, kills, pid, started, namespace = json.loads(note)
            lives = boot == self._boot and namespace == self._node[2] and is_alive(int(pid), int(started))
            return is_a_death(Run(str(boot), kills if kills is None else int(kills)), self._now(), lives)
        except (ValueError, TypeError):
            return False  # not a note of ours

    def _get(self, key: str) -> bytes | None:
        found = self._remote("get", lambda store: store.get(_key(key)))
        there = found.encode() if isinstance(found, str) else found
        here = self._local("get", lambda: self._keep.get(key))
        if there is None or here is None:
            return there if here is None else here
        # a count that was kept here while the backend was down goes on from there
        return max(there, here, key=lambda note: (len(note), note))

    def _set(self, key: str, note: bytes) -> None:
        def keep(store: Any) -> bool:
            client = getattr(store, "client", None)
            if client is not None and hasattr(client, "setex"):
                client.setex(_key(key), int(OLD), note)  # Redis, without Celery's retries: those take half a minute
            else:
                store.set(_key(key), note)
            return True

        if not self._remote("set", keep):
            self._local("set", lambda: self._keep.set(key, note[:LONGEST]))

    def _delete(self, key: str) -> None:
        # not the local one beside a backend that answers, but for the case that it did not: that costs less than to ask
        self._remote("delete", lambda store: [store.delete(_key(key))])
        self._local("delete", lambda: self._keep.delete(key))

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
            self._say("the local file", what, error, "set OOMSAFE_STATE to a folder of this user's alone")
            return None

    def _say(self, where: str, what: str, error: Exception, so: str) -> None:
        if where not in self._said:
            self._said.add(where)
            log.warning("%s can't keep how often a task was killed (%s: %s: %s): %s", where, what, type(error).__name__, error, so)


def _key(key: str) -> str:
    """Beside Celery's own, which begin with celery-."""
    return f"oomsafe-{key[:200]}"
