"""A child's part in a task: what it takes up it puts down, whenever a signal comes, and not in a fork of it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import pytest
from celery import Celery
from celery.backends.base import BaseBackend, DisabledBackend
from celery.backends.cache import CacheBackend
from celery.backends.filesystem import FilesystemBackend
from needs import need
from unit.children import in_child

from oomsafe.celery.child import GuardedWorker, drops_meta
from oomsafe.celery.notes import Notes
from oomsafe.celery.task_loop import _Contained
from oomsafe.celery.task_memory import TaskMemory
from oomsafe.errors import MemoryLimitExceeded, SoftMemoryLimitExceeded
from oomsafe.policy.settings import Policy
from oomsafe.scoreboard.board import Scoreboard
from oomsafe.supervisor.watcher import TELL
from oomsafe.worker.guard import Guard

MIB = 1 << 20


class Quiet(BaseBackend):  # type: ignore[misc]
    """Stores what it likes."""

    def _store_result(self, task_id: str, result: Any, state: str, **_: Any) -> Any:
        return result


@pytest.mark.parametrize(
    ("backend", "expected"),
    [
        pytest.param(DisabledBackend, False, id="none"),
        pytest.param(CacheBackend, False, id="memory"),
        pytest.param(FilesystemBackend, False, id="files"),
        pytest.param(Quiet, True, id="another's own"),
    ],
)
def test_backends_that_drop_what_is_added_to_a_result(backend: Any, expected: bool, tmp_path: Path) -> None:
    """Those that don't ask for a result's meta do."""
    more = {CacheBackend: {"backend": "memory"}, FilesystemBackend: {"url": f"file://{tmp_path}"}}.get(backend, {})

    assert drops_meta(backend(app=Celery(), **more)) is expected


def test_sql_keeps_what_is_a_column() -> None:
    """Whatever it is told."""
    columns = type("Sql", (Quiet,), {"task_cls": SimpleNamespace(__table__=SimpleNamespace(columns={"task_id", "status"}))})

    assert drops_meta(columns(app=Celery()))


class Billiard:
    """What is asked of billiard's worker here."""


class Child(GuardedWorker, Billiard):
    """With a task in hand whose message is still the broker's."""

    def __init__(self) -> None:
        import signal

        super().__init__()
        self.board = Scoreboard.private()
        self._slot = self.board.reserve()
        assert self._slot is not None
        self._slot.claim()
        self._guard = Guard(Policy(soft_limit="1GiB"))
        self._notes = Notes(None, os.getpid())
        self._is_late = {"proj.late": True}
        signal.signal(TELL, self._warned)

    def run(self, function: Any, growth: int | None = None) -> Any:
        """As billiard does."""
        return _Contained(function, "proj.late", self, 7, "an-id", growth)("proj.late", "an-id", {})

    def told(self) -> None:
        """MainProcess finds the task over its soft limit, and says so."""
        (work,) = self.board.in_hand()
        self.board.tell_of_limit(work.number, work.generation, work.ticket, 100 * MIB, 60 * MIB)
        os.kill(os.getpid(), TELL)


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where what is noted of tasks lies."""
    monkeypatch.setenv("OOMSAFE_STATE", str(tmp_path / "state"))
    return tmp_path / "state"


def noted(notes: Path) -> int:
    """How many notes there are."""
    return sum(path.is_file() for path in notes.rglob("*"))


def at_the_call_of(name: str, act: Any) -> Any:
    """Do something at the first call of a function of this name: where a signal may come as well as anywhere."""

    def trace(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_name == name:
            sys.settrace(None)
            act()

    return trace


@pytest.mark.parametrize("where", ["put_down", "_put_down"])
def test_told_behind_its_last_line(notes: Path, where: str) -> None:
    """What it had in hand is put down and its note is gone, so nothing is held against it, nor against the next task."""

    def run() -> tuple[Any, list[Any], int, int]:
        child = Child()
        seen = []

        def task(*_: Any) -> str:
            seen.append(noted(notes))
            sys.settrace(at_the_call_of(where, child.told))
            return "its result"

        try:
            result = child.run(task)
        except SoftMemoryLimitExceeded as error:
            result = type(error).__name__
        return result, child.board.in_hand(), seen[0], noted(notes)

    result, in_hand, meanwhile, after = in_child(run)

    assert (in_hand, meanwhile, after) == ([], 1, 0)
    assert result == {"put_down": "SoftMemoryLimitExceeded", "_put_down": "its result"}[where]


def test_told_while_it_is_taken_up(notes: Path) -> None:
    """So its code does not run; nothing stays behind."""

    def run() -> tuple[str, list[Any], int]:
        child = Child()
        slot = child._slot
        assert slot is not None
        take_up = slot.take_up

        def told_at_once(*args: Any) -> None:
            take_up(*args)
            child.told()

        slot.take_up = told_at_once  # type: ignore[method-assign]
        with pytest.raises(SoftMemoryLimitExceeded):
            child.run(lambda *_: "its result")
        return "told", child.board.in_hand(), noted(notes)

    assert in_child(run) == ("told", [], 0)


@pytest.mark.parametrize(
    ("where", "becomes"), [("confine", SoftMemoryLimitExceeded), ("_runs_out", MemoryLimitExceeded), ("grant", MemoryLimitExceeded)]
)
def test_told_in_our_own_code(notes: Path, caplog: pytest.LogCaptureFixture, where: str, becomes: type[Exception]) -> None:
    """While it is measured at an earlier signal, or just as it is refused memory: it ends with one of the two, which is not our failure."""
    need(sys.platform.startswith("linux"), "only Linux enforces RLIMIT_DATA")

    def run() -> tuple[str, list[Any], list[str]]:
        child = Child()
        assert child._guard is not None
        child._memory = TaskMemory(child._guard, child._runs_out)

        def task(*_: Any) -> str:
            sys.settrace(at_the_call_of(where, child.told))
            if where == "confine":
                os.kill(os.getpid(), TELL)
            else:
                raise MemoryError
            return "its result"

        try:
            result = child.run(task, 100 * MIB)
        except Exception as error:
            result = type(error).__name__
        return result, child.board.in_hand(), [line for line in caplog.messages if "oomsafe failed" in line]

    assert in_child(run) == (becomes.__name__, [], [])


def test_a_fork_of_a_task_puts_nothing_down(notes: Path) -> None:
    """It may come back the same way, but what the task has in hand is its parent's, and so is the note."""

    def run() -> tuple[int, int]:
        child = Child()
        seen = []

        def task(*_: Any) -> None:
            pid = os.fork()
            if not pid:
                raise SystemExit
            os.waitpid(pid, 0)
            seen.append((len(child.board.in_hand()), noted(notes)))

        me = os.getpid()
        try:
            child.run(task)
        except SystemExit:
            if os.getpid() != me:
                os._exit(0)
        return seen[0]

    assert in_child(run) == (1, 1)
