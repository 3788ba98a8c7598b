"""A probe's window: when it ends, and what ends the tracing at once; by a tracer that does nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from oomsafe.errors import ScoreboardError
from oomsafe.policy.probe import OWN_ROOM, Alive, Frame
from oomsafe.policy.probed import Stage
from oomsafe.scoreboard import layout
from oomsafe.scoreboard.board import Scoreboard
from oomsafe.worker import probe
from oomsafe.worker.meter import Meter
from oomsafe.worker.probe import BEFORE, JUDGED_AFTER, MOMENT, PATIENCE, SLOWER, TABLES, TRACES_ON, Probe
from oomsafe.worker.tracers import CanNotTraceError

MIB = 1 << 20


class Tracer:
    """It says what it was told to."""

    name = "a tracer"

    def __init__(self) -> None:
        self.memory: int | None = None
        self.runs = False
        self.found = [Alive(100 * 65536, 100, (Frame("/srv/app.py", 5, "leak"),))]
        self.why_not = ""

    def start(self) -> None:
        """Begin, or not."""
        if self.why_not:
            raise CanNotTraceError(self.why_not)
        self.runs = True

    def stop(self) -> None:
        """End."""
        self.runs = False

    def alive(self) -> Iterator[Alive]:
        """What was told."""
        self.stop()
        return iter(self.found)


class Window:
    """A probe whose clocks go when they are told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tracer: Tracer) -> None:
        self.now = self.cpu = 100.0
        self.tracer, self.board = tracer, Scoreboard.private()
        slot = self.board.reserve()
        assert slot is not None
        self.slot, self.meter = slot, Meter(slot)
        clock = SimpleNamespace(monotonic=lambda: self.now, process_time=lambda: self.cpu, time=lambda: 1000.0)
        monkeypatch.setattr(probe, "time", clock)
        monkeypatch.setattr("oomsafe.worker.meter._clock", clock.monotonic)
        monkeypatch.setattr(probe, "Recordings", self._no_disk)
        monkeypatch.setattr(probe, "Tracemalloc", lambda: tracer)
        monkeypatch.setattr(probe, "real", lambda module, name: _lock if name == "allocate_lock" else lambda *_: None)
        self.probe = Probe(self.meter, "worker 1 (slot 0)", 0, slot.generation, "requests", self.board.header, list, 1000, 60.0)

    def _no_disk(self, *_: object) -> Any:
        raise ScoreboardError("no folder on a disk is writable: set OOMSAFE_STATE")

    def begin(self, before: int = 0) -> Window:
        """Until it traces, after so many requests of 1 ms each."""
        self.work(before, 0.001)
        self.now += BEFORE
        self.probe.follow(self.now, None)
        return self

    def work(self, count: int, cpu: float = 0.001) -> None:
        """So many requests, of so many seconds of a processor each."""
        for _ in range(count):
            self.meter.begin(b"GET /").end()
        self.cpu += count * cpu

    def check(self, seconds: float = 0.1) -> str:
        """Why it is over, so much later."""
        self.now += seconds
        self.probe._check(self.now)
        return self.probe.why

    @property
    def stage(self) -> Stage | None:
        """As others see it."""
        probed = self.board.header.probed
        return None if probed is None else probed.stage


def _lock() -> Any:
    import _thread

    return _thread.allocate_lock()


@pytest.fixture
def tracer() -> Tracer:
    """What is traced with."""
    return Tracer()


@pytest.fixture
def window(monkeypatch: pytest.MonkeyPatch, tracer: Tracer) -> Window:
    """Not begun."""
    return Window(monkeypatch, tracer)


def test_it_begins_when_the_price_of_a_request_is_known(window: Window, said: Callable[[], list[str]]) -> None:
    """And says with what, and why not with memray."""
    window.probe.follow(window.now + BEFORE / 2, None)
    assert not window.tracer.runs

    window.begin(20)

    assert window.tracer.runs
    assert window.stage is Stage.TRACES
    (line,) = said()
    assert line == (
        "worker 1 (slot 0) traces its allocations with a tracer (no recording can be made: no folder on a disk is writable: set "
        "OOMSAFE_STATE), until 1000 requests or 60 s: it is slower meanwhile, and is replaced afterwards"
    )


def test_after_enough_work(window: Window) -> None:
    """It asks to be replaced, and traces on until its work is done."""
    window.begin()
    window.work(999)
    assert not window.check()
    assert not window.probe.waits_for_replacement
    window.work(1)

    assert window.check() == "1000 requests were enough"
    assert window.probe.waits_for_replacement
    assert window.tracer.runs
    assert window.stage is Stage.ENDS
    window.probe.finish(ends=False)
    assert not window.tracer.runs
    assert not window.probe.waits_for_replacement
    assert window.stage is Stage.DONE
    probed = window.board.header.probed
    assert probed is not None
    assert probed.text == "srv/app.py:5 in leak keeps 6.4 KiB a request"


def test_after_its_time(window: Window) -> None:
    """Also without work: then there is nothing to say."""
    window.begin()

    assert not window.check(59)
    assert window.check(2) == "60 s were over"
    window.probe.finish(ends=False)
    assert window.stage is Stage.FAILED


def test_at_once_if_the_pool_is_short(window: Window) -> None:
    """Of its budget, as its supervisor measures it."""
    header = window.begin().board.header
    header.describe(workers=1, turns=1, limit=1 << 30, budget=1000 * MIB)
    header.held = 970 * MIB
    assert not window.check()
    header.held = 990 * MIB

    assert window.check() == "the pool's memory got short"
    assert not window.tracer.runs


def test_at_once_if_a_request_takes_long(window: Window) -> None:
    """From when it is traced on, and not a websocket, which is only open."""
    open_, old = window.meter.begin(b"WEBSOCKET /", measured=False), window.meter.begin(b"GET /old")
    window.now += 100
    window.begin()
    assert not window.check(PATIENCE - 1)
    old.end()
    assert not window.check(2)
    work = window.meter.begin(b"GET /slow")

    assert not window.check(PATIENCE - 0.5)
    assert window.check(1) == f"a request took more than {PATIENCE:.0f} s with it"
    assert not window.tracer.runs
    work.end()
    open_.end()


def test_if_work_becomes_too_dear(window: Window) -> None:
    """Judged after some of it, by what it cost before."""
    window.begin(100)
    window.work(JUDGED_AFTER - 1, 0.001 * SLOWER * 1.1)
    assert not window.check()
    window.work(1, 0.001 * SLOWER * 1.1)

    assert window.check() == f"requests became {SLOWER * 1.1:.0f} times as dear"


def test_if_the_tracers_tables_grow(window: Window) -> None:
    """Reading them takes several times as much."""
    window.begin()
    window.tracer.memory = TABLES
    assert not window.check()
    window.tracer.memory = TABLES + 1

    assert window.check() == "the tracer's tables hold more than 16.0 MiB"


def test_it_does_not_trace_for_ever(window: Window) -> None:
    """Where nothing replaces it in time."""
    window.begin()
    window.work(1000)
    assert window.check()
    window.check(TRACES_ON - 1)
    assert window.tracer.runs
    window.check(2)

    assert not window.tracer.runs


def test_what_was_dropped_is_said(window: Window) -> None:
    """tracemalloc forgets when it is stopped."""
    window.begin()
    window.work(10)
    window.board.header.describe(workers=1, turns=1, limit=1 << 30, budget=1000 * MIB)
    window.board.header.held = 990 * MIB
    window.check()

    def gone() -> Iterator[Alive]:
        raise CanNotTraceError("what tracemalloc had traced was dropped when it had to end at once")

    window.tracer.alive = gone  # type: ignore[method-assign]
    window.probe.finish(ends=False)

    probed = window.board.header.probed
    assert probed is not None
    assert probed.stage is Stage.FAILED
    assert probed.text == "what was traced can't be read (what tracemalloc had traced was dropped when it had to end at once)"


def test_a_process_that_nothing_replaces_waits_for_its_moment(window: Window) -> None:
    """With nothing in flight, or for so long."""
    window.begin()
    window.work(1000)
    work = window.meter.begin(b"GET /")
    window.check()

    assert not window.probe.is_its_moment(window.now)
    assert window.probe.is_its_moment(window.now + MOMENT + 1)
    work.end()
    assert window.probe.is_its_moment(window.now)


@pytest.mark.parametrize(("room", "why_not"), [(OWN_ROOM - 1, ""), (None, "tracemalloc runs already")])
def test_it_may_not_begin_at_all(window: Window, room: int | None, why_not: str) -> None:
    """Then the worker stays as it is, and can be probed again."""
    window.tracer.why_not = why_not
    window.now += BEFORE
    window.probe.follow(window.now, room)

    assert window.probe.finished
    assert not window.probe.slows
    assert not window.probe.waits_for_replacement
    assert window.stage is Stage.FAILED
    (_, _, _, _, text, _) = layout.PROBED.unpack_from(window.board.header.memory, layout.PROBED_AT)
    assert why_not.encode() in text


def test_a_worker_that_is_recycled_meanwhile_tells_what_it_has(window: Window) -> None:
    """However short its window was."""
    window.begin()
    window.work(10)
    window.probe.finish(ends=False)

    assert window.stage is Stage.DONE
    assert window.probe.why == "the worker was recycled"
