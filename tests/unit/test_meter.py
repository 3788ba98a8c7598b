"""Every piece of work is counted once, and its growth is its own; with real memory and real processes too."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.children import Child, Line
from unit.scripted import CGROUP, MIB, Memory

from oomsafe import Guard, Policy
from oomsafe.policy.limits import Capacity
from oomsafe.policy.state import State
from oomsafe.scoreboard.board import Scoreboard
from oomsafe.scoreboard.layout import CELLS
from oomsafe.worker import guard as module

HERE = Capacity(1000 * MIB, CGROUP, workers=2)


def measuring(memory: Memory | None = None) -> Guard:
    """A guard without limits that matter."""
    return Guard(Policy(soft_limit="900MiB"), capacity=HERE, memory=memory)


def test_ended_twice_counts_once() -> None:
    """By hand and by the context manager."""
    guard = measuring()
    with guard.work("one") as work:
        work.end()
    work.end()

    assert (guard.meter.counters.work, guard.meter.clock.in_flight) == (1, 0)
    assert guard.meter.counters.routes["unmatched"][1:] == [1] + [0] * 9


def test_more_at_once_than_cells() -> None:
    """The seventeenth has no cell, and is counted; the cells come back."""
    guard = measuring()

    several = [guard.meter.begin(b"GET /%d" % number) for number in range(CELLS + 1)]
    in_flight = guard.pool().workers[0].in_flight
    for work in several:
        work.end()
    again = [guard.meter.begin(b"again") for _ in range(CELLS)]

    assert {f"GET /{number}" for number in range(CELLS)} == {piece.name for piece in in_flight}
    assert (guard.meter.counters.work, guard.meter.clock.in_flight) == (CELLS + 1, CELLS)
    assert all(work.cell >= 0 for work in again)


def test_growth_goes_to_its_route() -> None:
    """Its sum and its bucket; shrinking counts as none."""
    memory = Memory(100 * MIB)
    guard = measuring(memory)
    for route, size in (("/a", 102 * MIB), ("/a", 102 * MIB), ("/b", 90 * MIB), ("/b", 91 * MIB)):
        with guard.work("x") as work:
            work.route = route
            memory.be(size)

    assert guard.meter.counters.routes == {"/a": [2 * MIB, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0], "/b": [MIB, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0]}
    assert (guard.meter.first, guard.meter.largest) == ((2 * MIB, b"x"), (MIB, b"x"))


def test_growth_is_shared_by_what_is_in_flight() -> None:
    """Two at once have half each; what grows while nothing is in flight is the background's."""
    memory = Memory(100 * MIB)
    guard = measuring(memory)
    first, second = guard.meter.begin(b"1"), guard.meter.begin(b"2")
    memory.be(110 * MIB)
    growths = [second.grown(), second.end(), first.end()]
    memory.be(113 * MIB)
    guard.meter.measure()

    assert growths == [5 * MIB] * 3
    assert guard.meter.clock.background == 3 * MIB


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 400)), max_size=40))
def test_no_growth_is_lost(steps: list[tuple[int, int]]) -> None:
    """Law: what all pieces of work and the background grew by is what the process grew by."""
    memory = Memory(100 * MIB)
    guard = measuring(memory)
    in_flight, ended = {}, 0
    for number, size in steps:
        memory.be(size * MIB)
        if number in in_flight:
            ended += in_flight.pop(number).end()
        else:
            in_flight[number] = guard.meter.begin(b"x")
    ended += sum(work.end() for work in in_flight.values())

    assert pytest.approx(guard.meter.rss - 100 * MIB, abs=len(steps) + 1) == ended + guard.meter.clock.background
    assert guard.meter.counters.work == sum(sum(row[1:]) for row in guard.meter.counters.routes.values())


def test_real_growth_alone() -> None:
    """Real memory: a request that keeps 32 MiB has grown the process by that, within a MiB."""
    guard = measuring()
    before = guard.meter.measure()

    with guard.work("balloon") as work:
        kept = bytearray(32 * MIB)
        kept[:] = b"x" * len(kept)
        del kept[16 * MIB :]
        kept += b"y" * (16 * MIB)
        during = work.grown()
    after = guard.meter.rss

    assert 31 * MIB <= during <= 70 * MIB
    assert abs(during - (after - before)) <= 70 * MIB
    assert guard.meter.first[1] == b"balloon"


@pytest.fixture
def restless() -> Iterator[None]:
    """Threads take turns as often as the interpreter can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("restless")
@pytest.mark.parametrize("kib", [0, 64], ids=["idle", "growing"])
def test_threads_count_together(kib: int) -> None:
    """From several threads at once nothing is lost, though nothing is locked."""
    guard = measuring()
    start = threading.Barrier(4)
    kept: list[bytes] = []
    times = 500 if kib else 5000

    def run() -> None:
        start.wait()
        for _ in range(times):
            work = guard.meter.begin(b"x")
            kept.append(b"x" * (kib << 10))
            work.end()

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert (guard.meter.counters.work, guard.meter.clock.in_flight) == (4 * times, 0)
    assert sum(guard.meter.counters.routes["unmatched"][1:]) == 4 * times
    assert guard.pool().workers[0].in_flight == []
    assert len(guard.meter._cells) == CELLS


def broken() -> int:
    """A reading that fails: a detector of blocking calls does that, or a tracer."""
    raise RuntimeError("blocking call")


def test_a_reading_that_fails(caplog: pytest.LogCaptureFixture) -> None:
    """At the begin or at the end: the work is counted and over, the failure is said once, and the next look reads again."""
    memory = Memory(100 * MIB)
    guard = measuring(memory)
    plain = memory.sizes
    for _ in range(3):
        memory.sizes = broken  # type: ignore[method-assign]
        guard.meter._same_breath = 0.0
        memory.be(100 * MIB)
        work = guard.meter.begin(b"x")
        memory.be(102 * MIB)
        work.end()
    memory.sizes = plain  # type: ignore[method-assign]
    guard.meter.begin(b"y").end()

    assert (guard.meter.counters.work, guard.meter.in_flight, len(guard.meter._cells)) == (4, 0, CELLS)
    assert guard.meter.rss == 102 * MIB
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        "oomsafe failed in reading memory (the server goes on)",
    ]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError], ids=lambda kind: kind.__name__)
def test_an_end_that_is_interrupted(error: type[BaseException]) -> None:
    """A signal's handler may raise while memory is read: the work is in flight no more."""
    memory = Memory(100 * MIB)
    guard = measuring(memory)
    work = guard.meter.begin(b"x")

    def interrupted() -> int:
        raise error

    memory.sizes = interrupted  # type: ignore[method-assign]
    memory.be(101 * MIB)
    try:
        work.end()
    except (KeyboardInterrupt, SystemExit) as raised:
        assert type(raised) is error

    assert (guard.meter.counters.work, guard.meter.in_flight, len(guard.meter._cells)) == (1, 0, CELLS)


def test_a_route_that_cannot_be_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scoreboard fails: the work is over all the same, and its cell is free."""
    guard = measuring()
    monkeypatch.setattr(guard, "_admit", lambda _: broken())

    for _ in range(3):
        guard.meter.begin(b"x").end()

    assert (guard.meter.counters.work, guard.meter.in_flight, len(guard.meter._cells)) == (3, 0, CELLS)


def test_work_that_ends_while_memory_is_read() -> None:
    """A finalizer may run anywhere, also where memory is being read, and end a piece of work: no deadlock."""
    memory = Memory(MIB)
    guard = measuring(memory)
    work = guard.meter.begin(b"in a generator that nobody closed")
    plain = memory.sizes
    memory.sizes = lambda: (work.end(), plain())[1]  # type: ignore[method-assign]

    thread = threading.Thread(target=guard.meter.measure, daemon=True)
    thread.start()
    thread.join(timeout=1)

    assert not thread.is_alive()


def test_nobody_waits_for_another_thread_that_reads() -> None:
    """Two switches between threads would cost more than the reading; what has grown is seen at the next look."""
    memory = Memory(100 * MIB)
    guard = measuring(memory)
    plain, reading, go = memory.sizes, threading.Event(), threading.Event()
    guard.meter.begin(b"the first of its route").end()
    work = guard.meter.begin(b"x")
    memory.sizes = lambda: (reading.set(), go.wait(5), plain())[2]  # type: ignore[method-assign]
    thread = threading.Thread(target=guard.meter.measure)
    thread.start()
    reading.wait(5)
    memory.be(101 * MIB)

    ended = work.end(), thread.is_alive()
    go.set()
    thread.join()
    memory.sizes = plain  # type: ignore[method-assign]
    memory.be(102 * MIB)
    guard.meter.begin(b"y").end()

    assert ended == (0, True)
    assert guard.meter.rss == guard.meter.clock.last == 102 * MIB


def test_publishes(board: Scoreboard) -> None:
    """With its last figures when it ends, and at a tick."""
    slot = board.reserve()
    assert slot is not None
    slot.claim()
    memory = Memory(50 * MIB)
    guard = Guard(Policy(soft_limit="900MiB", hard_limit="950MiB", jitter=0), board=board, slot=slot, capacity=HERE, memory=memory)
    guard.ready()
    with guard.work("x"):
        memory.be(70 * MIB)

    guard.retire()

    (worker,) = board.read().workers
    figures = worker.figures
    assert (figures.rss, figures.peak_rss, figures.baseline, figures.in_flight) == (70 * MIB, 70 * MIB, 50 * MIB, 0)
    assert (figures.soft, figures.hard, worker.state, worker.counters.work) == (900 * MIB, 950 * MIB, "leaving", 1)


def taking_turns(board: Scoreboard, slot: object) -> Callable[[Line], None]:
    """A worker whose memory is told to it, and that answers whether it goes."""

    def work(line: Line) -> None:
        slot.claim()  # type: ignore[attr-defined]
        memory = Memory(50 * MIB)
        policy = Policy(soft_limit="100MiB", jitter=0, min_lifetime=0, reclaim=False, draining_oom_score_adj=0)
        guard = Guard(policy, recycle=lambda: None, board=board, slot=slot, capacity=HERE, memory=memory)  # type: ignore[arg-type]
        guard.ready()
        line.say(guard.slot.state)
        while size := line.hear():
            guard.meter.check_at = 0.0
            with guard.work("x"):
                memory.be(size * MIB)
            line.say(guard.should_recycle)

    return work


def test_one_after_the_other(board: Scoreboard) -> None:
    """max_unavailable=1: the others wait while the first drains, however much they hold, and one goes when that is gone."""
    slots = [board.reserve() for _ in range(3)]
    board.header.describe(workers=3, turns=1, limit=None, budget=None)
    with (
        Child(taking_turns(board, slots[0])) as first,
        Child(taking_turns(board, slots[1])) as second,
        Child(taking_turns(board, slots[2])) as third,
    ):
        assert [worker.hear() for worker in (first, second, third)] == [State.SERVING] * 3
        answers = []
        for worker, size in ((first, 110), (second, 101), (second, 104), (third, 106), (second, 103)):
            worker.say(size)
            answers.append(worker.hear())
        first.kill()
        third.kill()
        second.say(104)
        answers.append(second.hear())

    assert answers == [True, False, False, False, False, True]


def test_two_guards_never_go_together(board: Scoreboard, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve workers over their limit at the same moment: exactly as many go as there are turns."""
    monkeypatch.setattr(module, "CHECK_AGAIN", 0.0)
    slots = [board.reserve() for _ in range(12)]
    board.header.describe(workers=12, turns=2, limit=None, budget=None)
    with ExitStack() as ending:
        children = [ending.enter_context(Child(taking_turns(board, slot))) for slot in slots]
        for child in children:
            child.hear()
        gone = set()
        for _ in range(5):
            for child in children:
                child.say(104)
            gone |= {child.pid for child in children if child.hear()}

    assert len(gone) == 2
