"""When a worker has had its day: a guard whose memory and clock say what they are told."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from unit.retiring import several, worker
from unit.scripted import CGROUP, MIB, Clock, Memory

from oomsafe.http.headers import headers_of
from oomsafe.kernel.oom_score import read_score
from oomsafe.kernel.process import Shares, held_of
from oomsafe.policy.grant import Grant
from oomsafe.policy.limits import MACHINE, Capacity, Source
from oomsafe.policy.reclaim import IDLE_FOR, RECLAIM_EVERY
from oomsafe.policy.recycle import SETTLED_FOR, SETTLED_WORKERS, Order
from oomsafe.policy.settings import Policy
from oomsafe.policy.state import State
from oomsafe.scoreboard import layout
from oomsafe.scoreboard.board import Scoreboard
from oomsafe.scoreboard.slot import Slot
from oomsafe.worker import door, gauge, neighbours, pressure, reclaim, report
from oomsafe.worker.guard import CHECK_AGAIN, Guard
from oomsafe.worker.life import YOUNG

Said = Callable[[], list[str]]
HERE = Capacity(1000 * MIB, CGROUP, workers=2)


@pytest.fixture
def recycled() -> list[str]:
    """One entry for each call of recycle."""
    return []


@pytest.fixture
def guarded(recycled: list[str], clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Guard, Memory]]:
    """Makes a guard of 50 MiB with a soft limit of 100 MiB, and the memory that it sees."""
    # the pool's working set is not this machine's
    monkeypatch.setattr(pressure, "read_capacity", lambda **_: HERE)
    # nor are its dirty file pages those of this process, which maps the scoreboards of other tests
    monkeypatch.setattr(gauge, "file_dirty_of", lambda: 0)

    def make(*, rss: int | None = 50 * MIB, board: Scoreboard | None = None, alone: bool = False, **policy: Any) -> tuple[Guard, Memory]:
        memory = Memory(rss)
        keywords = {"soft_limit": "100MiB", "jitter": 0, "min_lifetime": 0, "reclaim": False, "draining_oom_score_adj": 0, **policy}
        slot = board.reserve() if board else None
        if slot:
            slot.claim()
        recycle = None if alone else lambda: recycled.append("now")
        guard = Guard(Policy(**keywords), recycle=recycle, board=board, slot=slot, capacity=HERE, memory=memory)
        guard.ready()
        return guard, memory

    return make


def do(guard: Guard, memory: Memory, rss: int | None, clock: Clock, name: str = "work") -> None:
    """One piece of work that leaves the process with so much memory; it ends when the guard looks again."""
    clock.go(CHECK_AGAIN)
    with guard.work(name):
        memory.be(rss)


def test_recycles_once(guarded: Any, clock: Clock, recycled: list[str], said: Said) -> None:
    """Within its limit it serves; above it recycle is called, once, and one line has every figure."""
    guard, memory = guarded()

    do(guard, memory, 100 * MIB, clock)
    within = (list(recycled), guard.should_recycle)
    for size in (200, 210, 220):
        do(guard, memory, size * MIB, clock, "GET /leak")
        guard.tick()

    assert within == ([], False)
    assert (recycled, guard.should_recycle) == (["now"], True)
    assert guard.meter.counters.recycles[0] == 1
    (line,) = said()
    assert "recycling: anon 200 MiB > soft limit 100 MiB for 0.0 s, after 2 pieces of work" in line
    assert "largest growth in one of them: GET /leak (+100 MiB)" in line


def test_first_works_are_noted(guarded: Any, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """However short they are, each by itself, from the figures that its end has read; later ones when the worker is measured anyway."""
    guard, memory = guarded(soft_limit="900MiB")
    guard.tick()
    clock.go(0.01)

    for work in range(1, YOUNG + 20):
        with guard.work("GET /"):
            memory.be((200 + work) * MIB)
    noted = [point.work for point in guard._life.points]
    clock.go(1.0)
    guard.tick()

    assert noted == [*range(1, YOUNG + 1)]
    assert guard._life.points[0].held == 201 * MIB
    assert guard._life.points[-1] == (YOUNG + 19, (200 + YOUNG + 19) * MIB)


def test_a_jump_is_noted_where_it_was(guarded: Any, clock: Clock) -> None:
    """A thousand pieces of work between two measurements, and one of them loads a model: so much came with one, not with a thousand."""
    guard, memory = guarded(soft_limit="900MiB")
    for work in range(1000):
        with guard.work("GET /"):
            memory.be(50 * MIB if work < 700 else 300 * MIB)

    clock.go(1.0)
    guard.tick()

    assert [*guard._life.points[-2:]] == [(999, 50 * MIB), (1000, 300 * MIB)]


def test_an_idle_worker_is_seen_by_the_tick(guarded: Any, clock: Clock, recycled: list[str]) -> None:
    """Memory that grows beside the work counts as well."""
    guard, memory = guarded()
    memory.be(150 * MIB)

    guard.tick()
    before = list(recycled)
    clock.go(1.0)
    guard.tick()

    assert (before, recycled) == ([], ["now"])


def test_without_a_way_to_recycle(guarded: Any, clock: Clock, said: Said) -> None:
    """A pool of one tells: a flag, and a warning that nothing here can do it."""
    guard, memory = guarded(alone=True)

    do(guard, memory, 200 * MIB, clock)

    assert guard.should_recycle
    assert "should be recycled, and nothing here can" in said()[0]


def test_reclaims_first(guarded: Any, clock: Clock, recycled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What can be given back is given back, and if that is enough the worker serves on."""
    guard, memory = guarded(reclaim=True)
    monkeypatch.setattr(reclaim, "trim", lambda: memory.be(80 * MIB))

    do(guard, memory, 200 * MIB, clock)

    assert (recycled, guard.should_recycle, guard.meter.rss) == ([], False, 80 * MIB)
    assert (guard.meter.counters.reclaims, guard.meter.counters.reclaimed) == (1, 120 * MIB)


def test_reclaims_every_so_often(guarded: Any, clock: Clock, recycled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not at each piece of work: the second breach within ten seconds recycles at once, a later one reclaims again."""
    guard, memory = guarded(reclaim=True)
    monkeypatch.setattr(reclaim, "trim", lambda: memory.be(80 * MIB))
    do(guard, memory, 200 * MIB, clock)
    clock.go(RECLAIM_EVERY)
    do(guard, memory, 200 * MIB, clock)
    twice = (guard.meter.counters.reclaims, list(recycled))

    clock.go(RECLAIM_EVERY - 1)
    do(guard, memory, 200 * MIB, clock)

    assert twice == (2, [])
    assert (guard.meter.counters.reclaims, recycled) == (2, ["now"])


def test_a_reclaim_that_does_not_help(guarded: Any, clock: Clock, recycled: list[str]) -> None:
    """Measured again, still over: recycled, by the same look."""
    guard, memory = guarded(reclaim=True)

    do(guard, memory, 200 * MIB, clock)

    assert (guard.meter.counters.reclaims, guard.meter.counters.reclaimed, recycled) == (1, 0, ["now"])


@pytest.mark.parametrize(("freed", "expected"), [(0, [10, 30, 70]), (100, [10, 20, 30, 40, 50, 60, 70])], ids=["futile", "useful"])
def test_a_futile_reclaim_is_remembered(
    guarded: Any, clock: Clock, monkeypatch: pytest.MonkeyPatch, freed: int, expected: list[int]
) -> None:
    """A worker that can't go and gets nothing back tries again after 20 s, then 40; one that gets something back, every 10."""
    guard, memory = guarded(reclaim=True, min_lifetime=1000)
    tried: list[float] = []
    monkeypatch.setattr(reclaim, "trim", lambda: (tried.append(round(clock() - began)), memory.be((200 - freed) * MIB)))
    began = clock()

    for _ in range(7):
        clock.go(RECLAIM_EVERY - CHECK_AGAIN)
        do(guard, memory, 200 * MIB, clock)

    assert expected == tried


@pytest.mark.parametrize("beside", ["nothing", "another piece of work", "a loop"])
def test_a_reclaim_knows_who_waits(guarded: Any, clock: Clock, monkeypatch: pytest.MonkeyPatch, beside: str) -> None:
    """A collection holds the GIL: what runs beside it stands still."""
    guard, memory = guarded(reclaim=True)
    seen: list[bool] = []
    monkeypatch.setattr(reclaim, "collect", lambda *, others_wait: seen.append(others_wait))
    if beside == "a loop":
        guard._background = lambda function: function()
    other = guard.work("another") if beside == "another piece of work" else None

    do(guard, memory, 200 * MIB, clock)

    assert seen == [beside != "nothing"]
    if other is not None:
        other.end()


def test_a_reclaim_that_takes_long(guarded: Any, clock: Clock, recycled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A heap that takes longer to walk than RECLAIM_EVERY is walked once, not for ever."""
    guard, memory = guarded(reclaim=True)
    monkeypatch.setattr(reclaim, "trim", lambda: clock.go(RECLAIM_EVERY + 1))

    do(guard, memory, 200 * MIB, clock)

    assert (guard.meter.counters.reclaims, recycled) == (1, ["now"])


def test_a_reclaim_in_the_background(guarded: Any, clock: Clock, recycled: list[str]) -> None:
    """It goes on beside the work; nothing else is decided meanwhile, and it decides at its end."""
    guard, memory = guarded(reclaim=True)
    waiting: list[Callable[[], None]] = []
    guard._background = waiting.append

    do(guard, memory, 200 * MIB, clock)
    do(guard, memory, 210 * MIB, clock)
    meanwhile = (len(waiting), list(recycled))
    waiting.pop()()

    assert meanwhile == (1, [])
    assert (waiting, recycled) == ([], ["now"])


def test_a_background_that_can_not_start(guarded: Any, clock: Clock, recycled: list[str], said: Said) -> None:
    """Out of memory there are no new threads: that does not keep the worker from being recycled."""
    guard, memory = guarded(reclaim=True)

    def refuse(_: object) -> None:
        raise RuntimeError("can't start new thread")

    guard._background = refuse

    do(guard, memory, 200 * MIB, clock)
    do(guard, memory, 210 * MIB, clock)

    assert recycled == ["now"]
    assert "can't start new thread" in said()[0]


@pytest.mark.parametrize("policy", [{"sustain": 5}, {"min_lifetime": 5}], ids=["sustain", "min_lifetime"])
def test_waits(guarded: Any, clock: Clock, recycled: list[str], policy: dict[str, float]) -> None:
    """A breach must last; a worker must have lived."""
    guard, memory = guarded(**policy)
    do(guard, memory, 120 * MIB, clock)
    clock.go(4.9)
    do(guard, memory, 120 * MIB, clock)
    before = list(recycled)

    clock.go(0.2)
    do(guard, memory, 120 * MIB, clock)

    assert (before, recycled) == ([], ["now"])


def test_a_breach_with_a_break_begins_anew(guarded: Any, clock: Clock, recycled: list[str]) -> None:
    """A worker that came back within its limit has no breach behind it."""
    guard, memory = guarded(sustain=5)
    do(guard, memory, 120 * MIB, clock)
    clock.go(4)
    do(guard, memory, 90 * MIB, clock)
    clock.go(4)

    do(guard, memory, 120 * MIB, clock)

    assert recycled == []


def test_hard_waits_for_nothing(guarded: Any, clock: Clock, recycled: list[str], said: Said) -> None:
    """Neither for its age, nor for a reclaim."""
    guard, memory = guarded(hard_limit="150MiB", sustain=99, min_lifetime=99, reclaim=True)

    do(guard, memory, 151 * MIB, clock)

    assert recycled == ["now"]
    assert guard.meter.counters.recycles[:2] == [0, 1]
    assert "anon 151 MiB > hard limit 150 MiB" in said()[0]


def test_dry_run(guarded: Any, clock: Clock, recycled: list[str], said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    """It decides, counts and logs, and does nothing: no call, no flag, no score, no reclaim."""
    monkeypatch.setattr(reclaim, "trim", lambda: recycled.append("trimmed"))
    guard, memory = guarded(dry_run=True, reclaim=True, draining_oom_score_adj=300)
    score = read_score()

    for _ in range(3):
        do(guard, memory, 200 * MIB, clock)

    assert (recycled, guard.should_recycle, read_score()) == ([], False, score)
    assert (guard.meter.counters.recycles[0], guard.meter.counters.reclaims, guard.slot.state) == (1, 0, State.SERVING)
    (line,) = said()
    assert "would be recycled (dry run)" in line


def test_a_soft_limit_below_what_boot_needs(guarded: Any, clock: Clock, recycled: list[str], said: Said, board: Scoreboard) -> None:
    """Recycling would never end: one line for the pool has both figures, and no worker is ever recycled for it."""
    guards = [guarded(rss=120 * MIB, board=board) for _ in range(2)]

    for guard, memory in guards:
        do(guard, memory, 900 * MIB, clock)

    assert recycled == []
    (line,) = said()
    assert "soft limit 100 MiB is not used: a worker needs 120 MiB (anon) right after boot" in line
    assert all(guard.meter.soft_limit is None for guard, _ in guards)


def test_a_refused_soft_limit_leaves_the_hard_one(guarded: Any, clock: Clock, recycled: list[str]) -> None:
    """Which is above what boot needs."""
    guard, memory = guarded(rss=120 * MIB, hard_limit="150MiB")

    do(guard, memory, 151 * MIB, clock)

    assert recycled == ["now"]


@pytest.mark.parametrize("metric", ["pss", "uss"])
def test_a_hard_limit_below_what_boot_needs(
    guarded: Any, clock: Clock, recycled: list[str], monkeypatch: pytest.MonkeyPatch, metric: str
) -> None:
    """The hard limit is of rss, whatever the metric: a worker that is above it right after boot is not recycled for ever."""
    monkeypatch.setattr(gauge, "shared_out", lambda: Shares(60 * MIB, 40 * MIB, 40 * MIB, 60 * MIB))
    guard, memory = guarded(rss=400 * MIB, metric=metric, hard_limit="300MiB")

    do(guard, memory, 401 * MIB, clock)

    assert recycled == []


@pytest.mark.parametrize(("metric", "expected"), [("rss", ["now"]), ("pss", []), ("uss", [])])
def test_metric(guarded: Any, clock: Clock, recycled: list[str], monkeypatch: pytest.MonkeyPatch, metric: str, expected: list[str]) -> None:
    """Shared pages count whole in rss, and not in pss and uss."""
    monkeypatch.setattr(gauge, "shared_out", lambda: Shares(30 * MIB, 20 * MIB, 10 * MIB, 30 * MIB))
    guard, memory = guarded(metric=metric)

    do(guard, memory, 110 * MIB, clock)

    assert expected == recycled


@pytest.mark.parametrize(("metric", "expected"), [("anon", []), ("private", []), ("rss", ["now"]), ("uss", ["now"])])
def test_clean_file_pages(
    guarded: Any, clock: Clock, recycled: list[str], monkeypatch: pytest.MonkeyPatch, metric: str, expected: list[str]
) -> None:
    """A worker that maps a big file for reading holds what the kernel drops before it kills anybody: no limit is about that."""
    monkeypatch.setattr(gauge, "shared_out", lambda: Shares(300 * MIB, 300 * MIB, 50 * MIB, 50 * MIB))
    guard, memory = guarded(metric=metric, hard_limit="200MiB")
    with guard.work("reads an index"):
        memory.clean = 250 * MIB
        memory.be(300 * MIB)
    clock.go(1.0)
    guard.tick()

    assert expected == recycled
    assert (guard.meter.rss, guard.meter.anon, guard.meter.counters.routes["unmatched"][0] > 0) == (300 * MIB, 50 * MIB, bool(expected))


@pytest.mark.parametrize("told_apart", [True, False])
def test_shared_memory_counts(guarded: Any, clock: Clock, recycled: list[str], told_apart: bool) -> None:
    """The kernel can't drop it. Where it does not say what is shared memory and what is a file, all of it counts."""
    guard, memory = guarded()
    memory.shared_memory, memory.clean = (60 * MIB, 0) if told_apart else (None, 60 * MIB)

    do(guard, memory, 110 * MIB, clock)

    assert (recycled, guard.meter.anon) == (["now"], 110 * MIB)


@pytest.mark.parametrize(
    ("to_write", "dirty", "expected"),
    [
        pytest.param(200, 80, ["now"], id="dirty"),
        pytest.param(200, 0, [], id="another process's"),
        pytest.param(None, 80, ["now"], id="not known how much the machine has to write"),
        pytest.param(20, 80, [], id="the machine has little to write, so nobody need walk all pages"),
    ],
)
def test_dirty_file_pages_count(
    guarded: Any, clock: Clock, recycled: list[str], monkeypatch: pytest.MonkeyPatch, to_write: int | None, dirty: int, expected: list[str]
) -> None:
    """They must be written before they can be dropped. Looked at once a second, by those that could be over their limit with them."""
    monkeypatch.setattr(gauge, "file_dirty_of", lambda: dirty * MIB)
    monkeypatch.setattr(gauge, "awaits_writing", lambda: None if to_write is None else to_write * MIB)
    guard, memory = guarded()
    memory.clean = 80 * MIB

    do(guard, memory, 130 * MIB, clock)
    clock.go(1.0)
    guard.tick()

    assert expected == recycled


def test_without_memory_for_it(
    guarded: Any, clock: Clock, recycled: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """At its hard limit, smaps takes more memory than a worker has: the rest is measured all the same, and the last figure stays."""

    def starve() -> int:
        raise MemoryError

    monkeypatch.setattr(gauge, "file_dirty_of", starve)
    monkeypatch.setattr(gauge, "awaits_writing", lambda: 200 * MIB)
    guard, memory = guarded()
    memory.clean = 10 * MIB

    do(guard, memory, 150 * MIB, clock)
    clock.go(1.0)
    guard.tick()

    assert recycled == ["now"]
    assert "failed" not in caplog.text


def test_a_tick_without_memory(guarded: Any, clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """It does nothing, and another does it later; that is said once, when there is memory for a line."""
    guard, _ = guarded()
    plain, starved = guard.meter.measure, [True]

    def measure() -> None:
        if starved[0]:
            raise MemoryError
        plain()

    monkeypatch.setattr(guard.meter, "measure", measure)
    monkeypatch.setattr(guard._report, "publish", lambda now: measure())
    line = f"{guard} had no memory left for a moment, not even to measure itself: it does that again"
    for _ in range(2):
        clock.go(1.0)
        guard.tick()
    assert caplog.messages == []

    for now in (False, True, False):
        starved[0] = now
        clock.go(1.0)
        guard.tick()
    assert caplog.messages == [line]


def test_a_private_figure_counts_dirty_file_pages_once(
    guarded: Any, clock: Clock, recycled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sample is without them, and is made while they are held."""
    monkeypatch.setattr(gauge, "shared_out", lambda: Shares(130 * MIB, 90 * MIB, 50 * MIB, 50 * MIB))
    monkeypatch.setattr(gauge, "file_dirty_of", lambda: 40 * MIB)
    monkeypatch.setattr(gauge, "awaits_writing", lambda: 200 * MIB)
    guard, memory = guarded(metric="private")
    memory.clean = 50 * MIB
    clock.go(gauge.SAMPLE_EVERY)

    do(guard, memory, 130 * MIB, clock)
    for _ in range(8):
        clock.go(1.0)
        guard.tick()

    assert recycled == []


@pytest.mark.parametrize("metric", ["pss", "uss"])
def test_growth_between_two_samples(guarded: Any, clock: Clock, recycled: list[str], monkeypatch: pytest.MonkeyPatch, metric: str) -> None:
    """A sample is dear, so what rss has grown by since the last one counts as the worker's own."""
    asked: list[float] = []
    monkeypatch.setattr(gauge, "shared_out", lambda: asked.append(clock()) or Shares(30 * MIB, 30 * MIB, 30 * MIB, 30 * MIB))
    guard, memory = guarded(metric=metric)

    do(guard, memory, 125 * MIB, clock)

    assert (len(asked), recycled) == (1, ["now"])


def test_jitter_never_asks_for_less_than_boot(clock: Clock) -> None:
    """A worker of 95 MiB below a limit of 100 MiB keeps all of it, whatever its share of the jitter."""
    for _ in range(30):
        guard = Guard(Policy(soft_limit="100MiB", jitter=0.9, min_lifetime=0), capacity=HERE, memory=Memory(95 * MIB))

        assert guard.limits.early is not None
        assert 95 * MIB < guard.limits.early <= 100 * MIB
        assert not guard.should_recycle


def test_jitter_spreads(clock: Clock) -> None:
    """Workers that grow alike do not end together."""
    early = {Guard(Policy(soft_limit="100MiB", jitter=0.3), capacity=HERE, memory=Memory(MIB)).limits.early for _ in range(20)}

    assert len(early) > 10
    assert all(limit is not None and 70 * MIB <= limit <= 100 * MIB for limit in early)


def test_no_figure_never_acts(guarded: Any, clock: Clock, recycled: list[str]) -> None:
    """Where memory can't be read nothing is decided, and nothing is made up: no zeros on the board, no headers."""
    guard, memory = guarded(rss=None, hard_limit="150MiB")

    do(guard, memory, None, clock)
    clock.go(1)
    guard.tick()

    (worker,) = guard.pool().workers
    assert (recycled, guard.should_recycle, guard.meter.counters.work) == ([], False, 1)
    assert (worker.figures.rss, worker.figures.peak_rss, worker.figures.baseline) == (None, None, None)
    assert headers_of(guard.work("x")).text == []


def test_a_figure_that_is_missing_for_a_while(guarded: Any, clock: Clock, recycled: list[str]) -> None:
    """The last one holds; the next one counts."""
    guard, memory = guarded()
    do(guard, memory, None, clock)

    do(guard, memory, 60 * MIB, clock)

    assert (recycled, guard.meter.rss, guard.meter.clock.value) == ([], 60 * MIB, 10 * MIB)


def test_a_scoreboard_that_can_not_be_written(guarded: Any, clock: Clock, recycled: list[str], said: Said) -> None:
    """It is logged once, the work goes on, and the worker is recycled all the same."""
    guard, memory = guarded()

    def fail(*_: object) -> None:
        raise OSError("broken")

    guard.slot.publish = guard.meter._write = fail
    clock.go(2)
    for _ in range(3):
        do(guard, memory, 90 * MIB, clock)
    for _ in range(3):
        do(guard, memory, 200 * MIB, clock)

    assert guard.meter.counters.work == 6
    assert guard.meter.clock.in_flight == 0
    assert len([line for line in said() if "oomsafe failed in begin" in line]) == 1
    assert recycled == ["now"]


def test_a_recycle_that_fails(guarded: Any, clock: Clock, said: Said) -> None:
    """The work goes on, and it is said once."""
    guard, memory = guarded()

    def fail() -> None:
        raise OSError("no pipe")

    guard._recycle = fail

    do(guard, memory, 200 * MIB, clock)
    do(guard, memory, 210 * MIB, clock)

    assert guard.meter.counters.work == 2
    assert any("no pipe" in line for line in said())


def test_a_pool_that_changes(guarded: Any, clock: Clock, board: Scoreboard, monkeypatch: pytest.MonkeyPatch) -> None:
    """With SIGTTIN each worker's share of the budget shrinks, at the next tick."""
    # this process's own would be compared with the share, and it holds what all tests before this one have loaded
    monkeypatch.setattr(gauge, "shared_out", lambda: Shares(50 * MIB, 50 * MIB, 50 * MIB, 50 * MIB))
    board.header.describe(workers=2, turns=1, limit=None, budget=None)
    guard, _ = guarded(board=board, soft_limit="auto")
    before = guard.meter.soft_limit

    board.header.describe(workers=5, turns=1, limit=None, budget=None)
    clock.go(1)
    guard.tick()

    assert (before, guard.meter.soft_limit) == (450 * MIB, 180 * MIB)
    assert guard.pool().workers[0].figures.soft == 180 * MIB


def test_a_limit_that_moves(guarded: Any, clock: Clock, board: Scoreboard, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the supervisor finds holds for a worker that lives, from its next tick."""
    monkeypatch.setattr("oomsafe.worker.gauge.shared_out", lambda: None)
    board.header.describe(workers=2, turns=1, limit=None, budget=None)
    guard, memory = guarded(board=board, soft_limit="auto")
    board.header.allow(Capacity(400 * MIB, CGROUP, supervisor_rss=40 * MIB, others=100 * MIB))
    clock.go(1)
    guard.tick()

    assert guard.meter.soft_limit == (270 - 40) * MIB // 2
    do(guard, memory, 130 * MIB, clock)
    assert guard.should_recycle


def test_a_limit_below_what_a_worker_needs(
    guarded: Any, clock: Clock, board: Scoreboard, said: Said, recycled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused once for the pool, with both figures; one that can be kept to again is."""
    monkeypatch.setattr("oomsafe.worker.gauge.shared_out", lambda: None)
    board.header.describe(workers=2, turns=1, limit=None, budget=None)
    guard, memory = guarded(board=board, soft_limit="auto")
    for limit in (80 * MIB, 81 * MIB):
        board.header.allow(Capacity(limit, CGROUP))
        clock.go(1)
        guard.tick()
        do(guard, memory, 60 * MIB, clock)

    (line,) = [line for line in said() if "is not used" in line]
    assert "soft limit 36.0 MiB is not used: a worker needs " in line
    assert (guard.meter.soft_limit, recycled) == (None, [])
    board.header.allow(Capacity(200 * MIB, CGROUP))
    clock.go(1)
    guard.tick()
    assert guard.meter.soft_limit == 90 * MIB


def test_a_worker_that_has_settled_stays_whatever_others_use(guarded: Any, clock: Clock, board: Scoreboard) -> None:
    """Its limit was raised for a while, and is not lowered because a neighbour breathes."""
    board.header.allow(Capacity(1000 * MIB, CGROUP))
    guard, _ = guarded(board=board, soft_limit="auto")
    guard._thresholds.stay(500 * MIB, clock(), Grant())
    raised = guard.limits.early
    board.header.allow(Capacity(1000 * MIB, CGROUP, others=100 * MIB))
    clock.go(1)
    guard.tick()

    assert guard.limits.early == raised


def test_a_worker_whom_nobody_tells(guarded: Any, clock: Clock, said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a supervisor it asks the kernel itself, and says so."""
    guard, _ = guarded(soft_limit="auto")
    assert guard.meter.soft_limit == 450 * MIB
    monkeypatch.setattr(guard._thresholds, "_measure", lambda: Capacity(500 * MIB, CGROUP, working_set=60 * MIB))
    clock.go(2)
    guard.tick()

    assert guard.meter.soft_limit == 225 * MIB
    assert said() == ["the memory limit has changed: soft limit 225 MiB, budget 450 MiB of 500 MiB (cgroup v2 /here)"]


def settle(guarded: Any, clock: Clock, board: Scoreboard, workers: int = SETTLED_WORKERS) -> None:
    """So many workers, one after the other, go over their limit of 100 MiB with their first work, and stay where they came to."""
    for _ in range(workers):
        guard, memory = guarded(board=board, min_lifetime=10)
        do(guard, memory, 120 * MIB, clock)
        clock.go(10)
        do(guard, memory, 121 * MIB, clock)
        board.release(guard.slot.number)


def test_workers_that_load_lazily(guarded: Any, clock: Clock, recycled: list[str], said: Said, board: Scoreboard) -> None:
    """Three workers in a row that need more than their limit with their first work, and the next ones serve on: one line says so."""
    settle(guarded, clock, board, workers=5)

    assert len(recycled) == 3
    (line,) = [line for line in said() if "settled" in line]
    assert line.startswith("a worker has settled at 121 MiB (anon), above its soft limit of 100 MiB, as the 3 before it did: ")
    assert "its limit is 146 MiB for 10 min." in line


@pytest.mark.parametrize("age", [0.5, 100.0], ids=["young", "old"])
def test_one_heavy_request_for_each_worker(guarded: Any, clock: Clock, recycled: list[str], board: Scoreboard, age: float) -> None:
    """Whenever it comes: three workers are recycled for it, the fourth is not, for the fifth would hold as much."""
    for _ in range(4):
        guard, memory = guarded(board=board, min_lifetime=1)
        clock.go(age / 2)
        guard.tick()
        clock.go(age / 2)
        guard.tick()
        for size in (120, 121):
            do(guard, memory, size * MIB, clock)
            clock.go(1.5)
        do(guard, memory, 121 * MIB, clock)
        board.release(guard.slot.number)

    assert len(recycled) == 3


def test_a_limit_that_clients_have_raised_still_limits(
    guarded: Any, clock: Clock, recycled: list[str], said: Said, board: Scoreboard
) -> None:
    """The fourth stays at what it has settled at, and no further: a leak after that recycles it as any other."""
    settle(guarded, clock, board)
    guard, memory = guarded(board=board, min_lifetime=10)
    do(guard, memory, 120 * MIB, clock)
    clock.go(10)
    do(guard, memory, 121 * MIB, clock)
    stays = len(recycled)

    do(guard, memory, 145 * MIB, clock)
    within = len(recycled)
    do(guard, memory, 147 * MIB, clock)

    assert (stays, within, len(recycled)) == (3, 3, 4)
    assert guard.pool().workers[0].figures.soft == 146 * MIB


def test_a_limit_that_was_raised_comes_down_again(guarded: Any, clock: Clock, recycled: list[str], board: Scoreboard) -> None:
    """What was needed once may not be needed any more."""
    settle(guarded, clock, board)
    guard, memory = guarded(board=board, min_lifetime=10)
    do(guard, memory, 120 * MIB, clock)
    clock.go(10)
    do(guard, memory, 121 * MIB, clock)
    raised = guard.meter.soft_limit

    memory.be(60 * MIB)
    clock.go(SETTLED_FOR)
    guard.tick()

    assert (raised, guard.meter.soft_limit) == (146 * MIB, 100 * MIB)


def left_before(board: Scoreboard, kept: int) -> None:
    """Three workers that have left for their soft limit, and had grown by 70 MiB; `kept` MiB of these were free."""
    for one in several(3, 70, kept=kept):
        board.header.note_retirement(one)


@pytest.mark.parametrize(
    ("kept", "line", "later", "after_that"),
    [
        (
            5,
            "of 70.0 MiB that they had grown by, 7% was free memory; its limit is 146 MiB for as long as it holds that much",
            146,
            100,
        ),
        (60, "86% was free memory, which a new worker need not hold; its limit is 146 MiB for 10 min", 100, 100),
    ],
    ids=["in use", "kept"],
)
def test_what_is_needed_is_granted_again(
    guarded: Any, clock: Clock, recycled: list[str], said: Said, board: Scoreboard, kept: int, line: str, later: int, after_that: int
) -> None:
    """As long as the worker holds as much, if the memory of those before it was in use; it is taken back when it holds less."""
    settle(guarded, clock, board)
    left_before(board, kept)
    guard, memory = guarded(board=board, min_lifetime=10)
    do(guard, memory, 120 * MIB, clock)
    clock.go(10)
    do(guard, memory, 121 * MIB, clock)
    rests(guard, clock, 2)

    clock.go(SETTLED_FOR)
    guard.tick()
    then = guard.meter.soft_limit
    memory.be(60 * MIB)
    for _ in range(2):
        clock.go(SETTLED_FOR)
        guard.tick()

    assert any(line in each for each in said())
    assert (then, guard.meter.soft_limit) == (later * MIB, after_that * MIB)


def test_what_is_granted_is_taken_back_from_one_that_grows_on(guarded: Any, clock: Clock, recycled: list[str], board: Scoreboard) -> None:
    """However often it was granted."""
    settle(guarded, clock, board)
    left_before(board, 0)
    guard, memory = guarded(board=board, min_lifetime=10)
    do(guard, memory, 120 * MIB, clock)
    clock.go(10)
    do(guard, memory, 121 * MIB, clock)
    for _ in range(3):
        clock.go(SETTLED_FOR)
        do(guard, memory, 130 * MIB, clock)
    stays = len(recycled)

    do(guard, memory, 147 * MIB, clock)

    assert (stays, len(recycled)) == (3, 4)


def test_a_leak_is_no_lazy_load(guarded: Any, clock: Clock, recycled: list[str], board: Scoreboard) -> None:
    """One that goes on growing is recycled each time, however early it began."""
    for _ in range(6):
        guard, memory = guarded(board=board, min_lifetime=10)
        do(guard, memory, 105 * MIB, clock)
        clock.go(10)
        do(guard, memory, 124 * MIB, clock)
        board.release(guard.slot.number)

    assert len(recycled) == 6


def test_a_leak_in_a_pool_over_budget_is_no_lazy_load(
    guarded: Any, clock: Clock, recycled: list[str], said: Said, board: Scoreboard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over its budget the pool waits for nobody's age; a worker that went at once has not shown that it does not leak."""
    monkeypatch.setattr(pressure, "read_capacity", lambda **_: Capacity(1000 * MIB, CGROUP, working_set=950 * MIB))
    for _ in range(6):
        guard, memory = guarded(board=board, min_lifetime=10)
        for size in (70, 90, 110, 130):
            do(guard, memory, size * MIB, clock)
        board.release(guard.slot.number)

    assert [line for line in said() if "settled" in line] == []
    assert len(recycled) == 6


@pytest.mark.parametrize(
    ("source", "budget", "over"),
    [
        pytest.param(MACHINE, 2.0, False, id="in bytes it is the pool's own, whatever else the machine runs"),
        pytest.param(MACHINE, 0.25, True, id="and the pool may be above it"),
        pytest.param(MACHINE, "90%", True, id="a share is one of all that is in use"),
        pytest.param(CGROUP, 2.0, True, id="in a cgroup the kernel counts"),
    ],
)
def test_what_a_budget_is_compared_with(
    guarded: Any, clock: Clock, recycled: list[str], monkeypatch: pytest.MonkeyPatch, source: Source, budget: float | str, over: bool
) -> None:
    """A worker that is over its limit while it is young stays, unless the pool is over its budget. Of a real process: this one."""
    capacity = Capacity(1000 * MIB, source, working_set=950 * MIB)
    monkeypatch.setattr(pressure, "read_capacity", lambda **_: capacity)
    own = held_of(os.getpid())
    assert own is not None
    guard, memory = guarded(min_lifetime=10, budget=budget if isinstance(budget, str) else int(own * budget))

    do(guard, memory, 110 * MIB, clock)

    assert bool(recycled) is over


@pytest.fixture
def crowd(guarded: Any, board: Scoreboard, monkeypatch: pytest.MonkeyPatch) -> Any:
    """(guard, memory, left): a worker with a soft limit of 900 MiB, beside one that drains. left(n): n MiB are left to the pool."""
    held = [100]
    monkeypatch.setattr(pressure, "read_capacity", lambda **_: Capacity(1000 * MIB, CGROUP, working_set=held[0] * MIB))
    other = board.reserve()
    assert other is not None
    other.claim()
    other.set_state(State.DRAINING)
    board.header.allow(Capacity(1000 * MIB, CGROUP))
    board.header.held = 100 * MIB

    def left(mib: int) -> None:
        held[0] = 1000 - mib

    def make(**policy: Any) -> tuple[Guard, Memory, Callable[[int], None]]:
        guard, memory = guarded(board=board, **{"soft_limit": "900MiB", **policy})
        return guard, memory, left

    return make


def grow(guard: Guard, memory: Memory, clock: Clock) -> None:
    """From 50 to 130 MiB, at 400 MiB/s."""
    for size in range(70, 131, 20):
        clock.go(0.05)
        do(guard, memory, size * MIB, clock)


@pytest.mark.parametrize(("left", "crowded"), [(20, True), (400, False)])
def test_new_work_waits_where_the_pool_is_about_to_run_out(crowd: Any, clock: Clock, left: int, crowded: bool) -> None:
    """While another leaves; it goes on when that has given its memory back."""
    guard, memory, leave = crowd()
    leave(left)

    grow(guard, memory, clock)
    found = guard.meter.crowded
    leave(400)
    clock.go(0.06)
    guard.knock()

    assert (found, guard.meter.crowded) == (crowded, False)


def test_figures_that_are_due_do_not_put_off_the_look_at_the_room(crowd: Any, clock: Clock) -> None:
    """They are published often while a worker grows: each time it would have to grow again before it looked."""
    guard, memory, leave = crowd()
    leave(20)
    grow(guard, memory, clock)
    leave(400)
    do(guard, memory, 131 * MIB, clock)
    clock.go(0.1)
    do(guard, memory, 400 * MIB, clock)
    leave(20)

    clock.go(0.05)
    guard.meter.publish_at = clock()
    do(guard, memory, 440 * MIB, clock)

    assert guard.meter.crowded


def test_page_cache_is_no_reason_to_wait(crowd: Any, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel drops it before it kills."""
    guard, memory, _ = crowd()
    full = Capacity(1000 * MIB, CGROUP, working_set=990 * MIB, droppable=600 * MIB)
    monkeypatch.setattr(pressure, "read_capacity", lambda **_: full)

    grow(guard, memory, clock)

    assert not guard.meter.crowded


def test_nothing_waits_long(crowd: Any, clock: Clock) -> None:
    """The other may take its whole grace period: its memory is not waited for again and again."""
    guard, memory, leave = crowd()
    leave(20)
    grow(guard, memory, clock)
    assert guard.meter.crowded

    clock.go(door.WAITS_FOR)
    guard.knock()
    assert not guard.meter.crowded
    grow(guard, memory, clock)
    assert not guard.meter.crowded


def test_nothing_waits_in_a_dry_run(crowd: Any, clock: Clock) -> None:
    """It only says what it would do."""
    guard, memory, leave = crowd(dry_run=True)
    leave(20)

    grow(guard, memory, clock)

    assert not guard.meter.crowded


def shedding(crowd: Any, clock: Clock, **policy: Any) -> tuple[Guard, Callable[[int], None]]:
    """(guard, left): requests have waited in vain in a worker that may shed them."""
    guard, memory, leave = crowd(**{"shed": True, "shed_exempt": ["/healthz"], **policy})
    leave(19)
    grow(guard, memory, clock)
    clock.go(door.WAITS_FOR)
    for size in (150, 170):  # when its figures are due, it looks at the room only at the next
        do(guard, memory, size * MIB, clock)
    return guard, leave


def test_new_work_is_refused_where_it_has_waited_in_vain(crowd: Any, clock: Clock, said: Said) -> None:
    """But for exempt paths, and until there is room; counted, said once, and it waits no more."""
    guard, leave = shedding(crowd, clock)

    assert (guard.meter.crowded, guard.sheds, door.Waiting(guard).seconds()) == (True, True, 0.0)
    assert [guard.refuses(path) for path in ("/", "/healthz", "/healthz/", "/")] == [True, False, True, True]
    leave(400)
    clock.go(1.1)
    guard.knock()

    assert (guard.meter.crowded, guard.refuses("/")) == (False, False)
    assert guard.meter.counters.aborts_by_reason["shed"] == 3
    (line,) = [line for line in said() if "503" in line]
    assert line == (
        f"worker {os.getpid()} (slot 1): 19.0 MiB left up to the limit of 1000 MiB, and recycling can't keep up: new pieces of work get "
        "503 for now, except /healthz"
    )


def test_nothing_is_refused_unless_asked_for(crowd: Any, clock: Clock) -> None:
    """It goes on after it has waited."""
    guard, _ = shedding(crowd, clock, shed=False)

    assert (guard.sheds, guard.refuses("/")) == (False, False)
    assert guard.meter.counters.aborts_by_reason["shed"] == 0


def test_a_dry_run_says_what_would_be_refused(crowd: Any, clock: Clock, said: Said) -> None:
    """And lets it in."""
    guard, _ = shedding(crowd, clock, dry_run=True)

    assert (guard.meter.crowded, guard.sheds, guard.refuses("/")) == (False, False, False)
    assert len([line for line in said() if "new pieces of work would get 503 (dry run), except /healthz" in line]) == 1


def test_a_worker_that_leaves_refuses_nothing(crowd: Any, clock: Clock, recycled: list[str], board: Scoreboard) -> None:
    """What still comes to it was promised an answer."""
    guard, _ = shedding(crowd, clock)

    board.give_order(guard.slot.number, guard.slot.generation, Order.BUDGET)
    clock.go(CHECK_AGAIN)
    guard.knock()

    assert (recycled, guard.sheds, guard.refuses("/")) == (["now"], False, False)
    assert guard.meter.counters.by_reason["budget"] == 1


def test_a_worker_in_a_pool_that_is_short_looks_for_orders_soon(crowd: Any, clock: Clock, board: Scoreboard) -> None:
    """It may be below its limit, and its supervisor still send it away, which it wakes for that."""
    guard, memory, leave = crowd()
    woken: list[float] = []
    guard._report._poke = lambda: woken.append(clock())
    board.header.decided_at = 1.0
    leave(150)  # the budget leaves 50 MiB of these

    grow(guard, memory, clock)

    assert woken
    assert guard.meter.publish_at <= clock() + 0.1


def test_nothing_waits_in_a_worker_that_leaves_itself(crowd: Any, clock: Clock, recycled: list[str], board: Scoreboard) -> None:
    """What comes to it yet was promised an answer."""
    guard, memory, leave = crowd()
    leave(20)
    grow(guard, memory, clock)
    assert guard.meter.crowded

    board.give_order(guard.slot.number, guard.slot.generation, Order.GO)
    clock.go(CHECK_AGAIN)
    guard.knock()

    assert (recycled, guard.meter.crowded) == (["now"], False)


def test_nothing_waits_in_a_worker_that_nobody_can_recycle(guarded: Any, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has been said that it should go, and after that it is looked at no more: whoever waited then would wait at each request."""
    monkeypatch.setattr(pressure, "read_capacity", lambda **_: Capacity(1000 * MIB, CGROUP, working_set=910 * MIB))
    waited: list[bool] = []
    guard, memory = guarded(rss=10 * MIB, alone=True, reclaim=True, budget="100%")
    monkeypatch.setattr(reclaim, "collect", lambda **_: waited.append(guard.meter.crowded))
    monkeypatch.setattr(reclaim, "trim", lambda: None)

    for size in (25, 40, 55, 70, 85, 104):
        clock.go(0.25)
        do(guard, memory, size * MIB, clock)

    assert (waited, guard.meter.counters.recycles[0]) == ([True], 1)
    assert not guard.meter.crowded


@pytest.mark.parametrize("metric", ["private", "uss", "pss"])
def test_the_room_is_no_reason_to_sample_what_stalls(
    crowd: Any, clock: Clock, monkeypatch: pytest.MonkeyPatch, metric: str
) -> None:  # fmt: skip
    """smaps_rollup is read near the worker's own limit, and not wherever it looks at what the pool has left."""
    samples: list[None] = []
    monkeypatch.setattr(gauge, "shared_out", lambda: samples.append(None))
    guard, memory, leave = crowd(metric=metric)
    samples.clear()  # right after boot it is one
    clock.go(10)
    leave(100)

    grow(guard, memory, clock)

    assert guard.meter.held > guard.meter.alert - 16 * MIB
    assert samples == []


def test_the_room_is_no_reason_to_walk_what_is_mapped(crowd: Any, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that maps a large file has it resident, and that is not near its limit."""
    walks: list[None] = []
    monkeypatch.setattr(gauge, "file_dirty_of", lambda: walks.append(None))
    monkeypatch.setattr(gauge, "awaits_writing", lambda: 500 * MIB)
    guard, memory, leave = crowd()
    memory.clean = 300 * MIB
    leave(100)

    grow(guard, memory, clock)
    clock.go(2)
    guard.tick()

    assert walks == []


def test_a_look_that_fails_lets_work_in(crowd: Any, clock: Clock, monkeypatch: pytest.MonkeyPatch, said: Said) -> None:
    """Whoever waits for what can't be known any more would wait for nothing."""
    guard, memory, leave = crowd()
    leave(20)
    grow(guard, memory, clock)
    monkeypatch.setattr(pressure, "read_capacity", lambda **_: 1 / 0)

    clock.go(0.06)
    guard.knock()

    assert not guard.meter.crowded
    assert any("oomsafe failed in reading the pool" in line for line in said())


def test_a_log_line_is_one_line(guarded: Any, clock: Clock, said: Said) -> None:
    """A hostile name does not get into it raw."""
    guard, memory = guarded()

    do(guard, memory, 200 * MIB, clock, "GET /\r\nCRITICAL fake\x1b[2J\u2028")

    (line,) = said()
    assert line.isprintable()
    assert "GET /??CRITICAL fake?[2J" in line


def test_warnings_of_a_pool_of_one(said: Said, caplog: pytest.LogCaptureFixture) -> None:
    """Nobody else would say that a limit can't be reached."""
    Guard(Policy(soft_limit="100GiB"), capacity=HERE, memory=Memory(MIB))

    assert "is above the effective limit" in said()[0]
    assert caplog.records[0].levelno == logging.WARNING


def test_what_fails_once_a_second_keeps_nothing_from_being_decided(
    guarded: Callable[..., tuple[Guard, Memory]], recycled: list[str], clock: Clock, monkeypatch: pytest.MonkeyPatch, board: Scoreboard
) -> None:
    """A worker that can't ask how large its pool is, nor publish, still goes when it must."""
    guard, memory = guarded(board=board)

    def broken(*_: object) -> None:
        raise RuntimeError("blocking call")

    monkeypatch.setattr(guard._thresholds, "follow", broken)
    monkeypatch.setattr(report, "read_score", broken)
    for _ in range(3):
        clock.go(1)
        do(guard, memory, 150 * MIB, clock)

    assert recycled == ["now"]
    assert guard.slot.state == State.DRAINING


def test_a_worker_that_could_not_be_ready_is_so_later(monkeypatch: pytest.MonkeyPatch, board: Scoreboard) -> None:
    """Its memory could not be read when the server called first; servers call at every tick."""
    memory = Memory(50 * MIB)
    slot = board.reserve()
    assert slot
    slot.claim()
    guard = Guard(Policy(soft_limit="100MiB", jitter=0), board=board, slot=slot, capacity=HERE, memory=memory)

    def broken() -> int:
        raise RuntimeError("blocking call")

    with monkeypatch.context() as while_it_fails:
        while_it_fails.setattr(memory, "sizes", broken)
        with pytest.raises(RuntimeError):
            guard.ready()
    before = slot.state
    guard.ready()

    assert (before, slot.state, guard.meter.soft_limit) == (State.STARTING, State.SERVING, 100 * MIB)


def test_a_worker_that_asked_and_then_stopped_growing_says_so(
    guarded: Any, clock: Clock, board: Scoreboard, recycled: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Its replacement serves by then, so it goes: for its soft limit, and not for one worker too many."""
    caplog.set_level(logging.INFO)
    guard, memory = guarded(rss=20 * MIB, board=board)
    board.header.decided_at = time.monotonic()
    for size in range(20, 96, 5):
        clock.go(0.25)
        do(guard, memory, size * MIB, clock)
    assert guard.slot.state is State.WAITING

    clock.go(5)
    memory.be(60 * MIB)
    guard.tick()
    assert guard.slot.state is State.SERVING

    board.give_order(guard.slot.number, guard.slot.generation, Order.GO)
    clock.go(1)
    guard.tick()

    assert (recycled, guard.meter.counters.recycles[0]) == (["now"], 1)
    assert "recycling: anon 60.0 MiB, growing towards soft limit 100 MiB until " in caplog.text


def of_workers(said: Said) -> list[str]:
    """The lines about one worker, without those about limits."""
    return [line for line in said() if line.startswith("worker ")]


def test_an_idle_worker_goes_when_it_has_served_its_time(guarded: Any, clock: Clock, recycled: list[str], said: Said) -> None:
    """By its tick, once, with a line that has both figures and a count of its own; what it holds is no matter."""
    guard, memory = guarded(max_lifetime="6h")
    do(guard, memory, 60 * MIB, clock, "GET /")
    clock.go(6 * 3600 - 1)
    guard.tick()
    before = list(recycled)

    for _ in range(3):
        clock.go(1)
        guard.tick()

    assert (before, recycled, guard.should_recycle, guard.slot.state) == ([], ["now"], True, State.DRAINING)
    assert {reason: count for reason, count in guard.meter.counters.by_reason.items() if count} == {"max_lifetime": 1}
    (line,) = of_workers(said)
    assert f"worker {os.getpid()} (slot 0) recycling: served for 6 h > max_lifetime 6 h, after 1 piece of work" in line


def test_a_busy_worker_goes_when_it_has_served_its_time(guarded: Any, clock: Clock, recycled: list[str], said: Said) -> None:
    """At the end of a piece of work, and each one a little earlier by its own share of jitter."""
    guard, memory = guarded(max_lifetime=1000, jitter=0.5)
    own = guard.limits.lifetime
    clock.go(own + 1)

    do(guard, memory, 50 * MIB, clock)

    assert 500 <= own < 1000
    assert recycled == ["now"]
    assert "> max_lifetime " in said()[-1]
    assert "(of 16.7 min, jitter), after" in said()[-1]


def test_workers_that_have_served_their_time_take_turns(guarded: Any, clock: Clock, recycled: list[str], board: Scoreboard) -> None:
    """Where no supervisor says who goes: the next one waits until another serves in the first one's place."""
    board.header.workers = 2
    (first, _), (second, _) = (guarded(board=board, max_lifetime="1h") for _ in range(2))
    seen: list[int] = []

    def later() -> None:
        clock.go(1)
        second.tick()
        seen.append(len(recycled))

    clock.go(3600)
    for guard in (first, second):
        guard.tick()
    later()
    board.release(first.slot.number)
    later()  # nobody has brought up another yet
    replacement, _ = guarded(board=board)
    replacement.slot.set_state(State.STARTING)
    later()
    replacement.slot.set_state(State.SERVING)
    later()

    assert seen == [1, 1, 1, 2]


def test_a_worker_that_has_served_its_time_asks_its_supervisor(
    guarded: Any, clock: Clock, recycled: list[str], said: Said, board: Scoreboard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And serves on until it is told to go; then its line says why."""
    monkeypatch.setattr(neighbours, "time", SimpleNamespace(monotonic=clock))
    guard, memory = guarded(board=board, max_lifetime="1h")
    board.header.decided_at = clock()
    before = board.roll()[0]
    clock.go(3600)
    board.header.decided_at = clock()
    guard.tick()
    asks = board.roll()[0]
    for _ in range(10):
        clock.go(1)
        board.header.decided_at = clock()
        do(guard, memory, 60 * MIB, clock)
    waits = (board.roll()[0].state, list(recycled))
    board.give_order(guard.slot.number, guard.slot.generation, Order.GO)
    clock.go(1)
    board.header.decided_at = clock()

    guard.tick()

    assert (before.aged, before.state, asks.aged, asks.state) == (False, State.SERVING, True, State.WAITING)
    assert waits == (State.WAITING, [])
    assert recycled == ["now"]
    assert "served for 60.2 min > max_lifetime 60 min" in said()[-1]


def test_a_lifetime_needs_no_figures(guarded: Any, clock: Clock, recycled: list[str]) -> None:
    """Where memory can't be read, the clock is enough."""
    guard, _ = guarded(rss=None, max_lifetime="1h")
    clock.go(3600)

    guard.tick()

    assert recycled == ["now"]


def test_a_lifetime_in_a_dry_run(guarded: Any, clock: Clock, recycled: list[str], said: Said) -> None:
    """It is told, counted, and nothing is done."""
    guard, _ = guarded(max_lifetime="1h", dry_run=True)
    for _ in range(3):
        clock.go(3600)
        guard.tick()

    assert (recycled, guard.should_recycle, guard.slot.state) == ([], False, State.SERVING)
    assert guard.meter.counters.by_reason["max_lifetime"] == 1
    (line,) = of_workers(said)
    assert "would be recycled (dry run): served for 60 min > max_lifetime 60 min" in line


def test_a_lifetime_where_nothing_recycles(guarded: Any, clock: Clock, said: Said) -> None:
    """It is said once, and what the process holds later is seen all the same."""
    guard, memory = guarded(alone=True, max_lifetime="1h")
    for _ in range(3):
        clock.go(3600)
        guard.tick()

    do(guard, memory, 200 * MIB, clock)

    by_age, by_memory = of_workers(said)
    assert guard.should_recycle
    assert "should be recycled, and nothing here can: served for 60 min" in by_age
    assert "should be recycled, and nothing here can: anon 200 MiB > soft limit 100 MiB" in by_memory


def test_a_lifetime_is_no_reason_to_leave_where_nobody_comes(
    recycled: list[str], clock: Clock, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its parent is gone."""
    policy = Policy(soft_limit="100MiB", max_lifetime="1h", jitter=0)
    guard = Guard(policy, recycle=lambda: recycled.append("now"), capacity=HERE, memory=Memory(MIB), parent=os.getppid())
    monkeypatch.setattr(neighbours.os, "getppid", lambda: 1)
    for _ in range(3):
        clock.go(3600)
        guard.tick()

    assert recycled == []
    (line,) = of_workers(said)
    assert "stays, whatever it holds and however long it has served" in line


def test_a_lifetime_that_is_over_before_a_replacement_serves(
    guarded: Any, clock: Clock, recycled: list[str], said: Said, board: Scoreboard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not used, or one would boot all the time: one line for the whole pool, with both figures."""
    monkeypatch.setattr(Slot, "age", property(lambda _: 90.0))
    guards = [guarded(board=board, max_lifetime="1m")[0] for _ in range(2)]
    for _ in range(3):
        clock.go(3600)
        for guard in guards:
            guard.tick()

    assert recycled == []
    (line,) = [line for line in said() if "is not used" in line]
    assert line.startswith("max_lifetime 60 s is not used: a worker takes 90 s to boot")


def test_a_lifetime_says_nothing_of_what_a_worker_needs(guarded: Any, clock: Clock, board: Scoreboard) -> None:
    """That others had settled above their limit is not forgotten when one goes for its age."""
    board.header.workers, board.header.settled = 1, 2
    guard, _ = guarded(board=board, max_lifetime="1h")
    clock.go(3600)

    guard.tick()

    assert (guard.should_recycle, board.header.settled) == (True, 2)


def order(guard: Any) -> None:
    """As its supervisor passes on what an operator has ordered."""
    layout.write(guard.slot._memory, guard.slot._at + layout.OPERATOR_AT, layout.OPERATOR, 1)


def test_an_operator_s_order(guarded: Any, clock: Clock, recycled: list[str], said: Said) -> None:
    """An idle worker goes at its next tick, below its limits and before its min_lifetime, and counts it."""
    guard, _ = guarded(min_lifetime=3600)
    clock.go(1)
    guard.tick()
    assert recycled == []

    order(guard)
    for _ in range(3):
        clock.go(1)
        guard.tick()

    assert (recycled, guard.should_recycle, guard.meter.counters.by_reason["operator"]) == (["now"], True, 1)
    (line,) = of_workers(said)
    assert "recycling: by an operator's order: anon " in line


def test_an_operator_s_order_where_nothing_recycles(guarded: Any, clock: Clock, said: Said) -> None:
    """It is said once, and the process serves on, with its memory watched as before."""
    guard, memory = guarded(alone=True)
    order(guard)
    for _ in range(3):
        clock.go(1)
        guard.tick()
    assert not guard.should_recycle

    do(guard, memory, 200 * MIB, clock)

    by_order, by_memory = of_workers(said)
    assert "should be recycled by an operator's order, and nothing here can" in by_order
    assert "should be recycled, and nothing here can: anon 200 MiB > soft limit 100 MiB" in by_memory


@pytest.fixture
def trims(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What each trim leaves, in MiB, the next one last; when it is empty, trims give nothing back."""
    return []


@pytest.fixture
def idle(guarded: Any, clock: Clock, trims: list[int], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Guard, Memory]]:
    """Makes a guard whose limit is far away, and whose trims have paid."""

    def make(paid: bool = True, **policy: Any) -> tuple[Guard, Memory]:
        guard, memory = guarded(**{"soft_limit": "900MiB", "reclaim": True, **policy})
        monkeypatch.setattr(reclaim, "trim", lambda: memory.be(trims.pop() * MIB if trims else memory.now))
        monkeypatch.setattr(reclaim, "collect", lambda **_: None)  # the tests' own heap is large: it would take too long
        if paid:
            guard.meter.counters.reclaims, guard.meter.counters.reclaimed = 1, 50 * MIB
        return guard, memory

    return make


def rests(guard: Guard, clock: Clock, seconds: float) -> None:
    """So long without work."""
    for _ in range(int(seconds)):
        clock.go(1.0)
        guard.tick()


def test_an_idle_worker_gives_back(idle: Any, clock: Clock, trims: list[int], said: Said) -> None:
    """Far below its limit, once it has had no work for a while; and not again before there was some."""
    guard, memory = idle()
    trims[:] = [60]
    do(guard, memory, 300 * MIB, clock)

    rests(guard, clock, IDLE_FOR - 1)
    before = guard.meter.counters.reclaims
    rests(guard, clock, 60)

    assert (before, guard.meter.counters.reclaims, guard.meter.rss) == (1, 2, 60 * MIB)
    assert any("which is idle, reclaimed 240 MiB" in line for line in said())


def test_idle_attempts_that_give_nothing_back_become_rare(idle: Any, clock: Clock) -> None:
    """With work between them: the pause doubles."""
    guard, memory = idle()
    tried = []
    for second in range(600):
        before = guard.meter.counters.reclaims
        if second % 8 == 0:
            do(guard, memory, 300 * MIB, clock)
        rests(guard, clock, 1)
        if guard.meter.counters.reclaims > before:
            tried.append(second)

    pauses = [later - before for before, later in pairwise(tried)]
    assert len(tried) >= 4
    assert all(later >= 1.5 * before for before, later in pairwise(pauses))


@pytest.mark.parametrize("why", ["never paid", "off", "dry run", "has not grown", "is at work"])
def test_an_idle_worker_leaves_its_memory_alone(idle: Any, clock: Clock, trims: list[int], why: str) -> None:
    """Where trims have never paid, or nobody wants them, or there is nothing to be had, or something is in flight."""
    policy = {"off": {"reclaim": False}, "dry run": {"dry_run": True}}.get(why, {})
    guard, memory = idle(paid=why != "never paid", **policy)
    trims[:] = [60]
    do(guard, memory, (54 if why == "has not grown" else 300) * MIB, clock)
    before = guard.meter.counters.reclaims
    if why == "is at work":
        guard.work("a long one").__enter__()

    rests(guard, clock, 60)

    assert guard.meter.counters.reclaims == before


def test_what_recycled_workers_gave_back_is_why_idle_ones_do(idle: Any, board: Scoreboard, clock: Clock, trims: list[int]) -> None:
    """The scoreboard says that a trim at their ends has paid."""
    guard, memory = idle(paid=False, board=board)
    trims[:] = [60]
    for number in range(3):
        one = worker(100, kept=80, number=number)
        board.header.note_retirement(replace(one, parts=replace(one.parts, malloc_kept=(60 if number else 0) * MIB)))
    do(guard, memory, 300 * MIB, clock)

    rests(guard, clock, IDLE_FOR + 1)

    assert guard.meter.rss == 60 * MIB
