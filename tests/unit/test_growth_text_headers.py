"""Whose growth it was; text from outside; headers."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oomsafe.http.headers import may_see, memory_headers
from oomsafe.policy.growth import GrowthClock
from oomsafe.policy.text import near_matches, printable

SECRET = "correct horse battery"


@given(st.integers(0, 1 << 30), st.lists(st.tuples(st.integers(0, 4), st.integers(0, 1 << 30)), max_size=80))
def test_no_growth_is_lost(start: int, events: list[tuple[int, int]]) -> None:
    """Law: shares of what has ended, of what is in flight, and the background add up to the whole growth."""
    clock = GrowthClock(start)
    marks: dict[int, float] = {}
    ended = 0.0

    for piece, rss in events:
        clock.advance(rss)
        if piece in marks:
            clock.in_flight -= 1
            ended += clock.value - marks.pop(piece)
        else:
            clock.in_flight += 1
            marks[piece] = clock.value

    in_flight = sum(clock.value - mark for mark in marks.values())
    assert pytest.approx(clock.last - start, abs=1) == ended + in_flight + clock.background
    assert clock.in_flight == len(marks)


@given(st.integers(0, 1 << 40), st.lists(st.integers(0, 1 << 40), min_size=1))
def test_alone_is_exact(start: int, sizes: list[int]) -> None:
    """Law: one piece of work that is alone gets all of it, to the byte."""
    clock = GrowthClock(start)
    clock.in_flight = 1

    for rss in sizes:
        clock.advance(rss)

    assert clock.value == sizes[-1] - start
    assert clock.background == 0


def test_equal_shares() -> None:
    """Two in flight get half each of what grew while both were there."""
    clock = GrowthClock(100)
    clock.in_flight = 1
    clock.advance(110)
    second = clock.value
    clock.in_flight = 2

    clock.advance(130)

    assert (clock.value, clock.value - second) == (20, 10)


@given(st.text() | st.binary(), st.integers(3, 200))
def test_printable_is(raw: str | bytes, length: int) -> None:
    """Law: printable ASCII only, no longer than asked; what was so already is unchanged, and once is enough."""
    clean = printable(raw, length)

    assert len(clean) <= length
    assert re.fullmatch("[ -~]*", clean)
    assert clean == printable(clean, length)


@given(st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=96))
def test_what_is_printable_stays(text: str) -> None:
    """Law: nothing is changed that need not be."""
    assert text == printable(text) == printable(text.encode())


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"GET /\r\nFAKE line", "GET /??FAKE line"),
        ("\x1b[2J\x07\x7f", "?[2J??"),
        ("caf\u00e9 \u202e\u2028", "caf? ??"),
        (b"\xc3\xa9", "??"),
        ("x" * 97, "x" * 93 + "..."),
        ("x" * 96, "x" * 96),
    ],
    ids=["new-lines", "escape", "bidi", "bytes", "long", "just-fits"],
)
def test_printable(raw: str | bytes, expected: str) -> None:
    """A client can't write log lines of its own, move a cursor, or fill a disk."""
    assert expected == printable(raw)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("soft_limt", " (did you mean soft_limit?)"), ("zzz", "")],
)
def test_near_matches(name: str, expected: str) -> None:
    """A misspelt name finds its neighbour; nonsense finds none."""
    assert expected == near_matches(name, ["soft_limit", "jitter"])


bytes_of_memory = st.integers(0, 1 << 45)


@given(bytes_of_memory, st.integers(-(1 << 45), 1 << 45), st.none() | bytes_of_memory)
def test_headers_can_be_read_back(rss: int, delta: int, limit: int | None) -> None:
    """Law: the figures are whole numbers of bytes; Server-Timing has the syntax of its specification."""
    headers = dict(memory_headers(rss, delta, limit))

    assert (rss, delta) == (int(headers["X-Memory-RSS"]), int(headers["X-Memory-Delta"]))
    assert limit == (int(headers["X-Memory-Limit"]) if "X-Memory-Limit" in headers else None)
    # metric = token *( ";" param ), param = token "=" ( token / quoted-string ), without a quote inside (W3C Server Timing, 2.1)
    assert re.fullmatch(r'mem;desc="[ !#-\[\]-~]+"', headers["Server-Timing"])


@pytest.mark.parametrize(
    ("setting", "token", "expected"),
    [
        (False, None, False),
        (False, SECRET, False),
        (True, None, True),
        (SECRET, None, False),
        (SECRET, "", False),
        (SECRET, SECRET, True),
        (SECRET, SECRET.encode(), True),
        (SECRET, SECRET[:-1], False),
        (SECRET, SECRET + " ", False),
        (SECRET, SECRET.upper(), False),
        (SECRET, "caf\u00e9", False),
        (SECRET, "\u4e2d\u6587", False),
        (SECRET, b"\xff\xfe", False),
    ],
    ids=repr,
)
def test_may_see(setting: Any, token: Any, expected: bool) -> None:
    """Only the exact secret opens a secret; no token is an error."""
    assert expected is may_see(setting, token)


@given(st.text() | st.binary())
def test_no_other_token_opens(token: str | bytes) -> None:
    """Law: whatever the client sends is answered with yes or no."""
    assert may_see(SECRET, token) == (token in (SECRET, SECRET.encode()))
