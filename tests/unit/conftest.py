"""Each test has its own place for scoreboards, no guard, no plugin, and none of our variables."""

from __future__ import annotations

import logging
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import settings
from unit.scripted import Clock

from oomsafe import log
from oomsafe.gunicorn import hooks
from oomsafe.kernel.oom_score import read_score
from oomsafe.scoreboard import places
from oomsafe.scoreboard.board import Scoreboard
from oomsafe.worker import current, guard, meter

settings.register_profile("oomsafe", deadline=None, database=None)
settings.load_profile("oomsafe")


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    monkeypatch.setattr(places, "folders", lambda: iter([str(shelf / f"oomsafe-{os.geteuid()}")]))
    monkeypatch.setattr(log, "_said", set())
    monkeypatch.setattr(current, "_guard", None)
    monkeypatch.setattr(current, "_by_server", False)
    monkeypatch.setattr(current, "_failed", None)
    monkeypatch.setattr(hooks, "_plugin", None)
    for name in [*os.environ, "OOMSAFE_SCOREBOARD"]:
        if name.startswith("OOMSAFE_") and name != "OOMSAFE_TESTS_REQUIRE":
            # set first: only then is it put back afterwards, whatever the test has left there
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def _unlimited() -> Iterator[None]:
    """No test leaves a limit on this process's memory, or a higher score, to the tests after it."""
    before, score = resource.getrlimit(resource.RLIMIT_DATA), read_score()
    yield
    assert read_score() == score
    left = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, before)
    assert left == before


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What oomsafe has logged until now, one entry a line."""
    caplog.set_level(logging.INFO, logger="oomsafe")
    return lambda: [record.getMessage() for record in caplog.records if record.name.startswith("oomsafe")]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The guard's clock, which goes when it is told to."""
    clock = Clock()
    monkeypatch.setattr(guard, "time", SimpleNamespace(monotonic=clock))
    monkeypatch.setattr(meter, "_clock", clock)
    return clock


@pytest.fixture
def new_board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Scoreboard]]:
    """Makes scoreboards, each in a folder of its own."""
    made: list[Scoreboard] = []

    def make(workers: int = 4, server: str = "test") -> Scoreboard:
        folder = tmp_path / f"pool{len(made)}"
        with monkeypatch.context() as here:
            here.setattr(places, "folders", lambda: iter([str(folder)]))
            board, warnings = Scoreboard.create(workers, server)
        assert warnings == []
        made.append(board)
        return board

    yield make
    for board in made:
        board.remove()


@pytest.fixture
def board(new_board: Callable[..., Scoreboard]) -> Scoreboard:
    """A scoreboard for four workers."""
    return new_board()
