"""The loop of `oomsafe watch`, without a process of its own."""

from __future__ import annotations

import itertools
import json
import time
from types import SimpleNamespace
from typing import Any

import pytest

from oomsafe.cli.watch import Loop, Printer, Signals, record_of
from oomsafe.cli.watched_pools import Pools
from oomsafe.policy.alerts import Alert, Event, PoolKey
from oomsafe.scoreboard import layout
from oomsafe.scoreboard.board import Scoreboard

POOL = PoolKey("shop", "gunicorn sync", 4711, 99, "/dev/shm/oomsafe-0/4711-99.board")


class Scripted(Signals):
    """Ends the loop once it has asked so often whether it is to end."""

    def __init__(self, asked: int) -> None:
        self._asked = asked

    @property
    def ended(self) -> int:  # type: ignore[override]
        """Asked before each look and each wait."""
        self._asked -= 1
        return int(self._asked <= 0)

    def wait(self, seconds: float) -> None:
        """As long as that, or less."""
        time.sleep(min(seconds, 0.01))


def test_a_look_that_fails_is_said_once_and_not_the_end(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """As when no descriptor is left."""
    looks = 0

    def look(pools: Pools) -> tuple[list[Any], list[Any]]:
        nonlocal looks
        looks += 1
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(Pools, "read", look)

    assert Loop(Pools(None, print), Printer(True), None, Scripted(60)).run(0.1, once=False) is None

    assert looks > 2
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if "Too many" in line] == ["oomsafe: the pools can't be read now: [Errno 24] Too many open files"]


def test_a_limit_that_is_refused_fires_after_its_time(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """From the bytes of a scoreboard to a line; and the same as JSON."""
    board, _ = Scoreboard.create(1, "test")
    board.header.name = "shop"
    board.header.first_to_refuse(layout.REFUSES_SOFT)
    clock = itertools.count(0.0, 9.0)
    monkeypatch.setattr(
        "oomsafe.cli.watch.time",
        SimpleNamespace(monotonic=lambda: next(clock), time=time.time, strftime=time.strftime, localtime=time.localtime),
    )
    for as_json in (False, True):
        Loop(Pools(None, print), Printer(as_json), None, Scripted(40)).run(5.0, once=False)
        # no worker serves, which is another alert
        (line,) = [line for line in capsys.readouterr().out.splitlines() if "limit_refused" in line]
        if as_json:
            record = json.loads(line)
            assert (record["alert"], record["figures"], record["pool"]["name"]) == ("limit_refused", {"limits": ["soft_limit"]}, "shop")
        else:
            assert line.endswith("limit_refused firing (warning): soft_limit is not used: below what a worker needs")
    board.remove()
    board.close()


def test_the_object_of_an_event() -> None:
    """Its times are those of the calendar."""
    now = time.monotonic()

    record = record_of(Event(Alert.SHEDDING, False, POOL, now - 90.0, {"seconds": 90.0}, "it is over"), now)

    assert record["at"] - record["since"] == pytest.approx(90, abs=0.1)
    assert record["at"] == pytest.approx(time.time(), abs=60)
    assert {key: record[key] for key in ("version", "alert", "state", "severity", "pool", "figures", "text", "help")} == {
        "version": 1,
        "alert": "shedding",
        "state": "resolved",
        "severity": "warning",
        "pool": {"name": "shop", "server": "gunicorn sync", "supervisor": 4711, "scoreboard": POOL.board},
        "figures": {"seconds": 90.0},
        "text": "it is over",
        "help": "docs/alerts.md#shedding",
    }
