"""The supervisor's watcher, with real processes in its hand: it stops the one that still has that work, and nobody else."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from itertools import count

import pytest
from serving import until

from oomsafe.celery.child import GuardedBlockingWorker
from oomsafe.errors import SoftMemoryLimitExceeded
from oomsafe.kernel.descendants import Descendants, since_boot
from oomsafe.kernel.process import held_of, start_time
from oomsafe.kernel.target import Target
from oomsafe.policy.ceilings import Ceiling
from oomsafe.policy.state import State
from oomsafe.scoreboard import layout
from oomsafe.scoreboard.board import Scoreboard
from oomsafe.scoreboard.slot import Slot
from oomsafe.supervisor.watcher import TELL, Watcher

MIB = 1 << 20

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="there are no pidfds and no statm")


class Worker:
    """A fork that has `mib` of memory, and a ticket in its slot. Told of its limit, it calls `told`: how many times it was told before."""

    def __init__(self, board: Scoreboard, ticket: int, mib: int, told: Callable[[Slot, int], None] = lambda *_: os._exit(77)) -> None:
        slot = board.reserve()
        assert slot is not None
        self.slot = slot
        ready, says = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            try:
                before = count()
                signal.signal(TELL, lambda *_: told(slot, next(before)))
                slot.claim()
                held = held_of(os.getpid()) or 0
                kept = b"x" * (mib * MIB)
                slot.take_up(ticket, held)
                os.write(says, b".")
                time.sleep(60)
                os._exit(len(kept) and 0)
            finally:
                os._exit(1)
        os.close(says)
        os.read(ready, 1)
        os.close(ready)
        self.work = next(work for work in board.in_hand() if work.pid == self.pid)

    def ended(self, seconds: float = 10) -> int | None:
        """Its status, once it has ended; None when it has not by then."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.pid = 0
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.005)
        return None

    def end(self) -> None:
        """Whatever it does."""
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)


@pytest.fixture
def board() -> Iterator[Scoreboard]:
    """Of this process's pool."""
    made, _ = Scoreboard.create(2, "test")
    yield made
    made.remove()


@pytest.fixture
def workers(board: Scoreboard) -> Iterator[list[Worker]]:
    """Two, with 40 MiB and the tickets 5 and 6."""
    made = [Worker(board, ticket, 40) for ticket in (5, 6)]
    yield made
    for worker in made:
        worker.end()


def test_the_one_over_its_limit_is_stopped(board: Scoreboard, workers: list[Worker]) -> None:
    """And the figures of it are there; the other, which is within its own, lives."""
    watcher = Watcher(board, lambda: True, lambda ticket: True)
    watcher.watch(5, Ceiling(hard=20 * MIB))
    watcher.watch(6, Ceiling(hard=60 * MIB))

    assert workers[0].ended() == -signal.SIGKILL
    assert workers[1].ended(0.5) is None
    watcher.end()
    used, limit = watcher.stopped[5]
    assert (limit, set(watcher.stopped)) == (20 * MIB, {5})
    assert 40 * MIB <= used < 50 * MIB


def test_the_one_over_its_soft_limit_is_told(board: Scoreboard, workers: list[Worker]) -> None:
    """With its ticket and the figures."""
    watcher = Watcher(board, lambda: True, lambda ticket: True)
    watcher.watch(5, Ceiling(soft=20 * MIB, hard=200 * MIB))

    assert workers[0].ended() == 77
    assert workers[1].ended(0.5) is None
    watcher.end()
    ticket, used, limit = workers[0].slot.told_of_limit
    assert (ticket, limit) == (5, 20 * MIB)
    assert 40 * MIB <= used < 50 * MIB


def test_one_that_has_not_heeded_is_told_again(board: Scoreboard) -> None:
    """A signal that comes right before a blocking call is heard when that ends. Once it has heeded it is left alone."""

    def told(slot: Slot, before: int) -> None:
        if before == 2:
            slot.heed_limit(7)
            slot.set_state(State.DRAINING)
        elif before > 2:
            os._exit(77)

    worker = Worker(board, 7, 40, told)
    watcher = Watcher(board, lambda: True, lambda ticket: True)
    try:
        watcher.watch(7, Ceiling(soft=20 * MIB))

        until(lambda: worker.slot.state == State.DRAINING, "it is told three times")
        assert worker.ended(1) is None
    finally:
        watcher.end()
        worker.end()


def test_one_that_has_other_work_by_now_goes_on(board: Scoreboard, workers: list[Worker]) -> None:
    """The look was at ticket 5; by the time of the signal there is ticket 7."""
    watcher = Watcher(board, lambda: True, lambda ticket: True)
    seen = workers[0].work
    workers[0].slot.take_up(7, seen.held)

    watcher._stop(seen, Ceiling(hard=20 * MIB), Descendants(seen.pid, since_boot()))

    assert workers[0].ended(0.3) is None
    assert _state(workers[0].pid) == "S"
    assert watcher.stopped == {}
    workers[0].slot.put_down()
    watcher._stop(seen, Ceiling(hard=20 * MIB), Descendants(seen.pid, since_boot()))
    assert workers[0].ended(0.3) is None


def test_one_that_has_let_go_by_now_goes_on(board: Scoreboard, workers: list[Worker]) -> None:
    """It is measured again before the signal."""
    watcher = Watcher(board, lambda: True, lambda ticket: True)

    watcher._stop(workers[0].work, Ceiling(hard=60 * MIB), Descendants(workers[0].pid, since_boot()))

    assert workers[0].ended(0.3) is None
    assert _state(workers[0].pid) == "S"


def test_another_process_with_its_pid_is_not_signalled(workers: list[Worker]) -> None:
    """The kernel gives pids again."""
    with pytest.raises(ProcessLookupError):
        Target(workers[0].pid, (start_time(workers[0].pid) or 0) + 1)


def test_no_work_is_watched_that_has_ended(board: Scoreboard, workers: list[Worker]) -> None:
    """Whose ticket is still in the slot of a worker that hands its result over."""
    watcher = Watcher(board, lambda: True, lambda ticket: ticket != 5)
    watcher.watch(5, Ceiling(hard=20 * MIB))
    watcher.watch(6, Ceiling(hard=20 * MIB))

    assert workers[1].ended() == -signal.SIGKILL
    assert workers[0].ended(0.3) is None
    watcher.end()


def test_a_signal_that_comes_late_is_not_the_next_task_s() -> None:
    """In the child: it is raised in the task whose ticket came with it, and in no other."""
    worker = GuardedBlockingWorker.__new__(GuardedBlockingWorker)
    memory = memoryview(bytearray(layout.SLOT_SIZE))
    layout.write(memory, layout.TOLD_AT, layout.TOLD, 6, 2 * MIB, MIB)
    worker._slot, worker._ticket, worker._name = Slot(memory), 7, "proj.task"
    worker._told()
    worker._ticket = 0
    worker._told()
    worker._ticket = 6

    with pytest.raises(SoftMemoryLimitExceeded, match=r"task proj.task used 2.0 MiB > its soft memory limit 1.0 MiB"):
        worker._told()
    worker._told()  # it has heeded


def _state(pid: int) -> str:
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(") ")[2][0]
