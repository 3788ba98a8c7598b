"""This process's guard, where no server's adapter makes one: tried again when it could not be made."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from unit.children import in_child
from unit.scripted import Clock

from oomsafe.worker import current
from oomsafe.worker.guard import Guard


@pytest.fixture
def tries(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> list[float]:
    """When a guard was tried to be made, in seconds from now; it can't be until that is put back."""
    tried: list[float] = []
    begin = clock.now

    def fails(*_: Any, **__: Any) -> Guard:
        tried.append(clock.now - begin)
        raise RuntimeError("blocking call")

    monkeypatch.setattr(current, "Guard", fails)
    monkeypatch.setattr(current, "time", SimpleNamespace(monotonic=clock))
    return tried


def test_it_is_tried_again_ever_more_rarely(tries: list[float], clock: Clock, said: Callable[[], list[str]]) -> None:
    """At once, for most of what fails is over by then, and at last once a minute; that it fails is said once."""
    for _ in range(4000):
        assert current.guard_for({}, "requests") is None
        clock.go(0.125)

    assert tries[:6] == [0, 0.125, 1.125, 3.125, 7.125, 15.125]
    assert 5 <= len([when for when in tries if when > 60]) <= 8
    assert len(said()) == 1
    assert "nothing is measured until one can" in said()[0]


def test_a_detector_of_blocking_calls_is_named(monkeypatch: pytest.MonkeyPatch, said: Callable[[], list[str]]) -> None:
    """Its own error says neither who forbids it, nor what to do."""
    error = type("BlockingError", (Exception,), {"__module__": "blockbuster.blockbuster"})

    def forbidden(*_: Any, **__: Any) -> Guard:
        raise error("Blocking call to os.stat")

    monkeypatch.setattr(current, "Guard", forbidden)

    for _ in range(3):
        assert current.guard_for({}, "requests") is None
    (line,) = said()
    assert "BlockingError('Blocking call to os.stat') (a detector of blocking calls keeps an event loop from reading files, " in line


def test_it_is_made_at_last(tries: list[float], clock: Clock, monkeypatch: pytest.MonkeyPatch, said: Callable[[], list[str]]) -> None:
    """And that is said as well."""
    current.guard_for({}, "requests")
    monkeypatch.setattr(current, "Guard", Guard)

    guard = current.guard_for({}, "requests")

    assert guard is not None
    assert current.guard_for({}, "requests") is guard
    assert (len(tries), [line for line in said() if "a guard has been created now" in line]) == (1, said()[1:2])


def test_a_fork_of_a_servers_worker_has_none() -> None:
    """It is no worker: nobody waits for it, and nobody would replace it."""
    current.set_guard(Guard())

    assert in_child(lambda: current.guard_for({}, "requests") is None) is True


def test_a_fork_of_another_process_makes_its_own() -> None:
    """Its parent may have been what loads the app for workers that it forks later."""
    assert current.guard_for({}, "requests") is not None

    def own() -> bool:
        guard = current.guard_for({}, "requests")
        return guard is not None and guard.here

    assert in_child(own) is True
