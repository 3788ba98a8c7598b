"""When a worker above its hard limit is killed from outside, and that it is that worker, and nobody else."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving import until
from unit.children import Child, Line

from oomsafe.kernel.process import sizes_of, start_time
from oomsafe.policy.backstop import PATIENCE, Over, follow, is_due, line_of
from oomsafe.policy.settings import Policy
from oomsafe.policy.state import State
from oomsafe.scoreboard.board import Scoreboard
from oomsafe.scoreboard.layout import Counters
from oomsafe.scoreboard.slot import Figures, Slot
from oomsafe.supervisor.backstop import MEASURE_EVERY, Backstop

MIB = 1 << 20
HARD = 300 * MIB
LINE = line_of(HARD)
_, STARTING, SERVING, WAITING, DRAINING, LEAVING = State

ABOVE = LINE + 1
STUCK = Over(0.0, ABOVE, ends=False, moved=False)
GOES = STUCK._replace(ends=True)
MOVED = STUCK._replace(moved=True)


@pytest.mark.parametrize(
    ("over", "held", "within", "now", "due"),
    [
        pytest.param(STUCK, ABOVE, True, 1.9, False, id="not yet"),
        pytest.param(STUCK, ABOVE, True, 2.0, True, id="for 2 s"),
        pytest.param(GOES, ABOVE, True, 2.0, False, id="it is being replaced: its work has time"),
        pytest.param(GOES, ABOVE, True, 30.0, True, id="as long as a drain has"),
        pytest.param(GOES, ABOVE, False, 2.0, True, id="it is being replaced, and the pool is above its budget"),
        pytest.param(GOES, ABOVE * 2, True, 2.0, True, id="it is being replaced, and grows on"),
        pytest.param(MOVED, ABOVE, True, 2.0, False, id="the limit came down to it"),
        pytest.param(MOVED, ABOVE * 2, True, 2.0, True, id="and it grows on"),
    ],
)
def test_when_it_is_due(over: Over, held: int, within: bool, now: float, due: bool) -> None:
    """One row a situation."""
    assert is_due(over, held, within, 30.0, now) is due


@pytest.mark.parametrize(
    ("before", "state", "held", "line_before", "after"),
    [
        pytest.param(None, SERVING, LINE, LINE, None, id="within what a worker may pass its limit by"),
        pytest.param(STUCK, SERVING, LINE, LINE, None, id="it is below again"),
        pytest.param(STUCK, STARTING, ABOVE, LINE, None, id="it boots"),
        pytest.param(None, SERVING, ABOVE, LINE, Over(9.0, ABOVE, ends=False, moved=False), id="above"),
        pytest.param(None, SERVING, ABOVE, ABOVE, Over(9.0, ABOVE, ends=False, moved=True), id="the limit has been lowered"),
        pytest.param(STUCK, SERVING, ABOVE + 5, LINE, STUCK, id="still above"),
        pytest.param(STUCK, WAITING, ABOVE, LINE, Over(9.0, ABOVE, ends=True, moved=False), id="it asks to be replaced: time begins again"),
        pytest.param(GOES, LEAVING, ABOVE, LINE, GOES, id="but once"),
    ],
)
def test_what_is_remembered(before: Over | None, state: State, held: int, line_before: int, after: Over | None) -> None:
    """One row a situation."""
    assert follow(before, state, held, LINE, line_before, 9.0) == after


@given(st.integers(1, 1 << 44))
def test_a_limit_that_the_kernel_keeps_is_never_passed(hard: int) -> None:
    """Law: up to a tenth above its limit nobody is killed, for the kernel stops a worker there."""
    assert line_of(hard) >= hard * 1.1 - 1
    assert follow(None, SERVING, line_of(hard), line_of(hard), 0, 0.0) is None


@given(
    st.lists(st.tuples(st.sampled_from(State), st.integers(0, 2 * LINE), st.floats(0.1, 3)), max_size=20),
    st.booleans(),
    st.floats(0, 60),
)
def test_nobody_is_killed_early(seen: list[tuple[State, int, float]], within: bool, grace: float) -> None:
    """Law: whatever happened before, it has been above the line without a break for PATIENCE, and did not boot."""
    over, now, above_since = None, 0.0, None
    for state, held, pause in seen:
        now += pause
        is_above = held > LINE and (state.serves or state.leaves)
        above_since = None if not is_above else now if above_since is None else above_since
        over = follow(over, state, held, LINE, LINE, now)
        if over is not None and is_due(over, held, within, grace, now):
            assert above_since is not None
            assert now - above_since >= PATIENCE


class Held:
    """A worker on a scoreboard, in a process of its own that holds so much."""

    def __init__(self, board: Scoreboard, mib: int, state: State = SERVING, hard: int | None = HARD) -> None:
        slot = board.reserve()
        assert slot is not None
        self.slot: Slot = slot
        self.child = Child(self._hold(slot, mib, state, hard))
        assert self.child.hear() == "holds"
        board.born(slot.number, slot.generation, self.child.pid)

    @staticmethod
    def _hold(slot: Slot, mib: int, state: State, hard: int | None) -> Callable[[Line], None]:
        def hold(line: Line) -> None:
            slot.claim()
            kept = [b"x" * (mib * MIB)]
            slot.publish(Figures(hard=hard, soft=HARD // 2), Counters())
            slot.set_state(state)
            line.say("holds")
            while line.hear() == "let go":
                kept.clear()
                line.say("has")

        return hold


@pytest.fixture
def held(board: Scoreboard) -> Iterator[Callable[..., Held]]:
    """held(mib): a worker that holds so much, ended after the test."""
    made: list[Held] = []

    def make(mib: int = 400, **more: object) -> Held:
        made.append(Held(board, mib, **more))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for one in made:
        one.child.__exit__()


@pytest.fixture(autouse=True)
def more(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, int] | None]:
    """What a worker holds beyond this process, of which it is a fork."""
    rss, without_files = sizes_of() or (0, 0)

    def sizes(pid: int, _: int = 0) -> tuple[int, int] | None:
        found = sizes_of(pid)
        return None if found is None else (found[0] - rss, found[1] - without_files)

    monkeypatch.setattr("oomsafe.supervisor.backstop.sizes_of", sizes)
    return sizes


POLICY = Policy(hard_limit="300MiB", soft_limit="150MiB")


def is_gone(pid: int) -> bool:
    """Whether it has died: its parent here has not reaped it."""
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0] == "Z"


def ticks(backstop: Backstop, policy: Policy = POLICY, seconds: float = 3.0) -> None:
    """So many seconds of ticks, at once."""
    now = 0.0
    while now <= seconds:
        backstop.tick(policy, lambda: HARD, lambda: True, 1000.0 + now)
        now += MEASURE_EVERY


def test_one_above_its_limit_is_killed_and_its_line_says_what_and_why(board, held, said, more) -> None:
    """The one above it; its neighbour below stays, and so does one that has refused the limit, or boots."""
    over, below, refused, boots = held(), held(10), held(hard=None), held(state=STARTING)

    ticks(Backstop(board, more))

    until(lambda: is_gone(over.child.pid), "it is gone")
    assert [is_gone(one.child.pid) for one in (below, refused, boots)] == [False] * 3
    (line,) = [line for line in said() if "is killed" in line]
    assert line.startswith(f"worker {over.child.pid} (slot 0) is killed: it holds ")
    assert " > hard limit 300 MiB for 2.0 s, and the kernel did not refuse it that; nothing was in flight. " in line
    assert board.read().totals.by_reason["killed"] == 1
    recycled = board.read().last_recycle
    assert recycled is not None
    assert recycled.line.startswith(line[:40])


def test_not_in_a_dry_run(board, held, said, more) -> None:
    """It is said and counted, once."""
    over = held()

    ticks(Backstop(board, more), Policy(hard_limit="300MiB", soft_limit="150MiB", dry_run=True), seconds=6)

    assert not is_gone(over.child.pid)
    assert len([line for line in said() if "would be killed (dry run)" in line]) == 1
    assert board.read().totals.by_reason["killed"] == 1


def test_not_one_that_is_below_again_when_it_stands_still(board, held, more) -> None:
    """Between the measurement and the signal it may have given the memory back: then it goes on."""
    over = held()
    backstop = Backstop(board, lambda pid, _: (500 * MIB, 500 * MIB) if pid == over.child.pid else more(pid))
    over.child.say("let go")
    assert over.child.hear() == "has"

    ticks(backstop)

    over.child.say("let go")
    assert over.child.hear() == "has"
    assert board.read().totals.by_reason["killed"] == 0


def test_not_where_its_server_forbids_it(board, held, more) -> None:
    """A Celery child between two tasks ends by itself."""
    over = held()
    backstop = Backstop(board, more)
    asked: list[tuple[int, bool, int]] = []
    backstop.may_kill = lambda entry, used, limit: bool(asked.append((entry.generation, used > 390 * MIB, limit)))

    ticks(backstop, seconds=2)

    assert not is_gone(over.child.pid)
    assert asked == [(over.slot.generation, True, HARD)]


def test_not_this_process(board, held, monkeypatch) -> None:
    """Whatever a slot says."""
    over = held()
    monkeypatch.setattr(board, "process", lambda *_: (os.getpid(), start_time()))
    backstop = Backstop(board, lambda *_: (500 * MIB, 500 * MIB))
    asked: list[int] = []
    backstop.may_kill = lambda entry, *_: bool(asked.append(entry.generation))
    monkeypatch.setattr("oomsafe.supervisor.backstop.kill_if", lambda pid, *_: bool(asked.append(pid)))

    ticks(backstop)

    assert asked == []
    assert not is_gone(over.child.pid)
