"""The hostile client of the benchmarks, and what their tables make of a run."""

from __future__ import annotations

import itertools
import socket
import threading
import time
from collections import Counter

import half_sending_load
import leak
import pytest
import unserved
from half_sending_load import HALVES, Attack
from recycling_runs import Run
from serving import until


class Listener:
    """Takes connections and answers none, unless a whole request for /leak comes on one; `came` has what each sent."""

    def __init__(self) -> None:
        self.came: list[bytes] = []
        self._connections: list[socket.socket] = []
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)  # ends its accept()
        self._thread.join(5)
        self._socket.close()
        for connection in self._connections:
            connection.close()

    def ended(self) -> list[bytes]:
        """What still comes on each connection: b"" where the client has closed it."""
        for connection in self._connections:
            connection.settimeout(5)
        return [connection.recv(4096) for connection in self._connections]

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            connection.settimeout(5)
            self.came.append(connection.recv(4096))
            if self.came[-1].startswith(b"GET /leak"):
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
            self._connections.append(connection)


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look at the clock takes a millisecond, whatever the machine is doing."""
    ticks = itertools.count()
    monkeypatch.setattr(half_sending_load, "clock", lambda: next(ticks) / 1000)


def attacked(monkeypatch: pytest.MonkeyPatch, attack: Attack, kind: str) -> Counter[str]:
    """Begin one of each, and go on until this has happened."""
    deadline = time.monotonic() + 10
    monkeypatch.setattr(half_sending_load, "clock", lambda: 0.0 if not attack.seen[kind] and time.monotonic() < deadline else 1.0)
    return attack.run(1)


@pytest.mark.usefixtures("ticking")
def test_it_sends_halves_in_turns_and_keeps_their_connections_until_its_end() -> None:
    """None of them is whole, and none is waited for."""
    with Listener() as listener:
        seen = Attack(listener.port, half=100, grow=0).run(0.1)
        until(lambda: len(listener.came) == seen["half: begun"], "all have come")
        ended = listener.ended()

    assert listener.came[:4] == [*HALVES, *HALVES]
    assert ended == [b""] * len(listener.came)
    assert seen == {"half: begun": len(listener.came)}


def test_growing_requests_are_whole_and_their_answers_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the halves."""
    with Listener() as listener:
        seen = attacked(monkeypatch, Attack(listener.port, half=50, grow=50), "grow: answered")

    assert [came.startswith(b"GET /leak?grow HTTP/1.1") and came.endswith(b"\r\n\r\n") for came in listener.came] == [False, True]
    assert seen == {"half: begun": 1, "grow: begun": 1, "grow: answered": 1}


def test_what_ended_by_the_server_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A half-sent request whose connection it closes."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        attack = Attack(listener.getsockname()[1], half=20, grow=0)
        thread = threading.Thread(target=lambda: listener.accept()[0].close())
        thread.start()
        seen = attacked(monkeypatch, attack, "half: ended")
        thread.join(10)

    assert seen == {"half: begun": 1, "half: ended": 1}


@pytest.mark.usefixtures("ticking")
def test_nobody_listens() -> None:
    """It goes on, and counts."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

    seen = Attack(port, half=100, grow=100).run(0.05)

    assert seen["half: refused"] == seen["half: begun"] > 1
    assert seen["grow: refused"] == seen["grow: begun"] > 1


@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        ([Run(longest=0.5)], "yes"),
        ([Run(longest=0.51)], "NO"),
        ([Run(longest=0.1), Run(longest=2.0)], "NO"),
        ([Run(longest=0.1, failed=1)], "NO"),
    ],
)
def test_a_goal_is_kept_in_every_round(runs: list[Run], expected: str) -> None:
    """By the longest wait and without a failure."""
    assert unserved.verdict(runs, 0.5) == expected


KEPT = {"peak": 220.0, "killed": 0, "ended": False, "failed": 0}


@pytest.mark.parametrize(
    ("rounds", "expected"),
    [
        ([KEPT, KEPT], ["0", "yes"]),
        ([KEPT, {**KEPT, "peak": 221.0}], ["0", "NO"]),
        ([{**KEPT, "killed": 2}, {**KEPT, "killed": 1}], ["3", "NO"]),
        ([{**KEPT, "failed": 1}], ["0", "NO"]),
        ([{**KEPT, "ended": True}], ["0 (THE SUPERVISOR ENDED)", "NO"]),
    ],
)
def test_what_holds_in_the_cgroup_holds_in_every_round(rounds: list[dict[str, float]], expected: list[str]) -> None:
    """Peak, kills and failures."""
    assert leak.held("row", {"row": rounds}) == expected


def test_each_row_of_an_attack_says_which_lifetime_it_has() -> None:
    """A server without oomsafe has none."""
    options = unserved.options_of(["--loop", "asyncio", "--only", "UvicornWorker"])

    rows = unserved.contestants(options, unserved.attack(options))

    assert [row.name.partition(": ")[2] for row in rows] == [
        "not recycling", "oomsafe, min_lifetime default", "oomsafe, min_lifetime 0",
    ]  # fmt: skip
