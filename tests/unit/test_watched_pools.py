"""Which pools begin and end, as `oomsafe watch` sees it, and what its alerts are about."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from unit.children import Child, Line

from oomsafe.cli import watched_pools as module
from oomsafe.cli.watched_pools import Gone, Pools, key_of, reading_of
from oomsafe.policy.alerts import Alert
from oomsafe.policy.ends import End
from oomsafe.scoreboard import layout
from oomsafe.scoreboard.board import Scoreboard
from oomsafe.scoreboard.view import DeathView, Recycled


@pytest.fixture
def board() -> Iterator[Scoreboard]:
    """This process's."""
    board, _ = Scoreboard.create(2, "test")
    yield board
    board.remove()
    board.close()


@pytest.fixture
def lines() -> list[str]:
    """What was said."""
    return []


def test_a_pool_begins_and_ends_in_order(lines: list[str]) -> None:
    """It is new only if it has begun since the last look."""
    pools = Pools(None, lines.append)
    assert pools.read() == ([], [])
    board, _ = Scoreboard.create(2, "test")

    (seen,) = pools.read()[1]
    (again,) = pools.read()[1]
    board.remove()
    gone = pools.read()

    assert (seen.new, again.new, Pools(None, lines.append).read()[1]) == (True, False, [])
    assert seen.key == again.key == key_of(seen.key.board, seen.view)
    assert gone == ([Gone(seen.key, True, 0)], [])
    assert pools.read() == ([], [])
    assert lines == []
    board.close()


def test_one_that_was_there_before_is_not_new(board: Scoreboard, lines: list[str]) -> None:
    """What it has counted happened before it was watched."""
    (seen,) = Pools(None, lines.append).read()[1]

    assert not seen.new


def test_a_supervisor_that_was_killed_has_left_its_file(lines: list[str]) -> None:
    """Also if another pool's start has swept that away by the next look."""
    for swept in (False, True):
        pools = Pools(None, lines.append)
        with Child(_create) as child:
            child.hear()
            (seen,) = pools.read()[1]
            child.kill()
        if swept:
            Scoreboard.create(1, "another")[0].remove()
            assert not os.path.exists(seen.key.board)
        gone, _ = pools.read()

        assert gone == [Gone(seen.key, False, 0)]
        pools.close()


def test_one_whose_file_is_removed_lives_on_and_that_is_said(board: Scoreboard, lines: list[str]) -> None:
    """It can't be watched, and it is not gone."""
    pools = Pools(None, lines.append)
    pools.read()
    os.unlink(str(board.path))

    (gone,), seen = pools.read()

    assert (gone.in_order, seen) == (True, [])
    assert lines == [f"{board.path} is gone, and supervisor {os.getpid()} lives: its pool can't be watched"]


def test_what_can_not_be_read_is_said_once(board: Scoreboard, lines: list[str]) -> None:
    """And tried again."""
    path = Path(str(board.path))
    bytes_before = path.read_bytes()
    path.write_bytes(b"no scoreboard")
    pools = Pools(None, lines.append)

    assert pools.read() == pools.read() == ([], [])
    assert lines == [f"{path} is not a scoreboard of version {layout.VERSION}"]
    path.write_bytes(bytes_before)
    assert len(pools.read()[1]) == 1


def test_too_many_are_not_watched(board: Scoreboard, lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes a descriptor."""
    monkeypatch.setattr(module, "MOST", 0)

    assert Pools(None, lines.append).read() == ([], [])
    assert lines == [f"{board.path} is not watched: 0 pools are already"]


def test_those_for_which_there_was_no_time_are_read_first_the_next_time(
    board: Scoreboard, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that is full of boards that take long to read hides none of them for good, and that is said."""
    monkeypatch.setattr(module, "PATIENCE", 0.05)
    _be_long(board)
    pools = Pools(None, lines.append)
    with Child(_create_one_that_takes_long) as child:
        folder = os.path.dirname(child.hear())
        found = [[living.view.supervisor for living in pools.read()[1]] for _ in range(4)]
    pools.close()

    assert sorted(found[0] + found[1]) == sorted([os.getpid(), child.pid])
    assert found[2:] == found[:2]
    assert lines == [f"{folder}: not all pools can be read within 0.05 s: they are watched in turn, each more rarely"]


def test_only_one_pool(board: Scoreboard, lines: list[str], tmp_path: Path) -> None:
    """By its path; until it is there, that is said once."""
    missing = Pools(str(tmp_path / "missing"), lines.append)
    assert missing.read() == missing.read() == ([], [])
    pools = Pools(str(board.path), lines.append)
    (seen,) = pools.read()[1]
    board.remove()

    assert pools.read() == ([Gone(seen.key, True, 0)], [])
    assert lines == [f"{tmp_path}/missing: No such file or directory"]


def test_descriptors_are_closed(board: Scoreboard, lines: list[str]) -> None:
    """One is open for each pool, however often one looks."""
    pools = Pools(None, lines.append)
    pools.read()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        pools.read()

    assert len(os.listdir("/proc/self/fd")) == before
    pools.close()
    assert len(os.listdir("/proc/self/fd")) == before - 1


def test_what_a_reading_has(board: Scoreboard) -> None:
    """Page cache does not count; recycles by the clock don't; the last death and the last recycle are there to be named."""
    board.header.note_death(End.OOM_CONFIRMED, "worker 5 was killed", time.time())
    board.header.admit("GET /a")
    view = board.read()
    view.totals.recycles[layout.REASONS.index("max_lifetime")] = 4
    view.totals.recycles[layout.REASONS.index("operator")] = 4
    view.totals.recycles[layout.REASONS.index("budget")] = 2
    view.totals.aborts[layout.ABORTS.index("shed")] = 3
    view = replace(view, held=100, droppable=30, last_recycle=Recycled(1.0, "worker 4 recycling"))

    reading = reading_of(view)

    assert reading.held == 70
    assert reading.counts == {
        (Alert.KERNEL_KILL, "oom_confirmed"): 1,
        (Alert.KERNEL_KILL, "oom_likely"): 0,
        (Alert.CULPRIT_FOUND, "other"): 0,
        (Alert.CULPRIT_FOUND, "GET /a"): 0,
        (Alert.SHEDDING, ""): 3,
        (Alert.RECYCLE_STORM, ""): 2,
    }
    assert (reading.last_death, reading.last_recycle) == ("worker 5 was killed", "worker 4 recycling")
    assert reading_of(replace(view, held=None, deaths=[DeathView(1.0, "exited", "x")], last_recycle=None)).held is None


def _be_long(board: Scoreboard) -> None:
    """As one that is written to all the time, or by who was killed meanwhile."""
    layout.SEQUENCE.pack_into(board.header.memory, layout.SEQUENCE_AT, 1)


def _create_one_that_takes_long(line: Line) -> None:
    board, _ = Scoreboard.create(1, "long")
    _be_long(board)
    line.say(board.path)
    time.sleep(600)


def _create(line: Line) -> None:
    board, _ = Scoreboard.create(1, "killed")
    line.say(board.path)
    time.sleep(600)
