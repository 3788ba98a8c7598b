"""What a pool holds, as its budget counts it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from oomsafe.kernel.capacity import MACHINE
from oomsafe.kernel.process import held_of, is_alive, rss_of, shared_out
from oomsafe.policy.limits import Capacity
from oomsafe.policy.settings import Policy
from oomsafe.policy.shedding import RESUME_AT
from oomsafe.policy.units import Percent

if TYPE_CHECKING:
    from oomsafe.pool.view import PoolView, WorkerView

#: Seconds for which it is taken that as much is shared among the processes as was: reading it stalls them.
SHARED_FOR = 5.0


class Usage:
    """Of one pool; used by one process, in one thread at a time."""

    def __init__(self) -> None:
        self._shared = 0
        self._pids: Sequence[int] = ()
        self._read_at = float("-inf")

    def of(self, policy: Policy, capacity: Capacity, budget: int | None, look: Callable[[], PoolView], now: float) -> int | None:
        """Bytes, or None when they can't be told. `look` gives the pool, where its processes have to be asked one by one.

        In a cgroup with a limit it is the cgroup's working set, for the kernel kills by that. On a machine
        without, a budget that is a share of the machine is one of all that is in use on it, and one in
        bytes is the pool's own: its processes without file pages, what they share counted once.
        """
        if capacity.source != MACHINE or isinstance(policy.budget, Percent):
            return capacity.working_set
        pool = look()
        # a worker without a scoreboard has no supervisor
        pids = [pid for pid in (pool.supervisor, *(worker.pid for worker in pool.workers)) if pid]
        together = sum(held_of(pid) or 0 for pid in pids)
        if budget is None or together < budget * RESUME_AT:
            return together  # at most that: shared pages are counted more than once
        if pids != self._pids or now - self._read_at >= SHARED_FOR:
            figures = [(held, shared_out(pid)) for pid in pids if (held := held_of(pid))]
            together = sum(held for held, _ in figures)
            # of one that may not be read, all is taken to be its own
            self._shared = max(0, together - sum(held if shares is None else shares.held for held, shares in figures))
            self._pids, self._read_at = pids, now
        return together - self._shared


def present_rss(worker: WorkerView) -> int | None:
    """What a worker has resident at this moment, in bytes; None when that can't be told.

    It says so itself only between two pieces of work.
    """
    found = rss_of(worker.pid) if is_alive(worker.pid, worker.started) else None
    return worker.figures.rss if found is None else found
