"""Which workers get no more memory while several grow at once; and that it is put on them, and taken off, in real processes."""

from __future__ import annotations

import itertools
import math
import resource
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.children import Child, Line
from unit.scripted import CGROUP, Clock

from oomsafe.kernel.kept_sizes import KeptSizes
from oomsafe.kernel.process import held_of, sizes_of, start_time
from oomsafe.kernel.rlimit import UNLIMITED, soft_of
from oomsafe.policy.caps import (
    AHEAD,
    AHEAD_AT_MOST,
    FAST,
    JUMPS,
    MUCH,
    SHARED,
    STEADY,
    Grower,
    Window,
    applies,
    ends,
    growers,
    grown_by,
    kept_of,
    may_map,
    moved,
    next_pace,
    pause,
    share_of,
    steady_pace,
    to_cap,
)
from oomsafe.policy.limits import Capacity
from oomsafe.policy.settings import Policy
from oomsafe.policy.state import State
from oomsafe.scoreboard.board import Scoreboard
from oomsafe.scoreboard.layout import IN_USE, Counters
from oomsafe.scoreboard.slot import CAPPED_FOR, Cap, Figures, Slot
from oomsafe.supervisor import caps
from oomsafe.supervisor.caps import Caps

MIB = 1 << 20
HARD = 300 * MIB


def grower(generation: int, held: int, pace: int = 1000, granted: int = 0) -> Grower:
    """In MiB, and MiB/s."""
    grown = max(0, held - 25) * MIB
    return Grower(generation, held * MIB, grown, granted * MIB, float(pace * MIB), grown)


def leaker(generation: int, held: int, steady: int = 20, pace: int = 100, granted: int = 0) -> Grower:
    """The same, of many small requests: the one in flight has grown by a MiB."""
    return grower(generation, held, pace, granted)._replace(work=MIB, steady=float(steady * MIB))


@pytest.mark.parametrize(
    ("workers", "left", "expected"),
    [
        pytest.param([grower(1, 100)], 200, [], id="one, and what it may take is there"),
        pytest.param([grower(1, 299)], 2, [], id="one right below its hard limit"),
        pytest.param([grower(1, 240)], 31, [], id="one, and there is as much as it takes until it is measured again"),
        pytest.param([grower(1, 240)], 29, [1], id="one, and there is not"),
        pytest.param([grower(1, 100), grower(2, 120)], 150, [], id="two, and there is room"),
        pytest.param([grower(1, 130), grower(2, 140)], 100, [2], id="two, and there is not: the larger"),
        pytest.param([grower(1, 130), grower(2, 140)], 50, [2, 1], id="not even for one"),
        pytest.param([grower(1, 130), grower(2, 140)._replace(work=MUCH)], 100, [2], id="what one has grown by before"),
        pytest.param([grower(1, 120), grower(2, 140, granted=100)], 150, [2, 1], id="what is granted will be taken"),
        pytest.param([grower(1, 50), grower(2, 140)], 50, [2], id="never one within its share, whose growth counts"),
        pytest.param([grower(1, 40), grower(2, 280)], 25, [], id="small requests beside it don't"),
        pytest.param([grower(1, 130, 1), grower(2, 120, 1)], -10, [], id="nobody grows fast: that is for others"),
        pytest.param([leaker(1, 220), leaker(2, 210)], 3, [], id="two leak, and recycling has a moment yet"),
        pytest.param([leaker(1, 220), leaker(2, 210)], 1, [1], id="two leak, and memory runs out within the look-ahead"),
        pytest.param([leaker(1, 220, granted=50), leaker(2, 210)], 3, [], id="what a leak has mapped it does not fill at once"),
        pytest.param([leaker(1, 220, 10), leaker(2, 210, 10)], 0, [], id="two that leak too slowly for this"),
        pytest.param([leaker(1, 90), leaker(2, 220)], -9, [2], id="never a leak within its share"),
        pytest.param([leaker(1, 220)._replace(work=5 * MIB), grower(2, 120)], 70, [1], id="a small balloon beside a larger one"),
        pytest.param([leaker(1, 220), grower(2, 120)], 30, [2], id="a balloon beside a leak: the balloon, though it is smaller"),
        pytest.param([leaker(1, 220), grower(2, 120)], 31, [], id="it is alone: it has what there is"),
    ],
)
def test_who_is_capped(workers: list[Grower], left: int, expected: list[int]) -> None:
    """One row a situation; each may hold 100 MiB less one byte whatever the others do."""
    kept = 20 * MIB
    growing = growers(workers)
    found = to_cap(growing, 100 * MIB - 1, left * MIB + (kept if any(one.balloons for one in growing) else 0), kept, HARD, 0.01)
    assert [one.generation for one in found] == expected


sizes, paces = st.integers(0, HARD), st.floats(0, 1e11)
workers_of_any_kind = st.lists(
    st.builds(Grower, st.integers(), sizes, sizes, sizes, paces, sizes, paces, st.booleans(), balloons=st.just(False)), max_size=6
)


@given(workers_of_any_kind, st.integers(-HARD, 4 * HARD), st.integers(0, HARD), st.integers(0, HARD), st.floats(0, 1))
def test_the_others_find_what_they_may_take(workers: list[Grower], left: int, kept: int, share: int, since: float) -> None:
    """Laws: nobody within its share or slow is capped; balloons first; and either the rest fits, or all that grow are capped."""
    growing = growers(workers)
    may = [one for one in growing if one.held > share]
    capped = to_cap(growing, share, left, kept, HARD, since)

    assert all(one.steady >= FAST or (min(one.grown, 4 * one.work) >= MUCH and (one.pace >= FAST or one.capped)) for one in capped)
    assert capped == may[: len(capped)]
    ahead, rest = min(AHEAD_AT_MOST, max(AHEAD, 2 * since)), [one for one in growing if one not in capped]
    jumps = JUMPS if sum(one.balloons for one in growing) > 1 else 0.0
    takes = sum(one.takes(HARD, ahead, jumps) for one in rest) + sum(one.takes(HARD, ahead, capped=True) for one in capped)
    assert takes <= left - (kept if any(one.balloons for one in may) else 0) or len(capped) == len(may) or not may[len(capped)].balloons
    assert takes <= left or len(capped) == len(may)


@given(workers_of_any_kind, st.integers(0, 4 * HARD), st.integers(0, HARD), st.floats(0, 1))
def test_one_that_is_alone_fills_what_is_left(workers: list[Grower], left: int, kept: int, since: float) -> None:
    """Law: with what it may map it is not refused while there is more than what is kept, nor gets more than that; with others, nothing."""
    growing = growers(workers)
    more = may_map(growing, left, kept, HARD, since)
    balloons = [one for one in growing if one.balloons]
    if len(balloons) != 1:
        assert more == 0
    else:
        others = sum(one.takes(HARD, AHEAD_AT_MOST, 0.0) for one in growing if one not in balloons)
        assert left - kept - others <= more + balloons[0].granted
        assert more == 0 or more + balloons[0].granted <= left - kept


@given(workers_of_any_kind, st.integers(0, 4 * HARD), st.integers(0, HARD), st.floats(0, 1))
def test_a_leak_is_for_recycling(workers: list[Grower], left: int, kept: int, since: float) -> None:
    """Law: while nothing in flight has grown by much, nobody is refused before the memory would run out within the look-ahead."""
    leaking = [one._replace(work=min(one.work, MUCH - 1)) for one in workers]
    enough = sum(one.steady for one in leaking) * AHEAD_AT_MOST <= left
    assert not (enough and to_cap(growers(leaking), 0, left, kept, HARD, since))


@given(st.integers(1, 1 << 44), st.integers(0, 1 << 40), st.lists(st.integers(0, 1 << 44), min_size=1, max_size=9))
def test_where_memory_is_short_somebody_is_above_the_share(room: int, supervisor: int, held: list[int]) -> None:
    """Law: while all are within their share, they are within the room."""
    share = share_of(room, supervisor, len(held))
    assert any(one > share for one in held) or sum(held) <= max(0, room * SHARED - supervisor)


@given(workers_of_any_kind, st.integers(-HARD, 1 << 44))
def test_how_often(workers: list[Grower], left: int) -> None:
    """Law: never more than 200 times a second, 50 while nobody grows, and at least ten times."""
    assert 0.02 <= pause([], left) <= 0.1
    assert 0.005 <= pause(workers, left) <= pause([], left)


def test_figures() -> None:
    """Where it applies, what is kept, how a pace fades, and when a cap may end."""
    assert applies(HARD, 2, 30 * MIB, 512 * MIB)
    assert not applies(HARD, 2, 30 * MIB, 630 * MIB)
    assert not applies(HARD, 1, 30 * MIB, 100 * MIB)
    assert not applies(HARD, 4, 30 * MIB, None)
    assert [kept_of(size * MIB) // MIB for size in (100, 500, 4000)] == [8, 20, 64]
    assert next_pace(100.0, 0, 0.1) == 50.0
    assert next_pace(100.0, 30, 0.1) == 300.0
    assert next_pace(100.0, 30, 0.0) == 100.0
    assert next_pace(100.0, -1, 0.1) == 50.0
    assert next_pace(100.0, -5 * MIB, 0.1) == 0.0
    assert grown_by([70, 90], False, 100, Window((0.0, 40), (0.0, 40)), 95) == 30
    assert grown_by([70, 90], True, 100, Window((0.0, 40), (0.0, 40)), 95) == 55
    assert grown_by([], False, 100, Window((0.0, 40), (0.0, 40)), 95) == 0
    assert grown_by([130], True, 100, Window((0.0, 99), (0.0, 99)), 95) == 0
    assert [ends(100, 100, 0.1), ends(100, 100, 0.2), ends(100, 80, 0.1)] == [False, True, True]


@given(st.lists(st.tuples(st.floats(0.001, 2 * STEADY), st.integers(0, 10 * MIB)), min_size=1, max_size=40))
def test_steady_growth(steps: list[tuple[float, int]]) -> None:
    """Laws: it lies between the slowest and the fastest growth of what it covers, and is measured over STEADY seconds and not much more."""
    now, held = 100.0, 50 * MIB
    window = moved(None, held, now)
    assert steady_pace(window, held, now) == 0.0
    passed = [(now, held)]
    for seconds, grown in steps:
        now, held = now + seconds, held + grown
        passed.append((now, held))
        window = moved(window, held, now)
    pace = steady_pace(window, held, now)
    covered = [one for one in passed if one[0] >= window.since[0]]
    paces = [(after - before) / (late - early) for (early, before), (late, after) in itertools.pairwise(covered)]
    assert pace == 0.0 or min(paces) - 1 <= pace <= max(paces) + 1
    assert pace > 0.0 or now - window.since[0] < STEADY or held == window.since[1]
    assert now - window.since[0] <= 4 * STEADY
    assert steady_pace(window, 0, now) == 0.0


# --- in real processes


class Worker:
    """A process on a scoreboard that grows by as many MiB as it is told, and may map whatever it wants."""

    def __init__(self, board: Scoreboard, hard: int | None = HARD) -> None:
        slot = board.reserve()
        assert slot is not None
        self.slot: Slot = slot
        self.child = Child(self._serve)
        slot.publish(Figures(hard=hard), Counters())
        slot.set_state(State.SERVING)
        self.pid, self.started = self.child.pid, start_time(self.child.pid) or 0
        board.born(slot.number, slot.generation, self.pid)

    @staticmethod
    def _serve(line: Line) -> None:
        kept: list[bytes] = []
        with open("/proc/self/statm") as statm:
            data = int(statm.read().split()[5]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_DATA, (data + HARD, resource.RLIM_INFINITY))
        while True:
            mib = line.hear()
            try:
                kept = [] if mib < 0 else [*kept, b"x" * (mib * MIB)]
                line.say("has")
            except MemoryError:
                line.say("refused")

    def begin(self, *, measured: bool = True) -> None:
        """A request, or what stays open and is not measured."""
        _, write, cells = self.slot.cells()
        sizes = sizes_of(self.pid)
        assert sizes is not None
        write(cells[0], 1, time.monotonic(), sizes[0] if measured else -1, b"/", 1)

    def end(self) -> None:
        """The request has been answered."""
        memory, _, cells = self.slot.cells()
        memory[cells[0] + IN_USE] = 0

    def grow(self, mib: int) -> str:
        """By so much; less than 0: give all of it back."""
        self.child.say(mib)
        return str(self.child.hear())


class Pool:
    """Workers that are watched, in a room that a test sets."""

    def __init__(self, board: Scoreboard, kept: KeptSizes, monkeypatch: pytest.MonkeyPatch) -> None:
        self.board = board
        self.kept = kept
        self.clock = Clock()
        self.room = 400
        self.caps = Caps(board, kept)
        self.hard = (held_of() or 0) + HARD
        """A worker here is a fork of this process."""
        self.workers: list[Worker] = []
        monkeypatch.setattr(caps.time, "monotonic", self.clock)
        monkeypatch.setattr(caps, "read_capacity", lambda **_: self.capacity)

    @property
    def capacity(self) -> Capacity:
        """What the kernel says."""
        limit = 500 * MIB
        return Capacity(limit, CGROUP, limit - self.room * MIB, 0, max(1, len(self.workers)), others=0)

    def follow(self, **policy: Any) -> None:
        """A second has passed."""
        self.kept.follow([(one.pid, one.started) for one in self.workers])
        self.caps.follow(Policy(hard_limit="300MiB", soft_limit="200MiB", **policy), self.hard, self.capacity)

    def watch(self, room: int, seconds: float = 0.01) -> float:
        """Once more, with so many MiB left."""
        self.clock.go(seconds)
        self.room = room
        return self.caps.watch()

    def softs(self) -> list[int]:
        """The workers' limits."""
        return [soft_of(one.pid) or 0 for one in self.workers]


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Pool]]:
    """pool(workers): one that is watched."""
    board, kept = Scoreboard.private(8), KeptSizes()
    made: list[Worker] = []

    def make(*hards: int | None) -> Pool:
        found = Pool(board, kept, monkeypatch)
        for hard in hards:
            made.append(Worker(board, hard))
            found.workers.append(made[-1])
            made[-1].grow(0)
        return found

    yield make
    kept.close()
    for one in made:
        one.child.__exit__()


def test_one_that_is_alone_has_what_there_is(pool: Callable[..., Pool]) -> None:
    """However fast it grows, and what becomes free meanwhile, too; no more once another one balloons beside it."""
    watched = pool(HARD, HARD, HARD)
    watched.follow()
    watched.watch(400)
    fast, beside, _ = watched.workers
    fast.grow(150)
    _, *others = watched.softs()

    def may_map() -> int:
        found = watched.kept.mapped_if(fast.pid, fast.started)
        assert found is not None
        assert watched.softs()[0] == fast.slot.cap.most
        return round((fast.slot.cap.most - found[0]) / MIB)

    watched.watch(100)  # at 15 GiB/s it may take all that before it is measured again
    assert may_map() == 80
    assert fast.grow(50) == "has"
    watched.watch(50)
    assert may_map() == 30
    assert fast.grow(35) == "refused"
    watched.watch(70)
    assert may_map() == 50
    assert watched.softs()[1:] == others
    beside.grow(100)
    watched.watch(60)
    assert may_map() == 0
    assert fast.slot.cap.before == watched.softs()[2]


def test_the_larger_gets_no_more_until_there_is_room(pool: Callable[..., Pool]) -> None:
    """Its limit comes down to what it has mapped, it reads so on its slot, and gets back what it had."""
    watched = pool(HARD, HARD, HARD)
    watched.follow()
    watched.watch(400)
    before = watched.softs()
    larger, smaller, _ = watched.workers
    assert (larger.grow(200), smaller.grow(190)) == ("has", "has")

    assert watched.watch(150) == 0.005

    first, *others = watched.softs()
    cap = larger.slot.cap
    assert (first, others) == (cap.most, before[1:])
    assert cap.before == before[0]
    assert cap.room == 150 * MIB
    assert cap.holds(watched.clock.now)
    assert not cap.holds(watched.clock.now + CAPPED_FOR)
    assert (larger.grow(40), smaller.grow(5)) == ("refused", "has")
    assert larger.grow(-1) == "has"

    watched.watch(240)

    assert watched.softs() == before
    assert not larger.slot.cap.holds(watched.clock.now)
    assert larger.grow(40) == "has"


def leak(pool: Pool, room: int, *, total: int = 200, mib: int = 4, each: float = 0.2) -> None:
    """Each worker leaks so many MiB in all, so many with each small request, and there are so many seconds from one to the next."""
    for _ in range(total // mib):
        for one in pool.workers:
            one.begin()
            assert one.grow(mib) == "has"
        pool.watch(room, each / 2)
        for one in pool.workers:
            one.end()
        pool.watch(room, each / 2)


@pytest.mark.parametrize(
    ("room", "mib", "each", "capped"),
    [
        pytest.param(30, 4, 0.2, False, id="20 MiB/s"),
        pytest.param(30, 10, 0.5, False, id="20 MiB/s by requests that leak 10 MiB"),
        pytest.param(30, 4, 0.05, False, id="80 MiB/s"),
        pytest.param(1, 4, 0.2, True, id="20 MiB/s, and memory runs out within the look-ahead"),
    ],
)
def test_a_leak_is_refused_nothing(pool: Callable[..., Pool], room: int, mib: int, each: float, capped: bool) -> None:
    """What it has grown by is many requests'. The room is that of a pool that has just come to its budget."""
    watched = pool(HARD, HARD)
    watched.follow()
    watched.watch(400)
    try:
        leak(watched, room, mib=mib, each=each)
        refused = False
    except AssertionError:
        refused = True
    assert (refused, any(one.slot.cap.most for one in watched.workers)) == (capped, capped)


@pytest.mark.parametrize("how", ["a request", "a websocket", "a thread"])
def test_a_balloon_after_a_leak(pool: Callable[..., Pool], how: str) -> None:
    """In two workers at once: the larger gets no more, because both together may take more than there is."""
    watched = pool(HARD, HARD)
    watched.follow()
    watched.watch(400)
    leak(watched, 100, total=160)
    watched.watch(100, seconds=10)
    watched.watch(100, seconds=10)
    for one, mib in zip(watched.workers, (60, 40), strict=True):
        if how != "a thread":
            one.begin(measured=how == "a request")
        assert one.grow(mib) == "has"

    watched.watch(150)

    assert [one.slot.cap.most > 0 for one in watched.workers] == [True, False]


def test_what_it_gives_back_it_does_not_get_again(pool: Callable[..., Pool]) -> None:
    """While there is no room: an old table, say, once the new one is filled."""
    watched = pool(HARD, HARD)
    watched.follow()
    watched.watch(400)
    larger, before = watched.workers[0], watched.softs()
    larger.grow(250)
    watched.watch(20)
    first = larger.slot.cap
    larger.grow(-1)
    larger.grow(210)
    watched.watch(5)

    assert larger.slot.cap.most < first.most - 20 * MIB
    assert watched.softs()[0] == larger.slot.cap.most
    assert larger.slot.cap.before == before[0]


def test_what_the_worker_has_set_since_stays(pool: Callable[..., Pool]) -> None:
    """When the cap ends."""
    watched = pool(HARD, HARD)
    watched.follow()
    watched.watch(400)
    larger = watched.workers[0]
    larger.grow(250)
    watched.watch(20)
    assert larger.slot.cap.most == watched.softs()[0]
    resource.prlimit(larger.pid, resource.RLIMIT_DATA, (123 * MIB, resource.RLIM_INFINITY))

    watched.watch(300, seconds=0.3)

    assert watched.softs()[0] == 123 * MIB


def test_a_cap_lasts_until_the_worker_has_noticed(pool: Callable[..., Pool]) -> None:
    """It may have had no processor."""
    watched = pool(HARD, HARD)
    watched.follow()
    watched.watch(400)
    watched.workers[0].grow(250)
    watched.watch(20)
    capped = watched.softs()

    watched.watch(400)
    assert watched.softs() == capped
    watched.watch(400, seconds=0.2)
    assert watched.softs() != capped


def test_a_cap_ends_though_there_is_no_room(pool: Callable[..., Pool]) -> None:
    """When the worker has not grown for some seconds: it may be another one that needs the memory by then."""
    watched = pool(HARD, HARD)
    watched.follow()
    watched.watch(400)
    watched.workers[0].grow(250)
    watched.watch(20)
    capped = watched.softs()

    watched.watch(20, seconds=2.9)
    assert watched.softs() == capped
    watched.watch(20, seconds=0.2)
    assert watched.softs() != capped


@pytest.mark.parametrize("value", [UNLIMITED, 20 * MIB])
def test_a_limit_that_is_not_the_workers_own_is_left_alone(pool: Callable[..., Pool], value: int) -> None:
    """While it starts a process, that would inherit the cap; and what is lower stays."""
    watched = pool(HARD, HARD)
    watched.follow()
    watched.watch(400)
    larger = watched.workers[0]
    larger.grow(250)
    raw = value if value < UNLIMITED else resource.RLIM_INFINITY
    resource.prlimit(larger.pid, resource.RLIMIT_DATA, (raw, resource.RLIM_INFINITY))

    watched.watch(20)

    assert watched.softs()[0] == value
    assert larger.slot.cap.most == 0


@pytest.mark.parametrize(
    ("hards", "policy"),
    [
        pytest.param([HARD], {}, id="one worker"),
        pytest.param([HARD, HARD], {"dry_run": True}, id="a dry run"),
        pytest.param([None, None], {}, id="workers that have refused it"),
    ],
)
def test_where_nothing_is_watched(pool: Callable[..., Pool], hards: list[int | None], policy: dict[str, Any]) -> None:
    """And so costs nothing."""
    watched = pool(*hards)
    watched.follow(**policy)
    assert watched.watch(1) == math.inf


def test_what_is_watched_no_more_is_let_go(pool: Callable[..., Pool]) -> None:
    """The policy has changed."""
    watched = pool(HARD, HARD)
    watched.follow()
    watched.watch(400)
    before = watched.softs()
    watched.workers[0].grow(250)
    watched.watch(20)
    assert watched.softs() != before

    watched.follow(dry_run=True)

    assert watched.softs() == before
    assert not watched.caps.others_serve()


def test_a_reload_without_a_hard_limit(pool: Callable[..., Pool]) -> None:
    """Nothing is watched any more, and who was capped is not."""
    watched = pool(HARD, HARD)
    assert not watched.caps.others_serve()
    watched.follow()
    assert not watched.caps.others_serve()
    watched.workers[0].slot.set_state(State.WAITING)
    assert watched.caps.others_serve()
    watched.watch(400)
    before = watched.softs()
    watched.workers[0].grow(250)
    watched.watch(20)

    watched.caps.follow(Policy(), None, watched.capacity)

    assert (watched.softs(), watched.watch(20), watched.caps.others_serve()) == (before, math.inf, False)


def test_workers_of_another_user(pool: Callable[..., Pool], monkeypatch: pytest.MonkeyPatch, said: Callable[[], list[str]]) -> None:
    """It is said once, and tried no more."""
    watched = pool(HARD, HARD)

    def refuse(pid: int) -> int:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(caps, "soft_of", refuse)
    watched.follow()
    watched.follow()

    assert watched.watch(1) == math.inf
    assert [line for line in said() if "may not change its workers' limits" in line] != []


def test_a_worker_that_is_gone(pool: Callable[..., Pool]) -> None:
    """Nobody else is capped in its place."""
    watched = pool(HARD, HARD)
    watched.follow()
    watched.watch(400)
    watched.workers[0].grow(250)
    watched.watch(20)
    watched.workers[0].child.kill()

    assert watched.watch(5, seconds=0.3) > 0


def test_a_cap_from_a_torn_or_forged_slot_ends() -> None:
    """What is further away than a supervisor puts it is not in force."""
    assert Cap(1, 2, 3, 10.0).holds(9.9)
    assert not Cap(1, 2, 3, 10.0).holds(9.0)
    assert not Cap(1, 2, 3, 10.0).holds(10.1)
    assert Cap(1, 2, 3, 10.0).holds(10.1, after=1.0)
    assert not Cap(0, 2, 3, 10.0).holds(9.9)
    assert not Cap(1, 2, 3, math.nan).holds(9.9)
