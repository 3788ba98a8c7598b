"""Something is watched while a server's supervisor waits, and the supervisor wakes no later than before."""

from __future__ import annotations

import math
import os
import queue
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from oomsafe.gunicorn.waiting import watch_with
from oomsafe.uvicorn.supervisor import Ticking


class Watch:
    """It counts how often it was called."""

    def __init__(self, pause: float, then: Callable[[int], None] = lambda count: None) -> None:
        self.pause = pause
        self.then = then
        self.count = 0

    def __call__(self) -> float:
        self.count += 1
        self.then(self.count)
        return self.pause


def queued(signals: queue.SimpleQueue[Any]) -> Any:
    """An arbiter of gunicorn since 24."""
    asked: list[float] = []

    def wait_for_signals(timeout: float = 1.0) -> list[Any]:
        asked.append(timeout)
        try:
            found = signals.get(timeout=timeout)
        except queue.Empty:
            return []
        return [] if found == "wake up" else [found]

    return SimpleNamespace(wait_for_signals=wait_for_signals, asked=asked)


def test_gunicorn_waits_in_parts() -> None:
    """As long as ever, if nothing comes."""
    server, watch = queued(queue.SimpleQueue()), Watch(0.01)
    watch_with(server, watch)
    began = time.monotonic()

    assert server.wait_for_signals(timeout=0.2) == []

    assert 0.2 <= time.monotonic() - began < 2
    assert 2 < watch.count <= 21


@pytest.mark.parametrize(("comes", "expected"), [("SIGHUP", ["SIGHUP"]), ("wake up", [])])
def test_gunicorn_is_woken_at_once(comes: str, expected: list[str]) -> None:
    """By a signal, or by what only wakes it."""
    signals: queue.SimpleQueue[Any] = queue.SimpleQueue()
    server, watch = queued(signals), Watch(5.0, lambda count: signals.put(comes) if count == 1 else None)
    watch_with(server, watch)

    assert server.wait_for_signals(timeout=60) == expected
    assert watch.count == 1


def test_gunicorn_with_nothing_to_watch() -> None:
    """It waits as it would without us, in one go."""
    server = queued(queue.SimpleQueue())
    watch_with(server, Watch(math.inf))

    assert server.wait_for_signals(timeout=0.01) == []
    assert len(server.asked) == 1


class Sleeper:
    """An arbiter of gunicorn before 24."""

    def __init__(self) -> None:
        self.PIPE = os.pipe()
        self.slept = 0

    def sleep(self) -> None:
        """Its own."""
        self.slept += 1


def test_an_older_gunicorn(monkeypatch: pytest.MonkeyPatch) -> None:
    """It sleeps for a second, is woken by its pipe, and reads that itself; so it does where nothing is to be watched."""
    monkeypatch.setattr("oomsafe.gunicorn.waiting.SECOND", 0.1)
    server = Sleeper()
    theirs = server.sleep
    watch = Watch(0.01)
    watch_with(server, watch)
    server.sleep()
    assert (server.slept, watch.count > 2) == (0, True)

    os.write(server.PIPE[1], b".")
    server.sleep()
    assert server.slept == 1

    os.read(server.PIPE[0], 1)
    watch.pause = math.inf
    server.sleep()
    assert server.slept == 2
    for end in server.PIPE:
        os.close(end)
    watch.pause = 0.01
    server.sleep()  # its descriptors are gone: what it makes of that is its own matter
    assert server.slept == 3
    assert server.sleep != theirs


def test_an_arbiter_that_waits_in_another_way() -> None:
    """It is left alone."""
    watch_with(object(), Watch(0.01))


def test_uvicorn_watches_between_its_ticks() -> None:
    """Ten ticks a second, and more looks than that; set, it wakes at once."""
    ticks: list[float] = []
    watch = Watch(0.01)
    waits = Ticking(lambda: ticks.append(time.monotonic()), watch)
    assert not waits.wait(0.25)
    assert 1 <= len(ticks) <= 3
    assert watch.count > len(ticks)

    threading.Timer(0.05, waits.set).start()
    assert waits.wait(30)
