"""A scoreboard is untrusted input: whatever stands in it can be read, shown and told, and costs little."""

from __future__ import annotations

import io
import json
import math
import os
import resource
import struct
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from unit.children import in_child

from oomsafe.celery.remote import pool_record
from oomsafe.cli.status import as_record, show
from oomsafe.cli.watch import record_of
from oomsafe.cli.watched_pools import key_of, reading_of
from oomsafe.errors import ScoreboardError
from oomsafe.kernel.process import start_time
from oomsafe.metrics.prometheus import MemoryCollector
from oomsafe.policy.alerts import Watch
from oomsafe.policy.state import State
from oomsafe.scoreboard import layout
from oomsafe.scoreboard.board import Scoreboard
from oomsafe.scoreboard.reader import Reader
from oomsafe.scoreboard.view import PoolView

words = st.sampled_from([0, 1, 2, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]) | st.integers(0, (1 << 64) - 1)
floats = st.sampled_from([0.0, 1.0, math.nan, math.inf, -math.inf, -1.0, 1e308, 5e-324]) | st.floats()
names = st.sampled_from([b"[/x]", b"[red]", b"\x1b[2J\x1b]0;owned\x07", b"\xff\xfe", b"\0", "\u202e\u2028".encode()]) | st.binary(
    max_size=60
)


@st.composite
def boards(draw: st.DrawFn) -> bytes:
    """Bytes that are a scoreboard by their identity, with this process in its slots; all else is anything."""
    slots = draw(st.integers(0, 3))
    fill = draw(st.sampled_from([b"\0", b"\xff"]))
    raw = bytearray(fill * (layout.HEADER_SIZE + slots * layout.SLOT_SIZE))
    layout.IDENTITY.pack_into(raw, 0, layout.MAGIC, layout.VERSION, slots, layout.SLOT_SIZE)
    layout.SUPERVISOR.pack_into(raw, layout.SUPERVISOR_AT, draw(words), draw(words), draw(floats))
    struct.pack_into("<5Q32s", raw, layout.POOL_AT, *(draw(words) for _ in range(5)), draw(names))
    _counters(draw, raw, layout.TOTALS_AT)
    layout.NAME.pack_into(raw, layout.NAME_AT, draw(names))
    layout.RECYCLED.pack_into(raw, layout.RECYCLED_AT, draw(floats), draw(names))
    layout.REFUSED.pack_into(raw, layout.REFUSED_AT, draw(st.integers(0, 0xFFFF)))
    layout.ENDED.pack_into(raw, layout.ENDED_AT, draw(floats))
    struct.pack_into("<26Q", raw, layout.DROPPABLE_AT, *(draw(words) for _ in range(26)))
    for number in range(2):
        struct.pack_into("<64s", raw, layout.NAMES_AT + number * layout.ROUTE_NAME, draw(names))
    for at in range(layout.HEADER_SIZE, len(raw), layout.SLOT_SIZE):
        layout.STATE.pack_into(raw, at, draw(st.integers(0, 8) | st.just(0xFFFFFFFF)))
        layout.OWNER.pack_into(raw, at + layout.OWNER_AT, os.getpid(), start_time() or 0, draw(words), draw(floats))
        layout.SEQUENCE.pack_into(raw, at + layout.SLOT_SEQUENCE_AT, draw(words))
        struct.pack_into("<9Qd", raw, at + layout.FIGURES_AT, *(draw(words) for _ in range(9)), draw(floats))
        _counters(draw, raw, at + layout.COUNTERS_AT)
        cell = at + layout.CELLS_AT
        struct.pack_into("<xB6xdQ103sB", raw, cell, draw(st.integers(0, 255)), draw(floats), draw(words), draw(names), 1)
    return bytes(raw)


def _counters(draw: st.DrawFn, raw: bytearray, at: int) -> None:
    struct.pack_into("<15Q", raw, at, *(draw(words) for _ in range(15)))
    struct.pack_into("<64s11Q", raw, at + 88, draw(names), *(draw(words) for _ in range(11)))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where boards lie."""
    return tmp_path_factory.mktemp("boards") / "1-1.board"


def read(path: Path, patience: float = 0.0) -> PoolView:
    with Reader(str(path)) as board:
        return board.read(patience)


def _not_json(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


@given(raw=boards())
def test_whatever_stands_there(place: Path, raw: bytes) -> None:
    """Law: it is read, and every way to show it shows text: no markup, no control character, no figure that JSON has not."""
    place.write_bytes(raw)

    pool = read(place)

    shown = io.StringIO()
    show([pool], Console(file=shown, width=200, force_terminal=False))
    assert all(char.isprintable() or char == "\n" for char in shown.getvalue())
    json.loads(json.dumps([as_record(pool), pool_record(pool)], allow_nan=False), parse_constant=_not_json)
    watch, key = Watch(), key_of(str(place), pool)
    events = [event for at in (0.0, 500.0) for event in watch.read(key, reading_of(pool), at, new=True)]
    for event in [*events, *watch.ended(key, 501.0, in_order=False, orphans=1)]:
        assert event.text.isprintable() and str(event.pool).isprintable()
        json.loads(json.dumps(record_of(event, 501.0), allow_nan=False), parse_constant=_not_json)
    assert sum(1 for _ in MemoryCollector(lambda: pool).collect()) > 5
    assert all((figure or 0) >= 0 for worker in pool.workers for figure in (worker.figures.rss, worker.figures.in_flight))


@given(raw=st.binary(max_size=200) | boards().flatmap(lambda raw: st.integers(0, len(raw)).map(lambda cut: raw[:cut])))
def test_whatever_is_cut_short(place: Path, raw: bytes) -> None:
    """Law: it is read, or one error says that it is no scoreboard."""
    place.write_bytes(raw)

    try:
        read(place)
    except ScoreboardError as error:
        assert "1-1.board" in str(error)


def test_one_that_is_cut_short_while_it_is_read(board: Scoreboard) -> None:
    """Nobody who reads it is killed by SIGBUS."""
    path = Path(str(board.path)).with_name("1-1.board")
    size = layout.HEADER_SIZE + board.slots * layout.SLOT_SIZE
    path.write_bytes(bytes(board._memory)[:size])
    opened = Reader(str(path))
    os.truncate(path, layout.HEADER_SIZE)

    with pytest.raises(ScoreboardError, match="was cut short"):
        opened.read()

    opened.close()


def _header(slots: int) -> bytes:
    return layout.IDENTITY.pack(layout.MAGIC, layout.VERSION, slots, layout.SLOT_SIZE)


@pytest.mark.parametrize("slots", [layout.SLOTS_MAX, layout.SLOTS_MAX + 1, 350_000], ids=["most", "one-more", "2-gib"])
def test_a_sparse_file_costs_nothing(tmp_path: Path, slots: int) -> None:
    """It may say that it has any number of slots, and be so long: nobody reads it into memory."""
    path = tmp_path / "1-1.board"
    path.write_bytes(_header(slots))
    os.truncate(path, layout.HEADER_SIZE + slots * layout.SLOT_SIZE)

    def look() -> tuple[str, int]:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            found = str(len(read(path).workers))
        except ScoreboardError as error:
            found = str(error)
        return found, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before

    found, grown = in_child(look)

    assert found == "0" if slots <= layout.SLOTS_MAX else "is not a scoreboard" in found
    assert grown < 16 << 10  # KiB


def test_a_full_one_is_read(tmp_path: Path) -> None:
    """As many slots as there may be, and in all of them somebody seems to write: they are taken as they are."""
    path = tmp_path / "1-1.board"
    slot = bytearray(layout.SLOT_SIZE)
    layout.write_state(memoryview(slot), 0, State.SERVING)
    layout.OWNER.pack_into(slot, layout.OWNER_AT, os.getpid(), start_time() or 0, 1, time.time())
    layout.SEQUENCE.pack_into(slot, layout.SLOT_SEQUENCE_AT, 1)
    path.write_bytes(_header(layout.SLOTS_MAX).ljust(layout.HEADER_SIZE, b"\0") + bytes(slot) * layout.SLOTS_MAX)

    assert len(read(path).workers) == layout.SLOTS_MAX
