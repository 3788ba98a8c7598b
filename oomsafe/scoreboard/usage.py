"""How much memory a pool holds, as its budget counts it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from oomsafe.kernel.process import held_of, shared_out
from oomsafe.policy.limits import MACHINE, Capacity
from oomsafe.policy.settings import Policy
from oomsafe.policy.shedding import RESUME_AT
from oomsafe.policy.units import Percent

if TYPE_CHECKING:
    from oomsafe.scoreboard.view import PoolView

#: Seconds for which the amount that the processes share is assumed not to change: reading it stalls them.
SHARED_FOR = 5.0


class Usage:
    """The memory of one pool; used by one process, in one thread at a time."""

    def __init__(self, shared_for: float = SHARED_FOR, held: Callable[[int], int | None] = held_of) -> None:
        """`held` tells what a process holds, as held_of() does."""
        self._shared_for = shared_for
        self._held_of = held
        self._shared = 0
        self._pids: Sequence[int] = ()
        self._read_at = float("-inf")

    def of(self, policy: Policy, capacity: Capacity, budget: int | None, pids: Callable[[], Sequence[int]], now: float) -> int | None:
        """What the pool holds in bytes; None: not known. `pids` returns the pool's processes, and is called if these must be read.

        If a cgroup's limit is the tightest, it is what the pool's own cgroup holds, because the kernel kills by that. If the
        machine's memory is the tightest, it is what the pool's processes hold without file pages; a budget in bytes is compared
        with the exact sum, in which shared memory counts once.
        """
        if not reads_processes(policy, capacity):
            return capacity.held
        return self.of_processes(pids(), 0 if budget is None else budget * RESUME_AT, now)

    def of_processes(self, pids: Sequence[int], exact_from: float, now: float) -> int:
        """What these processes hold, in bytes. A result below `exact_from` may be too high: it counts shared pages more than once."""
        total = together(pids, self._held_of)
        if total < exact_from:
            return total
        if pids != self._pids or now - self._read_at >= self._shared_for:
            figures = [(held, shared_out(pid)) for pid in pids if (held := held_of(pid))]
            total = sum(held for held, _ in figures)
            # a process that may not be read is assumed to share nothing
            self._shared = max(0, total - sum(held if shares is None else shares.held for held, shares in figures))
            self._pids, self._read_at = pids, now
        return max(0, total - self._shared)


def reads_processes(policy: Policy, capacity: Capacity) -> bool:
    """Whether Usage.of() must read the pool's processes one by one."""
    return capacity.source == MACHINE and not isinstance(policy.budget, Percent)


def pids_of(pool: PoolView) -> list[int]:
    """The pool's processes; a worker without a scoreboard has no supervisor."""
    return [pid for pid in (pool.supervisor, *(worker.pid for worker in pool.workers)) if pid]


def together(pids: Iterable[int], held: Callable[[int], int | None] = held_of) -> int:
    """The sum of what these processes hold in bytes, without file pages; shared memory counts once for each process."""
    return sum(held(pid) or 0 for pid in pids)
