"""What a worker left on the scoreboard when it died, and what it died of: any server's."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable

import pytest
from unit.scripted import CGROUP

from oomsafe.kernel.oom_kills import Kills
from oomsafe.kernel.oom_victims import Victim, Victims
from oomsafe.policy.ends import By, End
from oomsafe.policy.limits import Capacity
from oomsafe.policy.verdicts import Verdict
from oomsafe.scoreboard.board import Scoreboard
from oomsafe.scoreboard.layout import Counters
from oomsafe.scoreboard.slot import Figures, Slot
from oomsafe.supervisor.deaths import FRESH, LAST, REMEMBERED, Death, Deaths, Ended, OomCounter
from oomsafe.supervisor.watcher import Stopped, Watcher

MIB = 1 << 20

CAPACITY = Capacity(600 * MIB, CGROUP)


class Kernel:
    """Its counter."""

    def __init__(self) -> None:
        self.total = 0
        self.log: Victims | None = None

    def deaths(self, board: Scoreboard | None = None, watcher: Watcher | None = None) -> Deaths:
        """Of a pool whose cgroup has this counter."""
        return Deaths(board, lambda: CAPACITY, watcher, OomCounter(lambda: Kills(self.total, own=True)), victims=lambda _: self.log)


@pytest.fixture
def kernel() -> Kernel:
    return Kernel()


@pytest.fixture
def board() -> Scoreboard:
    return Scoreboard.private(2)


def killed(board: Scoreboard, live: Callable[[Slot], None]) -> tuple[Slot, int]:
    """A fork that has a slot, does `live`, and dies by SIGKILL: its slot, as the supervisor has it, and its pid. It is reaped."""
    slot = board.reserve()
    assert slot is not None
    pid = os.fork()
    if not pid:
        try:
            slot.claim()
            live(slot)
            os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    board.born(slot.number, slot.generation, pid)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    return slot, pid


def begin(slot: Slot) -> None:
    """Work with ticket 7, which the worker calls by its route."""
    slot.publish(Figures(rss=50 * MIB), Counters())
    _, write, offsets = slot.cells()
    name = b"GET /leak"
    write(offsets[0], len(name), 1.0, 40 * MIB, name, 1)
    slot.take_up(7, 30 * MIB)


def read(deaths: Deaths, slot: Slot, pid: int) -> Death:
    return deaths.read(slot.number, slot.generation, Ended(pid, -signal.SIGKILL))


@pytest.mark.skipif(sys.platform != "linux", reason="there are no start times")
def test_what_a_worker_had_in_hand_is_read_before_its_slot_is_given_away(board: Scoreboard, kernel: Kernel) -> None:
    """Its ticket, the names of what it had begun, what it held; and nothing of it afterwards, when another worker may have the slot."""
    deaths = kernel.deaths(board)
    slot, pid = killed(board, begin)

    death = read(deaths, slot, pid)
    board.release(slot.number, slot.generation)
    late = read(deaths, slot, pid)

    assert (death.slot, death.generation, death.pid) == (slot.number, slot.generation, pid)
    assert (death.ticket, death.in_flight, death.rss) == (7, ("GET /leak",), 30 * MIB)
    assert (death.limit, death.whence) == (CAPACITY.limit, CAPACITY.whence)
    assert death.is_unexplained_kill
    assert (late.ticket, late.in_flight, late.rss) == (0, (), None)


@pytest.mark.skipif(sys.platform != "linux", reason="there are no start times")
@pytest.mark.parametrize(
    ("live", "rss"), [(lambda slot: slot.publish(Figures(rss=50 * MIB), Counters()), 50 * MIB), (lambda _: None, None)]
)
def test_one_without_work(board: Scoreboard, kernel: Kernel, live: Callable[[Slot], None], rss: int | None) -> None:
    """It held what it has published since its last work; of one that has published nothing yet, what was measured counts, if anything."""
    slot, pid = killed(board, live)
    watcher = Watcher(board, lambda: True, lambda _: True)
    death = read(kernel.deaths(board, watcher), slot, pid)
    assert (death.ticket, death.in_flight, death.rss) == (0, (), rss)

    watcher._measured[slot.generation] = 90 * MIB, 80 * MIB
    assert read(kernel.deaths(board, watcher), slot, pid).rss == (rss or 90 * MIB)


@pytest.mark.skipif(sys.platform != "linux", reason="there are no start times")
def test_what_the_watcher_knows_of_it_is_newer(board: Scoreboard, kernel: Kernel) -> None:
    """And that it has killed it for its work; both are forgotten with this."""
    watcher = Watcher(board, lambda: True, lambda _: True, sizes=lambda _: (90 * MIB, 80 * MIB))
    slot, pid = killed(board, begin)
    watcher.check(100.0)
    watcher.stopped[slot.generation] = Stopped(7, 60 * MIB, 50 * MIB)

    death = read(kernel.deaths(board, watcher), slot, pid)

    assert (death.rss, death.stopped) == (90 * MIB, Stopped(7, 60 * MIB, 50 * MIB))
    assert (death.is_unexplained_kill, death.record().end) == (False, End.LIMIT)
    assert watcher.forget(slot.generation) == (None, None)


def test_without_a_scoreboard_a_death_is_one_all_the_same(kernel: Kernel) -> None:
    """It is judged by the counter."""
    deaths = kernel.deaths()
    kernel.total = 1
    death = deaths.read(None, None, Ended(11, -9))
    deaths.record(death)
    deaths.settle()

    assert (death.ticket, death.rss, death.verdict) == (0, None, Verdict.CONFIRMED)


def test_all_that_die_at_the_same_time_are_judged_together(kernel: Kernel) -> None:
    """The counter tells how many the kernel killed, never whom; and no kill is counted for two."""
    deaths = kernel.deaths()
    kernel.total = 1
    for pid in (11, 12):
        deaths.record(Death(pid=pid, exitcode=-9))
    deaths.judge()
    deaths.settle()
    deaths.record(Death(pid=13, exitcode=-9))
    deaths.settle()

    assert [death.verdict for pid in (11, 12, 13) if (death := deaths.of(pid))] == [Verdict.LIKELY, Verdict.LIKELY, Verdict.NOT_THE_KERNEL]
    assert deaths.counts == {End.OOM_LIKELY: 2, End.SIGNAL: 1}
    assert [death.pid for death in deaths.last] == [12, 11]


@pytest.mark.parametrize(
    "death",
    [
        Death(pid=11, exitcode=-9, by=By.TIME_LIMIT, killed_by_server=True),
        Death(pid=11, exitcode=-9, stopped=Stopped(7, 2, 1)),
        Death(pid=11, exitcode=-15),
        Death(pid=11, exitcode=1),
    ],
)
def test_a_death_that_is_explained_uses_up_no_kill(kernel: Kernel, death: Death) -> None:
    """A time limit, an order, the supervisor's own kill, an end of its own."""
    deaths = kernel.deaths()
    kernel.total = 1
    deaths.record(death)
    other = Death(pid=12, exitcode=-9)
    deaths.record(other)
    deaths.settle()

    assert (death.verdict, other.verdict) == (None, Verdict.CONFIRMED)


def test_a_rise_that_may_be_one_of_those_that_still_die_is_kept_for_them(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two die by hand while the kernel's victim, which holds much, still exits: which of the three it was is not known."""
    deaths = kernel.deaths()
    kernel.total = 1
    monkeypatch.setattr(deaths, "_dying", lambda: 1)
    for pid in (11, 12):
        deaths.record(Death(pid=pid, exitcode=-9))
    deaths.settle()
    monkeypatch.setattr(deaths, "_dying", lambda: 0)
    deaths.record(Death(pid=13, exitcode=-9))
    deaths.settle()
    deaths.record(Death(pid=14, exitcode=-9))
    deaths.settle()

    assert [death.verdict for pid in (11, 12, 13, 14) if (death := deaths.of(pid))] == [*[Verdict.LIKELY] * 3, Verdict.NOT_THE_KERNEL]
    assert deaths.counter.others() == 0


def test_the_log_is_asked_also_where_the_count_is_used_up(kernel: Kernel) -> None:
    """It names the victim, whatever has been made of the count before."""
    deaths = kernel.deaths()
    kernel.log = Victims((Victim(13, b"oomsafe-w1-0001", 400 * MIB),), complete=False)
    death = Death(pid=13, exitcode=-9, comm=b"oomsafe-w1-0001")
    deaths.record(death)
    deaths.settle()

    assert (death.verdict, death.died_with) == (Verdict.CONFIRMED, 400 * MIB)


def test_what_is_remembered_is_bounded_once_it_is_judged(kernel: Kernel) -> None:
    """However many die at the same time, each is there until then; the last are kept to be shown."""
    deaths, many = kernel.deaths(), 2 * REMEMBERED
    kernel.total = many
    for pid in range(1, many + 1):
        deaths.record(Death(pid=pid, exitcode=-9))
    assert deaths.of(1) is not None
    deaths.settle()

    assert [deaths.of(pid) is not None for pid in (1, many)] == [False, True]
    assert deaths.counts == {End.OOM_CONFIRMED: many}
    assert [death.pid for death in deaths.last] == list(range(many, many - LAST, -1))


def test_what_no_death_explains_was_another_process() -> None:
    """Told once, when it can't be a child's any more: a death may take that long to be told of."""
    counted, clock = [0], [0.0]
    counter = OomCounter(lambda: Kills(counted[0], own=True), lambda: clock[0])
    counted[0] = 3
    counter.read()
    counter.settle(1)
    assert (counter.risen, counter.others()) == (True, 0)

    clock[0] = FRESH + 1
    counter.read()

    assert (counter.risen, counter.others(), counter.others()) == (False, 2, 0)
