"""Workers whose supervisor knows nothing of us, as real processes: what they know of each other."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from oomsafe.scoreboard import places
from oomsafe.worker.siblings import Siblings

#: Says what it finds when it is asked, and ends when nobody asks any more.
CHILD = """
import sys
from oomsafe.scoreboard import places
from oomsafe.worker.siblings import Siblings
places.SHM = sys.argv[1]
siblings = Siblings(None)
print("booted", flush=True)
for line in sys.stdin:
    print(eval(line), flush=True)
"""


class Child:
    """A worker of this process, which meets the others in a folder of this test's."""

    def __init__(self, folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, expression: str | None = None) -> str:
        """What it finds; without one, that it has booted."""
        assert self.process.stdin is not None and self.process.stdout is not None
        if expression is not None:
            print(expression, file=self.process.stdin, flush=True)
        return self.process.stdout.readline().strip()

    def end(self) -> None:
        """It ends, at once: with all that it holds."""
        self.process.communicate()


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[list[Child]]:
    """Two of them, booted."""
    children = [Child(tmp_path), Child(tmp_path)]
    assert [child.ask() for child in children] == ["booted", "booted"]
    yield children
    for child in children:
        if child.process.poll() is None:
            child.end()


def test_who_does_not_know_how_many_there_should_be_counts(pair: list[Child]) -> None:
    """Those that have booted; none is ever missing, and they take turns."""
    first, second = pair

    assert first.ask("siblings.counted, siblings.away()") == "(2, None)"
    assert first.ask("siblings.take_turn()") == "True"
    assert second.ask("siblings.take_turn()") == "False"
    first.end()
    assert second.ask("siblings.take_turn()") == "True"
    assert second.ask("siblings.counted") == "1"


def test_something_is_said_once(pair: list[Child]) -> None:
    """Also when the one that has said it is gone; what has not been said may be."""
    first, second = pair

    assert first.ask("siblings.first_to_say(b'celery')") == "True"
    first.end()
    assert second.ask("siblings.first_to_say(b'celery')") == "False"
    assert second.ask("siblings.first_to_say(b'cel')") == "True"


def test_what_they_meet_in_is_swept_by_nobody_while_one_lives(pair: list[Child], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever shares the folder and not the pids takes their parent for gone."""
    monkeypatch.setattr(places, "is_alive", lambda *_: False)
    folder = os.open(next(tmp_path.iterdir()), os.O_RDONLY)

    places.sweep(folder)
    held = list(tmp_path.rglob(f"{os.getpid()}-*.turn"))
    for child in pair:
        child.end()
    places.sweep(folder)

    os.close(folder)
    assert len(held) == 1
    assert not list(tmp_path.rglob(f"{os.getpid()}-*.turn"))


def test_who_knows_how_many_there_should_be_counts_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has been told."""
    monkeypatch.setattr(places, "SHM", str(tmp_path))

    assert Siblings(2).counted is None
