"""503 for new work while the kernel is about to kill: when it begins, that it ends, what the client gets, and what is said."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oomsafe.asgi.refusing import refuse
from oomsafe.http.refusal import SHED
from oomsafe.policy.door import HELPS_WITHIN, RESTS_FOR, SHEDS_AT_LEAST, SHEDS_FOR, Crowd, Shedding, next_shedding
from oomsafe.policy.settings import Policy
from oomsafe.policy.trend import Growth
from oomsafe.scoreboard import layout
from oomsafe.scoreboard.layout import Counters
from oomsafe.scoreboard.slot import Figures
from oomsafe.supervisor.shedding import CALM, SheddingLine
from oomsafe.uvicorn import launch
from oomsafe.wsgi.middleware import _shed

MIB = 1 << 20
NOW = 100.0

#: 500 MiB a second: 25 MiB within the moment that it takes to be in force; 2 % of the limit are 10 MiB.
FAST = Growth(burst=500.0 * MIB)
NEAR = Crowd(room=9 * MIB, limit=500 * MIB)
SHEDS = Shedding(NOW - 2, FAST, NOW - 1)
CALMER = Shedding(NOW - 2, Growth(), NOW - 1)


@pytest.mark.parametrize(
    ("crowd", "growth", "waits", "sheds"),
    [
        pytest.param(NEAR, Growth(), False, True, id="hardly anything is left"),
        pytest.param(NEAR, Growth(), True, False, id="who comes waits already"),
        pytest.param(NEAR._replace(room=11 * MIB), Growth(), False, False, id="a little more is left"),
        pytest.param(NEAR._replace(room=24 * MIB), FAST, False, True, id="not for one that grows so"),
        pytest.param(NEAR._replace(room=26 * MIB), FAST, False, False, id="enough for one"),
        pytest.param(NEAR._replace(room=26 * MIB, serving=2), FAST, False, True, id="not for two"),
        pytest.param(
            NEAR._replace(room=30 * MIB, starting=9, fresh=9 * MIB), FAST, False, False, id="whoever boots has most of it already"
        ),
        pytest.param(Crowd(limit=500 * MIB), FAST, False, False, id="what is left is not known"),
        pytest.param(Crowd(room=65 * MIB, limit=1 << 40), Growth(), False, False, id="a big machine: 64 MiB are enough"),
    ],
)
def test_when_it_begins(crowd: Crowd, growth: Growth, waits: bool, sheds: bool) -> None:
    """One row a situation."""
    assert (next_shedding(Shedding(), waits, crowd, growth, NOW).since is not None) is sheds


@pytest.mark.parametrize(
    ("shedding", "crowd", "sheds"),
    [
        pytest.param(CALMER, NEAR._replace(room=19 * MIB), True, id="not enough more to let all in"),
        pytest.param(CALMER, NEAR._replace(room=20 * MIB), False, id="enough more"),
        pytest.param(CALMER._replace(since=NOW - 0.9), NEAR._replace(room=200 * MIB), True, id="not within its first second"),
        pytest.param(SHEDS, NEAR._replace(room=44 * MIB), True, id="it is taken to grow as before"),
        pytest.param(SHEDS, NEAR._replace(room=45 * MIB), False, id="room for that, too"),
        pytest.param(SHEDS._replace(helped_at=NOW - HELPS_WITHIN), NEAR, False, id="nobody leaves: it does not help"),
        pytest.param(SHEDS._replace(helped_at=NOW - HELPS_WITHIN), NEAR._replace(leaving=1), True, id="somebody leaves"),
        pytest.param(SHEDS._replace(helped_at=NOW - HELPS_WITHIN), NEAR._replace(starting=1), True, id="somebody boots"),
        pytest.param(SHEDS._replace(since=NOW - SHEDS_FOR), NEAR._replace(leaving=1), False, id="for too long"),
    ],
)
def test_when_it_ends(shedding: Shedding, crowd: Crowd, sheds: bool) -> None:
    """One row a situation."""
    assert (next_shedding(shedding, False, crowd, Growth(), NOW).since is not None) is sheds


crowds = st.builds(
    Crowd, st.none() | st.integers(0, 600 * MIB), st.booleans(), st.integers(1, 8), st.integers(0, 8), st.integers(0, 8),
    st.integers(0, 100 * MIB), st.none() | st.integers(0, 600 * MIB),
)  # fmt: skip
growths = st.builds(Growth, st.just(0.0), st.floats(0, 1e9))


@given(st.lists(st.tuples(crowds, growths, st.booleans(), st.floats(0.05, 2)), min_size=1, max_size=200))
def test_it_never_lasts(seen: list[tuple[Crowd, Growth, bool, float]]) -> None:
    """Laws: never longer than SHEDS_FOR, nor shorter than a second unless in vain; and after it was in vain, requests are let in."""
    shedding, now, spent_at = Shedding(), NOW, None
    for crowd, growth, waits, pause in seen:
        now += pause
        before, shedding = shedding, next_shedding(shedding, waits, crowd, growth, now)
        if shedding.since is not None:
            assert now - shedding.since < SHEDS_FOR
            assert spent_at is None or shedding.since - spent_at >= RESTS_FOR
        elif before.since is not None:
            assert now - before.since >= min(SHEDS_AT_LEAST, HELPS_WITHIN)
        spent_at = shedding.spent_at if shedding.spent_at is not None else spent_at


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_what_the_client_gets(method: str) -> None:
    """The same over WSGI and ASGI: a plain 503, when to come again, and no figures."""
    started: list[Any] = []
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    body = b"".join(_shed({"REQUEST_METHOD": method}, lambda *head: started.append(head)))
    asyncio.run(refuse(SHED, {"method": method}, send))

    ((status, headers),) = started
    assert status == "503 Service Unavailable"
    assert ("Retry-After", "2") in headers
    assert sent[0] == {
        "type": "http.response.start", "status": 503, "headers": [(name.lower().encode(), value.encode()) for name, value in headers],
    }  # fmt: skip
    assert sent[1] == {"type": "http.response.body", "body": body}
    assert body == (b"" if method == "HEAD" else b"This service is short of memory. Please try again in a moment.\n")
    assert dict(headers)["Content-Length"] == "63"


def test_its_end_is_said_once_for_the_pool(board, said) -> None:
    """With how many there were since the last time, of all workers; nothing is said while nothing is shed."""
    slots = [board.reserve() for _ in range(2)]
    line, now = SheddingLine(board), NOW

    def shed(*counts: int) -> None:
        for slot, count in zip(slots, counts, strict=True):
            slot.claim()
            slot.publish(Figures(), Counters(aborts=[0, count, 0, 0]))

    def ticks(seconds: float) -> None:
        nonlocal now
        until = now + seconds
        while now < until:
            now += 0.5
            line.tick(Policy(shed=True), now)

    ticks(10)
    before = list(said())
    assert board.header.first_to_refuse(layout.SAID_SHEDS)
    shed(3, 4)
    ticks(2)
    shed(5, 5)
    ticks(CALM - 0.5)
    meanwhile = list(said())
    ticks(2)
    first = list(said())
    assert board.header.first_to_refuse(layout.SAID_SHEDS)
    shed(5, 6)
    ticks(10)

    assert (before, meanwhile) == ([], [])
    assert first == ["new work is let in again: 10 were answered with 503, within 2 s"]
    assert said()[1:] == ["new work is let in again: 1 were answered with 503, within 0 s"]
    assert not board.header.has_said(layout.SAID_SHEDS)


def test_other_lines_are_not_taken_back(board) -> None:
    """They share a word."""
    board.header.first_to_refuse(layout.REFUSES_SOFT)
    board.header.first_to_refuse(layout.SAID_SHEDS)

    board.header.take_back(layout.SAID_SHEDS)

    assert board.header.has_said(layout.REFUSES_SOFT)
    assert not board.header.first_to_refuse(layout.REFUSES_SOFT)


def test_uvicorn_s_headers_are_a_list_and_shed_exempt_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """uvicorn.run() has an option of the name of one of our settings; others of ours may be lists, too."""
    seen: list[Any] = []

    class Guarded:
        """uvicorn's module."""

        @staticmethod
        def run(_: Any, **options: Any) -> None:
            seen.append(options)

    monkeypatch.setattr(launch, "_guard", lambda policy: seen.append(policy) or Guarded)

    launch.run("app", headers=[("Server", "x")], shed_exempt=["/healthz"], workers=2)

    assert seen == [{"shed_exempt": ["/healthz"]}, {"headers": [("Server", "x")], "workers": 2}]
