"""One pool's shared memory, with real processes that write to it and die."""

from __future__ import annotations

import errno
import fcntl
import math
import os
import resource
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.children import Child, Line, in_child
from unit.retiring import several

from oomsafe.kernel.process import start_time
from oomsafe.policy.retention import judge
from oomsafe.policy.state import State
from oomsafe.policy.stock import Parts
from oomsafe.scoreboard import board as scoreboard
from oomsafe.scoreboard import layout, tenants, view
from oomsafe.scoreboard.board import Scoreboard
from oomsafe.scoreboard.layout import Counters
from oomsafe.scoreboard.slot import Figures, Slot, comm_of

NewBoard = Callable[..., Scoreboard]


def taken(board: Scoreboard) -> Slot:
    """A reserved slot."""
    slot = board.reserve()
    assert slot is not None
    return slot


def counting(work: int, **routes: int) -> Counters:
    """Counters with so much work, and so much growth by route."""
    counters = Counters(work=work)
    for name, growth in routes.items():
        counters.route(name)[:] = [growth, *[work] * layout.BUCKETS]
    return counters


def note(slot: Slot, name: bytes, began: float, rss: int) -> None:
    """Something is in flight, in the first cell."""
    _, write, cells = slot.cells()
    write(cells[-1], min(len(name), layout.CELL_NAME), began, rss, name, 1)


def test_a_private_board_is_nobody_else_s() -> None:
    """No file, and as many slots as were asked for."""
    board = Scoreboard.private()

    slot = taken(board)
    slot.claim()
    slot.take_up(7, 100)

    assert board.path is None
    assert board.reserve() is None
    assert [(work.ticket, work.held, work.pid) for work in board.in_hand()] == [(7, 100, os.getpid())]
    board.close()


def test_a_worker_is_seen(board: Scoreboard) -> None:
    """From its claim on, with what it published and what it has in flight."""
    slot = taken(board)
    assert board.read().workers == []
    board.header.describe(workers=4, turns=2, limit=1 << 30, budget=None)

    slot.claim()
    note(slot, b"GET /a\x1b[2J", time.monotonic() - 100, 77)
    slot.publish(Figures(rss=100, oom_score_adj=-1), counting(3, home=9))

    pool = board.read()
    (worker,) = pool.workers
    assert (worker.pid, worker.started, worker.state, worker.generation) == (os.getpid(), start_time(), "starting", 1)
    assert Figures(rss=100, oom_score_adj=-1) == worker.figures
    assert [(piece.name, piece.rss) for piece in worker.in_flight] == [("GET /a?[2J", 77)]
    assert time.time() - worker.in_flight[0].began == pytest.approx(100, abs=2)
    assert (pool.server, pool.supervisor, pool.workers_wanted, pool.turns) == ("test", os.getpid(), 4, 2)
    assert (pool.limit, pool.budget, pool.totals.work) == (1 << 30, None, 3)


def test_nothing_is_in_flight_any_more(board: Scoreboard) -> None:
    """An ended piece of work leaves its cell."""
    slot = taken(board)
    slot.claim()
    note(slot, b"x" * 300, 1.0, 1)
    (piece,) = board.read().workers[0].in_flight
    assert len(piece.name) == 96

    memory, _, cells = slot.cells()
    memory[cells[-1] + layout.IN_USE] = 0

    assert board.read().workers[0].in_flight == []


def test_what_work_in_flight_began_with(board: Scoreboard) -> None:
    """For each piece of it; not for what has ended. A negative figure is one that is not known."""
    slot = taken(board)
    slot.claim()
    assert board.began_with(slot.number) == []
    memory, write, cells = slot.cells()
    for cell, rss in zip(cells, (70, -1, 90, -(1 << 62), 80), strict=False):
        write(cell, 1, 1.0, rss, b"/", 1)
    memory[cells[2] + layout.IN_USE] = 0

    assert sorted(board.began_with(slot.number), key=str) == [70, 80, None, None]


@given(st.lists(st.tuples(st.sampled_from(["reserve", "publish", "release", "again"]), st.integers(0, 40)), max_size=40))
def test_totals_only_rise(steps: list[tuple[str, int]]) -> None:
    """Law: over any interleaving of workers that come, count, and go, no count of the pool is ever lost or goes back."""
    board = Scoreboard.private(4)
    working: dict[int, tuple[Slot, Counters]] = {}
    expected = before = 0

    for step, number in steps:
        if step == "reserve" and (slot := board.reserve()):
            slot.claim()
            working[slot.number] = (slot, Counters())
        elif working:
            slot, counters = working[sorted(working)[number % len(working)]]
            if step == "publish":
                counters.work += number
                counters.route(f"/{number}")[0] += number
                expected += number
                slot.publish(Figures(), counters)
            elif step == "release":
                board.release(slot.number)
                board.release(slot.number)
                del working[slot.number]

        totals = board.read().totals
        assert expected == totals.work == sum(row[0] for row in totals.routes.values())
        assert totals.work >= before
        before = totals.work

    board.close()


def test_no_route_goes_back_when_the_table_is_full(board: Scoreboard) -> None:
    """A route's count that was shown once never falls: a counter that falls is a restart to Prometheus."""
    first, second = taken(board), taken(board)
    seen: list[dict[str, int]] = []

    def look() -> None:
        seen.append({name: row[0] for name, row in board.read().totals.routes.items()})

    for slot, letter in ((first, "a"), (second, "b")):
        slot.claim()
        names = [board.header.admit(f"{letter}{number}") for number in range(20)]
        slot.publish(Figures(), counting(1, **{str(name): names.count(name) for name in names}))
        look()
    board.release(second.number)
    look()
    board.release(first.number)
    look()

    for earlier, later in pairwise(seen):
        assert {name: count for name, count in earlier.items() if later.get(name, 0) < count} == {}
    assert len(seen[-1]) == layout.ROUTES
    assert sum(seen[-1].values()) == 40


def test_a_route_is_admitted_once_for_the_whole_pool(board: Scoreboard) -> None:
    """First come, first served; asking again changes nothing; while another process holds the lock, come again."""
    slot = taken(board)

    def hold(line: Line) -> None:
        slot.claim()
        assert board.try_lock()
        line.say("held")
        line.hear()

    assert [board.header.admit("/a"), board.header.admit("/a"), board.header.admit("")] == ["/a", "/a", "unmatched"]
    with Child(hold) as child:
        assert child.hear() == "held"
        assert (board.header.admit("/a"), board.header.admit("/new")) == ("/a", None)
        child.kill()
    assert board.header.admit("/new") == "/new"
    assert [board.header.admit(f"/{number}") for number in range(100)][-1] == "other"


def test_no_torn_reads(board: Scoreboard) -> None:
    """While a worker publishes as fast as it can, whoever reads sees figures and counters of one moment."""
    slot = taken(board)

    def publish(line: Line) -> None:
        slot.claim()
        number = 0
        while True:
            number += 1
            slot.publish(Figures(*[number] * 7, 1, number), counting(number, a=number, b=number))
            if number == 1:
                line.say("began")

    with Child(publish) as child:
        assert child.hear() == "began"
        seen = set()
        began = time.monotonic()
        # on a busy machine the two may hardly ever run at once
        while time.monotonic() < began + (1 if len(seen) > 5 else 30):
            (worker,) = board.read().workers
            figures, counters = worker.figures, worker.counters
            numbers = {figures.rss, figures.uss, figures.in_flight, counters.work, *counters.routes["a"], *counters.routes["b"]}
            assert len(numbers) == 1
            seen |= numbers

    assert len(seen) > 5


def test_a_killed_worker_leaves_what_it_had(board: Scoreboard) -> None:
    """A SIGKILL in the middle of a publication: its last counts are in the totals, and its work in flight can be read."""
    slot = taken(board)

    def work(line: Line) -> None:
        slot.claim()
        slot.publish(Figures(rss=5), counting(7))
        note(slot, b"POST /reports", 1.0, 5)
        at = layout.HEADER_SIZE + slot.number * layout.SLOT_SIZE + layout.SLOT_SEQUENCE_AT
        layout.SEQUENCE.pack_into(board._memory, at, 3)
        line.say("published")
        line.hear()

    with Child(work) as child:
        assert child.hear() == "published"
        assert [piece.name for piece in board.read().workers[0].in_flight] == ["POST /reports"]
        child.kill()
        dead = board.read()
        cells = board._memory[layout.HEADER_SIZE : layout.HEADER_SIZE + layout.SLOT_SIZE].tobytes()
        board.release(slot.number)

    assert (dead.workers, dead.totals.work) == ([], 7)
    assert b"POST /reports" in cells
    assert board.read().totals.work == 7


def test_slots_of_the_dead_are_used_again(board: Scoreboard) -> None:
    """A supervisor that missed a death still has room, and loses no counts; until it must, it finds there what the dead had in hand."""
    slot = taken(board)

    def work(line: Line) -> None:
        slot.claim()
        slot.publish(Figures(), counting(2))
        slot.take_up(77, 99)
        line.say("done")
        line.hear()

    with Child(work) as child:
        child.hear()
        child.kill()
    others = [taken(board) for _ in range(board.slots - 1)]
    assert board.hand(slot.number, slot.generation) == (77, 99)
    again = taken(board)

    assert slot.number not in {other.number for other in others}
    assert (slot.number, board.slots + 1) == (again.number, again.generation)
    assert board.read().totals.work == 2


def test_it_grows(board: Scoreboard) -> None:
    """Twice as many slots when all are taken by the living: for workers that are there already, for new ones, and for readers."""
    first = taken(board)
    reader = Scoreboard.open(str(board.path))
    before = [taken(board) for _ in range(board.slots - 1)]

    def see(line: Line) -> None:
        line.say("forked before it grows")
        line.hear()
        line.say(str(board.others(first)[0] + len(board.read().workers)))

    with Child(see) as child:
        child.hear()
        new = taken(board)
        for slot in (first, *before, new):
            slot.claim()
        child.say("it has grown")

        assert (new.number, new.generation, board.slots) == (32, 33, 64)
        assert child.hear() == str(32 + 33)
    assert len(reader.read().workers) == len(board.read().workers) == 33
    joined = Scoreboard.join(str(board.path))
    joined.slot(new.number, new.generation).take_up(7, 100)
    assert [(work.number, work.ticket) for work in board.in_hand()] == [(32, 7)]
    reader.close()
    joined.close()


def test_where_there_is_no_memory_it_does_not_grow(board: Scoreboard, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor beyond what is mapped."""
    for _ in range(board.slots):
        taken(board)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(scoreboard.backing, "enlarge", full)
        assert board.reserve() is None
    assert board.has_room
    while board.has_room:
        taken(board)
    assert board.reserve() is None
    assert board.slots == layout.SLOTS_MAX


def test_no_file_may_be_so_long() -> None:
    """RLIMIT_FSIZE: then there are as many slots as at first."""

    def make() -> tuple[list[str], str | None, int]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        board, warnings = Scoreboard.create(2, "test")
        made = sum(board.reserve() is not None for _ in range(40))
        board.remove()
        return warnings, board.path, made

    assert in_child(make) == ([], None, 32)


def test_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """When all slots are taken by the living there is none; one that was never claimed is free after a minute."""
    board = Scoreboard.private(3)
    slots = [taken(board) for _ in range(board.slots)]
    assert board.reserve() is None

    later = time.time() + tenants.RESERVED_FOR + 1
    monkeypatch.setattr(tenants.time, "time", lambda: later)

    assert board.reserve() is not None
    assert len({slot.number for slot in slots}) == board.slots


@pytest.mark.parametrize(("workers", "expected"), [(1, 32), (12, 32), (100, 208)])
def test_room_for_replacements(new_board: NewBoard, workers: int, expected: int) -> None:
    """Twice the workers and some more."""
    assert expected == new_board(workers).slots


@given(st.lists(st.tuples(st.sampled_from(["reserve", "release", *State]), st.integers(0, 4)), max_size=30))
def test_marks_tell_whether_anything_has_changed(steps: list[tuple[str, int]]) -> None:
    """Law: the same marks are the same workers in the same states; and they tell whether all of them serve.

    A worker may write to its slot after it was released.
    """
    board = Scoreboard.private(5)
    slots: dict[int, Slot] = {}
    writers: dict[int, Slot] = {}
    found: dict[tuple[int, ...], dict[int, tuple[int, State]]] = {}
    for step, number in steps:
        if step == "reserve" and (slot := board.reserve()) is not None:
            slots[slot.number] = writers[slot.number] = slot
        elif step == "release" and number in slots:
            board.release(number, slots.pop(number).generation)
        elif isinstance(step, State) and number in writers:
            writers[number].set_state(step)
        states = {number: (slot.generation, slot.state) for number, slot in slots.items()}

        assert found.setdefault(board.marks(), states) == states
        assert board.all_serve(board.marks()) is (bool(states) and all(state is State.SERVING for _, state in states.values()))
    board.close()


@pytest.mark.parametrize("byte", [b"\0", b"\x63", b"\xff"])
def test_marks_of_what_no_worker_should_write(board: Scoreboard, byte: bytes) -> None:
    """A state that is none does not serve; what is written to a slot that nobody has does not keep the others from it."""
    first, second = taken(board), taken(board)
    first.set_state(State.SERVING)
    second.set_state(State.SERVING)
    third = taken(board)
    board.release(third.number, third.generation)
    board._memory[layout.slot_at(third.number) : layout.slot_at(third.number) + 4] = byte * 4
    with_garbage_elsewhere = board.all_serve(board.marks())
    board._memory[layout.slot_at(second.number) : layout.slot_at(second.number) + 4] = byte * 4

    assert (with_garbage_elsewhere, board.all_serve(board.marks())) == (True, False)


def test_who_has_published_nothing_for_a_while(board: Scoreboard) -> None:
    """In any slot, also where others before it are free."""
    slots = [taken(board) for _ in range(4)]
    for slot in slots[1:]:
        slot.claim()
    board.release(slots[0].number, slots[0].generation)
    slots[2].publish(Figures(rss=1), Counters())

    who = (os.getpid(), start_time())
    assert board.silent(time.time() - 60) == [(slots[1].number, *who), (slots[3].number, *who)]
    assert board.silent(time.time() + 60) == [(slot.number, *who) for slot in slots[1:]]
    for slot in slots[1:]:
        board.release(slot.number, slot.generation)
    assert (board.silent(time.time() + 60), board.all_serve(board.marks())) == ([], False)


def test_others(board: Scoreboard) -> None:
    """Who is away: the living that drain, start or leave, this worker not counted."""
    mine, starting, serving, gone = (taken(board) for _ in range(4))
    mine.set_state(State.DRAINING)
    serving.set_state(State.SERVING)
    board.header.describe(workers=4, turns=3, limit=None, budget=None)

    def drain(line: Line) -> None:
        gone.claim()
        gone.set_state(State.DRAINING)
        line.say("drains")
        line.hear()

    with Child(drain) as child:
        child.hear()
        away = board.others(mine)
        child.kill()

    assert away == (1, 1, 1, 3)
    assert board.others(mine) == (1, 1, 0, 3)
    assert starting.state == State.STARTING


def test_one_lock_for_all_processes(board: Scoreboard) -> None:
    """While one process takes its turn no other can, and a SIGKILL gives the turn back."""

    def hold(line: Line) -> None:
        line.say(board.try_lock())
        line.hear()
        board.unlock()
        line.say("unlocked")
        line.hear()

    with Child(hold) as first:
        assert first.hear() is True
        assert board.try_lock() is False
        first.say("unlock")
        assert first.hear() == "unlocked"
        assert board.try_lock() is True
        board.unlock()

    with Child(hold) as second:
        assert second.hear() is True
        second.kill()
        assert board.try_lock() is True


def _others_get_it(board: Scoreboard) -> bool:
    return bool(in_child(board.try_lock))


def _in_thread(function: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def test_the_lock_is_kept_through_what_is_done_inside(board: Scoreboard) -> None:
    """Record locks are the process's: neither a nested call nor another thread's may let go of it."""
    assert board.try_lock()

    assert board.header.first_to_refuse(layout.REFUSES_SOFT)
    after_a_nested_call = _others_get_it(board)
    routes = [_in_thread(lambda: board.header.admit("/a")), board.header.admit("/b")]
    after_another_thread = _others_get_it(board)
    board.unlock()

    assert (after_a_nested_call, after_another_thread, _others_get_it(board)) == (False, False, True)
    assert routes == [None, "/b"]
    assert _in_thread(lambda: board.header.admit("/a")) == "/a"


def test_only_its_owner_releases_the_lock(board: Scoreboard) -> None:
    """A thread that does not have it can't take it, nor give it back."""
    assert board.try_lock()

    assert not _in_thread(board.try_lock)
    with pytest.raises(RuntimeError, match="does not hold it"):
        _in_thread(board.unlock)
    assert not _others_get_it(board)
    board.unlock()
    with pytest.raises(RuntimeError, match="does not hold it"):
        board.unlock()


def test_a_fork_has_no_lock_of_its_parents(board: Scoreboard) -> None:
    """Not even where it was forked inside: it may take it as every other process, and may not let go of its parent's."""
    assert board.try_lock()

    def child() -> tuple[bool, bool]:
        taken = board.try_lock()
        try:
            board.unlock()
        except RuntimeError:
            return taken, True
        return taken, False

    assert in_child(child) == (False, True)
    assert not _others_get_it(board)
    board.unlock()
    assert in_child(lambda: (board.try_lock(), board.unlock())) == (True, None)  # type: ignore[func-returns-value]


def test_a_descriptor_that_the_application_closes_is_opened_anew(board: Scoreboard, tmp_path: Path, said: Callable[[], list[str]]) -> None:
    """os.closerange, or a library that daemonises: the lock goes with it, and can be had again; another file's lock is let alone."""
    other = tmp_path / "other"
    other.touch()

    def work(line: Line) -> None:
        assert board.try_lock()
        theirs = os.open(other, os.O_RDWR)
        os.dup2(theirs, board._file._fd)
        fcntl.lockf(theirs, fcntl.LOCK_EX)
        board.unlock()
        line.say(board.try_lock())
        line.hear()

    with Child(work) as child:
        assert child.hear() is True
        assert not board.try_lock()
        with other.open("r+") as file, pytest.raises(OSError, match="temporarily unavailable"):
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert said() == []


def test_a_lock_that_can_not_be_had_again_is_said_to_be_lost(said: Callable[[], list[str]]) -> None:
    """Nor does anybody wait for it: routes count as other, and no turn is taken."""
    board = Scoreboard.private()

    def work() -> tuple[bool, bool, str | None, list[str]]:
        os.close(board._file._fd)
        return board.try_lock(), board.try_lock(), board.header.admit("/a"), said()

    *answers, lines = in_child(work)

    assert answers == [False, False, "other"]
    assert len(lines) == 1
    assert "has lost the pool's lock" in lines[0]
    board.close()


def test_the_supervisor_holds_its_file_again(board: Scoreboard, said: Callable[[], list[str]]) -> None:
    """What the application has closed in the supervisor is opened anew, else it is said."""
    assert board.path is not None

    def mend() -> tuple[bool, bool, list[str]]:
        board._owner = os.getpid()
        for kept in filter(None, (board._file, board._named)):
            os.close(kept._fd)
        with open(str(board.path), "rb") as file:
            before = _can_lock(file.fileno())
        board.mend()
        board.mend()
        with open(str(board.path), "rb") as file:
            return before, _can_lock(file.fileno()), said()

    fcntl.flock(board._file._fd, fcntl.LOCK_UN)
    before, after, lines = in_child(mend)

    assert (before, after) == (True, False)
    assert len(lines) == (board._named is not None)


def test_a_supervisor_that_has_lost_its_memory_does_not_enlarge_the_file_that_names_it(board: Scoreboard) -> None:
    """Then there are no more slots: the new worker is not seen."""
    if board._named is None:
        pytest.skip("the file is the memory")
    size = os.stat(str(board.path)).st_size

    def lose() -> tuple[bool, int]:
        board._owner = os.getpid()
        assert board._named is not None
        os.close(board._named._fd)
        board.mend()
        for _ in range(board.slots):
            taken(board)
        return board.reserve() is None, os.stat(str(board.path)).st_size

    assert in_child(lose) == (True, size)


def _can_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    fcntl.flock(fd, fcntl.LOCK_UN)
    return True


def _spoil(board: Scoreboard, byte: bytes) -> None:
    """As a worker that has been taken over: all that it can reach is this byte."""
    first = layout.IDENTITY.size
    board._memory[first:] = byte * (len(board._memory) - first)


@pytest.mark.parametrize("byte", [b"\xff", b"\0", b"\x7f"])
def test_what_a_worker_writes_takes_no_slot(board: Scoreboard, byte: bytes) -> None:
    """Slots are given and freed by what the supervisor itself knows: counters, states, generations and sequences may be anything."""
    slots = [taken(board) for _ in range(board.slots)]
    for slot in slots:
        slot.claim()
    _spoil(board, byte)

    board.header.describe(workers=2, turns=1, limit=None, budget=None)
    board.header.decided_at = 1.0
    assert len(board.roll()) in (0, board.slots)
    board.read()
    board.in_hand()
    for slot in slots:
        board.release(slot.number, slot.generation)

    again = [taken(board) for _ in range(board.slots)]
    assert [slot.generation for slot in again] == list(range(board.slots + 1, 2 * board.slots + 1))
    assert (taken(board).number, board.slots) == (32, 64)
    assert Scoreboard.snapshot(str(board.path)) is not None


def test_totals_stay_at_their_end(board: Scoreboard) -> None:
    """A counter at its end frees its slot as any other, and the totals go back for nobody."""
    for _ in range(3):
        slot = taken(board)
        slot.claim()
        slot.publish(Figures(), counting((1 << 64) - 1, a=(1 << 64) - 1))
        board.release(slot.number, slot.generation)

    totals = board.read().totals
    assert totals.work == totals.routes["a"][0] == (1 << 64) - 1
    assert board.roll() == []


def test_the_supervisor_acts_only_on_what_it_has_started(board: Scoreboard) -> None:
    """A worker that writes another process's pid into its slot has nothing done to that one."""
    slot, victim = taken(board), os.getppid()
    at = layout.HEADER_SIZE + slot.number * layout.SLOT_SIZE

    with Child(lambda line: line.hear()) as child:
        layout.write(board._memory, at + layout.STARTED_AT, layout.WORD, start_time(victim) or 0)
        layout.write(board._memory, at + layout.PID_AT, layout.WORD, victim)
        slot.take_up(7, 100)
        claimed = board.processes, board.in_hand(), board.read().workers
        board.born(slot.number, slot.generation, victim)
        not_ours = board.processes
        board.born(slot.number, slot.generation + 1, child.pid)
        another_s = board.processes
        board.born(slot.number, slot.generation, child.pid)

        assert (claimed, not_ours, another_s) == (([], [], []), [], [])
        assert board.processes == [(child.pid, start_time(child.pid))]
        assert [work.pid for work in board.in_hand()] == [worker.pid for worker in board.read().workers] == [child.pid]


def test_a_read_ends_in_time(board: Scoreboard) -> None:
    """Forty writers that seem to be in the middle for ever, and a supervisor: all of them together are waited for once."""
    for _ in range(board.slots):
        taken(board).claim()
    for number in range(board.slots):
        layout.write(board._memory, layout.HEADER_SIZE + number * layout.SLOT_SIZE + layout.SLOT_SEQUENCE_AT, layout.SEQUENCE, 1)
    layout.write(board._memory, layout.SEQUENCE_AT, layout.SEQUENCE, 1)
    waited: list[float] = []

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(view, "time", SimpleNamespace(sleep=waited.append, monotonic=lambda: sum(waited), time=time.time))
        workers = board.read().workers

    assert len(workers) == board.slots
    assert sum(waited) < view.PATIENCE * 1.01


def test_first_to_refuse(board: Scoreboard) -> None:
    """One worker of the pool says it of each limit, until the supervisor describes the pool anew."""
    soft, hard = layout.REFUSES_SOFT, layout.REFUSES_HARD
    answers = [board.header.first_to_refuse(which) for which in (soft, soft, hard, hard)]
    board.header.settled = 3
    board.header.describe(workers=1, turns=1, limit=None, budget=None)

    assert [*answers, board.header.first_to_refuse(soft)] == [True, False, True, False, True]
    assert board.header.settled == 0


@given(st.integers(1, 1 << 22), st.integers(0, 9999), st.integers(1, 1 << 30))
def test_names_in_the_kernels_report(supervisor: int, number: int, generation: int) -> None:
    """Law: at most 15 printable bytes, with the slot's number, another for the next worker in that slot."""
    slot, following = _slot(number, generation), _slot(number, generation + 1)

    name = comm_of(supervisor, slot)

    assert len(name) <= 15
    assert name.startswith(f"oomsafe-w{number}")
    assert name.isascii()
    if number < 10:
        assert name != comm_of(supervisor, following)


def _slot(number: int, generation: int) -> Slot:
    return Slot(memoryview(bytearray(layout.SLOT_SIZE)), 0, number, generation)


def test_culprits_are_counted_by_route(board: Scoreboard) -> None:
    """A known route has its own count, from 0 on; a path, or a route too many, is counted as other."""
    board.header.admit("GET /a")
    board.header.admit("GET /b")
    board.header.note_recycle("without")
    for culprit in ("GET /a", "GET /paths/*", "GET /a", "x" * 100):
        board.header.note_recycle("with", culprit)

    assert board.read().culprits == {"other": 2, "GET /a": 2, "GET /b": 0}


def test_a_reader_sees_which_limits_are_refused(board: Scoreboard) -> None:
    """By the names of the settings; other bits of that field are no limits."""
    for which in (layout.REFUSES_SOFT, layout.REFUSES_LIFETIME, layout.STAYS_ABOVE, layout.SAID_ROOM):
        board.header.first_to_refuse(which)

    assert board.read().refused == ["soft_limit", "max_lifetime"]


def test_an_end_in_order_can_be_told_from_a_kill(board: Scoreboard) -> None:
    """By a process that has the scoreboard open, when its file is gone."""
    board.header.droppable = 5
    with Scoreboard.open(str(board.path)) as opened:
        before = opened.read()
        board.remove()
        after = opened.read()

    assert (before.ended, before.droppable) == (None, 5)
    assert after.ended == pytest.approx(time.time(), abs=60)


def test_the_last_retirements_are_kept() -> None:
    """The latest first, sixteen at most, whole; what can't be known stays None."""
    board = Scoreboard.private()
    parts = Parts(python_live=5, python_kept=None, malloc_live=7, files=1)
    alike = [replace(one, parts=parts, points=one.points[:3]) for one in several(20)]
    for one in alike:
        board.header.note_retirement(one)

    assert board.read().retired == alike[:3:-1]


NUMBERS = st.sampled_from([0, 1, -1, layout.LARGEST, -layout.LARGEST]) | st.integers(-(1 << 40), 1 << 40)


@given(
    at=st.floats(width=64), served=st.floats(width=64), counts=st.lists(st.integers(0, layout.COUNT_MAX), min_size=3, max_size=3),
    reason=st.integers(0, 9), numbers=st.lists(NUMBERS, min_size=33, max_size=33),
)  # fmt: skip
def test_hostile_retirements_are_bounded(at: float, served: float, counts: list[int], reason: int, numbers: list[int]) -> None:
    """Any worker may write there: whatever it is, it can be shown, judged and served as metrics."""
    pid, generation, work = counts
    raw = layout.RETIRED.pack(at, pid, 0, reason, generation, work, served, *numbers) * layout.RETIRED_KEPT
    board = Scoreboard.private()
    board.header.memory[layout.RETIRED_AT : layout.RETIRED_AT + len(raw)] = raw

    retired = board.read().retired

    assert len(retired) <= layout.RETIRED_KEPT
    found = judge(retired)
    assert found.why.isprintable()
    assert all(math.isfinite(number) for one in retired for number in (one.at, one.served, one.parts.total, one.work))
