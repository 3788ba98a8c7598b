"""The supervisor's watcher: what is due when, by a clock of the test's; and with real processes in its hand, that it stops the one which
still has that work, and nobody else.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from itertools import count, pairwise

import pytest
from serving import until

from oomsafe.celery.child import GuardedBlockingWorker
from oomsafe.errors import SoftMemoryLimitExceeded
from oomsafe.kernel.descendants import Descendants, since_boot
from oomsafe.kernel.process import held_of, start_time
from oomsafe.kernel.target import Target
from oomsafe.policy.ceilings import OFTEN, SELDOM, Ceiling
from oomsafe.policy.state import State
from oomsafe.scoreboard import layout
from oomsafe.scoreboard.board import InHand, Scoreboard
from oomsafe.scoreboard.slot import Slot
from oomsafe.supervisor.watcher import AGAIN, BEGINS, CASUAL, TELL, Watcher, WatcherThread, kill_if

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


def watching(board: Scoreboard, wanted: Callable[[int], bool] = lambda _: True) -> WatcherThread:
    """A thread that watches all work which is `wanted`."""
    return WatcherThread(Watcher(board, lambda: True, wanted))


def test_the_one_over_its_limit_is_stopped(board: Scoreboard, workers: list[Worker]) -> None:
    """And the figures of it are there; the other, which is within its own, lives."""
    watcher = watching(board)
    watcher.watch(5, Ceiling(hard=20 * MIB))
    watcher.watch(6, Ceiling(hard=60 * MIB))

    assert workers[0].ended() == -signal.SIGKILL
    assert workers[1].ended(0.5) is None
    watcher.end()
    (generation,) = watcher.watcher.stopped
    rss, stopped = watcher.watcher.forget(generation)
    assert stopped is not None
    assert (generation, stopped.ticket, stopped.limit) == (workers[0].slot.generation, 5, 20 * MIB)
    assert 40 * MIB <= stopped.used < 50 * MIB
    assert rss is not None
    assert rss > stopped.used
    assert watcher.watcher.forget(generation) == (None, None)


def test_the_one_over_its_soft_limit_is_told(board: Scoreboard, workers: list[Worker]) -> None:
    """With its ticket and the figures."""
    watcher = watching(board)
    watcher.watch(5, Ceiling(soft=20 * MIB, hard=200 * MIB))

    assert workers[0].ended() == 77
    assert workers[1].ended(0.5) is None
    watcher.end()
    ticket, used, limit = workers[0].slot.warned_of_limit
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
    watcher = watching(board)
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
    watcher = watching(board, lambda ticket: ticket != 5)
    watcher.watch(5, Ceiling(hard=20 * MIB))
    watcher.watch(6, Ceiling(hard=20 * MIB))

    assert workers[1].ended() == -signal.SIGKILL
    assert workers[0].ended(0.3) is None
    watcher.end()


def test_a_signal_that_comes_late_is_not_the_next_task_s() -> None:
    """In the child: it is raised in the task whose ticket came with it, and in no other."""
    worker = GuardedBlockingWorker.__new__(GuardedBlockingWorker)
    memory = memoryview(bytearray(layout.SLOT_SIZE))
    layout.write(memory, layout.WARNED_AT, layout.WARNED, 6, 2 * MIB, MIB)
    worker._slot, worker._ticket, worker._name = Slot(memory), 7, "proj.task"
    worker._fails, worker._memory = False, None
    worker._warned()
    worker._ticket = 0
    worker._warned()
    worker._ticket = 6

    with pytest.raises(SoftMemoryLimitExceeded, match=r"task proj.task used 2.0 MiB > its soft memory limit 1.0 MiB"):
        worker._warned()
    worker._warned()  # it has heeded


def test_a_process_that_is_within_its_limit_by_then_goes_on(workers: list[Worker]) -> None:
    """It stands still while it is asked about, and only then; one that has its pid, but not its start time, is not even asked about."""
    work, states = workers[0].work, []

    def is_over() -> bool:
        states.append(_state(work.pid))
        return len(states) > 1

    assert not kill_if(work.pid, work.started, is_over)
    assert states == ["T"]
    until(lambda: _state(work.pid) == "S", "it goes on to sleep")
    assert not kill_if(work.pid, work.started + 1, is_over)
    assert kill_if(work.pid, work.started, is_over)
    assert states == ["T", "T"]
    assert workers[0].ended() == -signal.SIGKILL


class Watched:
    """A watcher of one worker, this process, whose figures and whose clock are the test's."""

    def __init__(self) -> None:
        self.board = Scoreboard.private()
        slot = self.board.reserve()
        assert slot is not None
        slot.claim()
        self.slot = slot
        self.now, self.held = 100.0, 50 * MIB
        self.handed_out: set[int] = set()
        self.lasting: list[dict[int, int]] = []
        self.told: list[InHand] = []
        self.watcher = Watcher(
            self.board, lambda: bool(self.handed_out), self.handed_out.__contains__, self.lasting.append,
            tell=self.told.append, sizes=lambda _: (self.held + MIB, self.held),
        )  # fmt: skip

    def hand_out(self, ticket: int, ceiling: Ceiling | None = None) -> float:
        """To the worker, which has not begun yet."""
        self.handed_out.add(ticket)
        return self.watcher.watch(ticket, ceiling)

    def check(self, later: float = 0.0) -> float:
        """After so many seconds."""
        self.now += later
        return self.watcher.check(self.now)

    def measured(self) -> int:
        """The worker's rss when that was measured last."""
        return self.watcher._measured[self.slot.generation][0]


@pytest.fixture
def watched() -> Watched:
    return Watched()


def test_nothing_is_due_without_work(watched: Watched) -> None:
    """Until some is handed out."""
    assert watched.check() == math.inf
    assert watched.hand_out(5) == CASUAL
    assert watched.check() == CASUAL
    watched.handed_out.clear()
    assert watched.check(CASUAL) == math.inf


def test_limited_work_that_has_not_begun_is_due_soon(watched: Watched) -> None:
    """A worker does not say that it begins."""
    assert watched.hand_out(5, Ceiling(hard=100 * MIB)) == BEGINS
    assert watched.check() == BEGINS


def test_work_is_due_the_sooner_the_less_is_left(watched: Watched) -> None:
    """And is not measured before it is due."""
    watched.hand_out(5, Ceiling(hard=100 * MIB))
    watched.slot.take_up(5, watched.held)
    pause = watched.check()
    assert OFTEN < pause < SELDOM
    watched.held += 99 * MIB
    assert watched.check(pause / 2) == pytest.approx(pause / 2)
    assert watched.measured() == 51 * MIB
    assert watched.check(pause) == OFTEN
    assert watched.measured() == 150 * MIB


def test_what_a_worker_held_last_is_known(watched: Watched) -> None:
    """Of work without limits too: it is all that is known of one that the kernel kills."""
    watched.hand_out(5)
    watched.slot.take_up(5, watched.held)
    watched.check()
    watched.held += MIB
    watched.check(CASUAL)

    assert watched.watcher.forget(watched.slot.generation) == (52 * MIB, None)


def test_work_that_lasts_is_reported_with_its_growth(watched: Watched) -> None:
    """Once it has been in hand for two checks, as often as every CASUAL seconds."""
    watched.hand_out(5)
    watched.slot.take_up(5, watched.held)
    watched.check()
    watched.held += 3 * MIB
    watched.check(CASUAL / 2)
    assert watched.lasting == []
    watched.check(CASUAL / 2)
    assert watched.lasting == [{5: 3 * MIB}]


def test_work_over_its_soft_limit_is_told_again_until_it_heeds(watched: Watched) -> None:
    """Each time after twice as long, or when it is measured next."""
    watched.hand_out(5, Ceiling(soft=MIB, hard=3 * MIB))
    watched.slot.take_up(5, watched.held)
    watched.held += 2 * MIB
    pause, times = watched.check(), [watched.now]
    assert watched.slot.warned_of_limit == (5, 2 * MIB, MIB)
    while len(times) < 4:
        pause = watched.check(pause)
        times += [watched.now] * (len(watched.told) - len(times))
    gaps = [later - before for before, later in pairwise(times)]
    assert gaps == pytest.approx([AGAIN, 2 * AGAIN, 4 * AGAIN], abs=OFTEN)

    watched.slot.heed_limit(5)
    for _ in range(1000):
        pause = watched.check(pause)
    assert {work.ticket for work in watched.told} == {5}
    assert len(watched.told) == 4


def test_work_that_has_ended_has_no_limits(watched: Watched) -> None:
    """Its ticket may still be in the slot of a worker that hands its result over."""
    watched.hand_out(5, Ceiling(soft=MIB))
    watched.slot.take_up(5, watched.held)
    watched.handed_out.clear()
    watched.handed_out.add(6)
    watched.held += 2 * MIB

    watched.check()

    assert watched.told == []


def test_work_that_the_kernel_refuses_more_is_signalled_as_it_grows(watched: Watched) -> None:
    """To measure again what it has left; work that it refuses nothing is not."""
    watched.hand_out(5, Ceiling(hard=80 * MIB, spare=4 * MIB))
    watched.slot.take_up(5, watched.held)
    pause = watched.check()
    told = []
    for grown in (5, 15, 15, 40, 2):
        watched.held = (50 + grown) * MIB
        pause = watched.check(pause)
        told.append(len(watched.told))

    assert told == [0, 1, 1, 2, 3]


def _state(pid: int) -> str:
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(") ")[2][0]
