"""The verdict on a run in a virtual machine: what holds, and what must not pass for it. No machine is booted."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

GOOD = {"check": "kernel kills", "got": 0, "wanted": 0, "good": True}
BAD = {"check": "kernel kills", "got": 1, "wanted": 0, "good": False}
END = {"end": "units"}


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """tools/vm/run.py, with a cache of the test's own."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "tools/vm"))
    runner = importlib.import_module("run")
    monkeypatch.setattr(runner.machine, "CACHE", tmp_path)
    return runner


class Booted:
    """A machine that says so much, and then is off, or hangs."""

    def __init__(self, said: list[dict[str, object]], hangs: bool) -> None:
        self.said, self.hangs = said, hangs

    def boot(self, words: list[str], memory: int, out: Path, seconds: float) -> list[dict[str, object]]:
        """As Machine.boot()."""
        assert (words, memory) == (["oomsafe.scenario=units"], 768)
        out.mkdir(parents=True)
        if self.hangs:
            raise TimeoutError("the machine is still up")
        return self.said


@pytest.mark.parametrize(
    ("said", "hangs", "holds"),
    [
        ([GOOD, END], False, True),
        ([GOOD, BAD, END], False, False),
        ([GOOD], False, False),  # it died before its last line
        ([], False, False),
        ([GOOD, END], True, False),
        ([END], False, False),  # a scenario that checks nothing shows nothing
    ],
)
def test_verdict(runner: ModuleType, said: list[dict[str, object]], hangs: bool, holds: bool) -> None:
    """Only a run that came to its end, and of which each check holds, does."""
    assert runner.run(Booted(said, hangs), "units") is holds


def test_a_line_that_is_cut_off_is_none(runner: ModuleType) -> None:
    """The machine died while it wrote."""
    assert list(runner.machine._objects('{"check": "a"}\n{"end": "un')) == [{"check": "a"}]


def test_each_scenario_states_its_promise(runner: ModuleType) -> None:
    """In the first line of its docstring, which the table shows."""
    for path in runner.SCENARIOS.glob("*.py"):
        promise, memory = runner.described(path)
        assert promise.endswith(".") and 256 <= memory <= 2048, path.name
