"""Which workers a pool above its budget recycles, and when it recycles none."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.scripted import CGROUP

from oomsafe.policy.budget import (
    CAN_HELP,
    KNOWN_AFTER,
    NEEDED_FOR,
    OFTEN,
    RECUR,
    SELDOM,
    Candidate,
    Life,
    Pool,
    Watch,
    Why,
    is_level,
    lived,
    next_check,
    plan,
)
from oomsafe.policy.limits import Capacity
from oomsafe.policy.recycle import Order
from oomsafe.policy.settings import Policy
from oomsafe.policy.state import State
from oomsafe.policy.trend import Growth
from oomsafe.scoreboard.layout import Counters
from oomsafe.scoreboard.slot import Figures
from oomsafe.supervisor.budget import Budget
from oomsafe.supervisor.replacements import Reading

MIB = 1 << 20


def worker(generation: int, gained: int, **more: object) -> Candidate:
    """One that serves, and held 30 MiB after its boot; `gained` in MiB."""
    return Candidate(generation, True, own=(30 + gained) * MIB, gained=gained * MIB, **more)  # type: ignore[arg-type]


def booting(generation: int) -> Candidate:
    """One that does not serve yet."""
    return Candidate(generation, False, own=10 * MIB)


def leaving(generation: int, gained: int) -> Candidate:
    """One that drains."""
    return worker(generation, gained)._replace(serves=False, leaves=True)


#: 20 MiB above a budget of 450, of which 462 are far above, with 512 in all.
ABOVE = Pool(470 * MIB, 460 * MIB, room=512 * MIB, wanted=4)
FAR = ABOVE._replace(used=500 * MIB)
FOUR = [worker(1, 60), worker(2, 80), worker(3, 40), worker(4, 50)]


@pytest.mark.parametrize(
    ("pool", "workers", "victims"),
    [
        pytest.param(ABOVE._replace(used=460 * MIB), FOUR, (), id="within its budget"),
        pytest.param(ABOVE, FOUR, (2,), id="the one with the most of its own"),
        pytest.param(ABOVE, [*FOUR[:3], FOUR[3]._replace(idle=True)], (4,), id="an idle one first"),
        pytest.param(ABOVE, [*FOUR[:3], FOUR[3]._replace(over=True)], (4,), id="else one above its soft limit"),
        pytest.param(ABOVE, [FOUR[0]._replace(over=True), *FOUR[1:3], FOUR[3]._replace(idle=True)], (4,), id="idle before above"),
        pytest.param(ABOVE, [*FOUR[:3], worker(4, 1, idle=True)], (2,), id="not an idle one that has nothing to give"),
        pytest.param(ABOVE, [*FOUR[1:], leaving(5, 60)], (), id="what leaves will be free in a moment"),
        pytest.param(ABOVE, [*FOUR[1:], booting(5)], (), id="one after the other: another boots"),
        pytest.param(ABOVE, FOUR[:3], (), id="another has not been started yet"),
        pytest.param(ABOVE._replace(turns=2), FOUR[:3], (2,), id="two may be away"),
        pytest.param(FAR, FOUR, (2,), id="far above, and one is enough"),
        pytest.param(FAR._replace(used=600 * MIB), FOUR, (2, 1), id="far above: as many as it takes, but half of them at most"),
        pytest.param(FAR._replace(used=600 * MIB), [*FOUR[1:], booting(5)], (2,), id="far above, and another boots"),
        pytest.param(FAR._replace(used=700 * MIB), [*FOUR[2:], leaving(5, 80), leaving(6, 90)], (), id="far above, and half have gone"),
        pytest.param(ABOVE._replace(wanted=2), [FOUR[0], booting(5)], (), id="never the last one that serves"),
        pytest.param(FAR._replace(wanted=1), [FOUR[0]], (), id="nor the only one"),
        pytest.param(ABOVE._replace(used=None), FOUR, (), id="what it holds is not known"),
        pytest.param(ABOVE._replace(budget=None), FOUR, (), id="nor what it may"),
        pytest.param(ABOVE._replace(used=450 * MIB, ahead=11 * MIB), FOUR, (2,), id="it will be above in a moment"),
        pytest.param(ABOVE._replace(used=450 * MIB, ahead=10 * MIB), FOUR, (), id="not in a moment"),
        pytest.param(ABOVE._replace(sustain=1), FOUR, (), id="not for a moment's breach"),
        pytest.param(FAR._replace(sustain=1), FOUR, (2,), id="unless it is far above"),
        pytest.param(ABOVE._replace(room=None), FOUR, (2,), id="the kernel's limit is not known"),
    ],
)
def test_who_goes(pool: Pool, workers: list[Candidate], victims: tuple[int, ...]) -> None:
    """One row a situation."""
    assert plan(Watch(), pool, workers, 100.0).victims == victims


@pytest.mark.parametrize(
    ("used", "pace", "seconds"),
    [
        pytest.param(360, 0, SELDOM, id="it does not grow"),
        pytest.param(360, 10, SELDOM, id="that is far off"),
        pytest.param(360, 100, 0.5, id="in a second: before that"),
        pytest.param(455, 100, OFTEN, id="in no time"),
        pytest.param(500, 100, OFTEN, id="it is above"),
        pytest.param(None, 100, SELDOM, id="what it holds is not known"),
    ],
)
def test_when_to_look_again(used: int | None, pace: int, seconds: float) -> None:
    """In MiB, of a budget of 460."""
    assert next_check(Pool(None if used is None else used * MIB, 460 * MIB), pace * MIB) == pytest.approx(seconds)


def test_sustain() -> None:
    """The breach has to last."""
    pool = ABOVE._replace(sustain=5)
    first = plan(Watch(), pool, FOUR, 100.0)
    below = plan(first.watch, pool._replace(used=450 * MIB), FOUR, 102.0)
    again = plan(below.watch, pool, FOUR, 103.0)

    assert plan(first.watch, pool, FOUR, 104.9).victims == ()
    assert plan(first.watch, pool, FOUR, 105.0).victims == (2,)
    assert plan(again.watch, pool, FOUR, 105.0).victims == ()


def test_fresh_workers_alone_are_above_it() -> None:
    """Then nobody goes, until that has changed by more than a little."""
    heavy = [worker(number, 5) for number in range(1, 5)]
    refused = plan(Watch(), ABOVE, heavy, 100.0)

    assert (refused.victims, refused.watch.refused, refused.floor) == ((), Why.FRESH, 450 * MIB)
    a_little_less = plan(refused.watch, ABOVE._replace(used=465 * MIB), [worker(number, 10) for number in range(1, 5)], 101.0)
    assert a_little_less.victims == ()
    assert plan(refused.watch, ABOVE, FOUR, 102.0).victims == (2,)


@st.composite
def pools(draw: st.DrawFn) -> tuple[Pool, list[Candidate]]:
    """Any pool."""
    sizes = st.integers(0, 300)
    workers = []
    for number in range(draw(st.integers(0, 12))):
        state = draw(st.sampled_from(("serves", "serves", "leaves", "boots")))
        gained = draw(sizes)
        workers.append(
            Candidate(
                number + 1,
                state == "serves",
                state == "leaves",
                (gained + draw(sizes)) * MIB,
                gained * MIB,
                draw(st.booleans()),
                draw(st.booleans()),
                draw(st.booleans()),
            )
        )
    budget = draw(st.integers(1, 4000)) * MIB
    room = draw(st.none() | st.integers(0, 500).map(lambda more: budget + more * MIB))
    used = draw(st.integers(0, 5000)) * MIB
    return Pool(used, budget, 0, room, draw(st.integers(1, 12)), draw(st.integers(1, 4))), workers


@given(pools(), st.sampled_from([None, *Why]))
def test_what_always_holds(given: tuple[Pool, list[Candidate]], refused: Why | None) -> None:
    """Laws: only within reason, only workers that serve, never all of them, and no more than it takes."""
    pool, workers = given
    done = plan(Watch(refused=refused, until=1e9), pool, workers, 100.0)

    serving = {one.generation: one for one in workers if one.serves}
    assert set(done.victims) <= set(serving)
    assert len(set(done.victims)) == len(done.victims)
    if done.victims:
        assert pool.used is not None
        assert pool.budget is not None
        assert pool.used > pool.budget
        assert len(done.victims) < len(serving)
        assert done.floor is not None
        assert done.floor <= pool.budget * CAN_HELP
        assert done.watch.refused is None
        excess = pool.used - sum(one.gained for one in workers if one.leaves) - pool.budget
        assert sum(serving[victim].gained for victim in done.victims[:-1]) < excess
        assert all(serving[victim].gained > 0 for victim in done.victims)


@given(pools())
def test_one_may_always_go_where_recycling_helps(given: tuple[Pool, list[Candidate]]) -> None:
    """Law: above its budget, with all of its workers there, it never stands still for lack of a victim that is worth it."""
    pool, workers = given
    workers = [one._replace(serves=True, leaves=False, own=one.gained) for one in workers]
    pool = pool._replace(wanted=len(workers))
    done = plan(Watch(), pool, workers, 100.0)

    assert pool.used is not None
    assert pool.budget is not None
    if pool.used > pool.budget and done.floor is not None and done.floor <= pool.budget * CAN_HELP and len(workers) > 1:
        assert done.victims


@dataclass
class Simulated:
    """A pool of workers whose memory is a function of their age in seconds; a boot takes 1 s."""

    pool: Pool
    holds: object
    born: dict[int, float] = field(default_factory=dict)
    lives: dict[int, Life] = field(default_factory=dict)
    watch: Watch = field(default_factory=Watch)
    recycled: list[float] = field(default_factory=list)
    most: int = 0

    def run(self, seconds: int) -> None:
        """One tick a second."""
        number = 0
        for now in range(seconds):
            for _ in range(self.pool.wanted - len(self.born)):
                number += 1
                self.born[number] = now + 1.0 if now else 0.0
            workers, used = [], 20 * MIB
            for generation, born in self.born.items():
                gained = int(self.holds(now - born) * MIB) if now >= born else 0  # type: ignore[operator]
                used += 30 * MIB + gained
                if now >= born:
                    life = self.lives[generation] = lived(self.lives.get(generation), 30 * MIB + gained, now)
                    level = is_level(life, 30 * MIB + gained, gained, now)
                workers.append(Candidate(generation, now >= born, False, 30 * MIB + gained, gained, level=now >= born and level))
            self.most = max(self.most, used)
            done = plan(self.watch, self.pool._replace(used=used), workers, now)
            self.watch = done.watch
            for victim in done.victims:
                self.recycled.append(now)
                del self.born[victim]


def test_a_leak_is_never_given_up_on() -> None:
    """Eight workers that leak 1 MiB/s each, in steps of three seconds: for half an hour the pool stays below the kernel's limit."""
    pool = Simulated(Pool(0, 460 * MIB, room=512 * MIB, wanted=8), lambda age: age // 3 * 3)

    pool.run(1800)

    assert pool.watch.refused is None
    assert pool.most < 512 * MIB
    assert len(pool.recycled) > 100


def test_what_workers_need_is_found_out() -> None:
    """A model that each worker loads with its first request: four times 120 MiB are above the budget, and no recycle changes that."""
    pool = Simulated(Pool(0, 460 * MIB, room=512 * MIB, wanted=4), lambda age: 0 if age < 3 else 90)

    pool.run(3600)

    assert len(pool.recycled) <= 8 * 3600 / NEEDED_FOR
    assert max(sum(0 <= at - first < RECUR for at in pool.recycled) for first in pool.recycled) <= 8


@given(st.floats(0.1, 100), st.lists(st.floats(0.05, 5), min_size=1, max_size=200))
def test_the_mark_is_from_the_first_half_of_a_life(pace: float, pauses: list[float]) -> None:
    """Law: whatever the ticks, a worker that grows at one pace is never taken for level."""
    now, life = 0.0, lived(None, 0, 0.0)
    for pause in pauses:
        now += pause
        used = int(pace * now * MIB)
        life = lived(life, used, now)
        assert life.mark[0] - life.began <= max(now / 2, 0)
        assert not is_level(life, used, used, now)


def test_a_worker_that_jumped_is_level_once_that_is_known() -> None:
    """After KNOWN_AFTER, and when it has not grown since it was half as old."""
    life, seen = lived(None, 0, 0.0), []
    for tenth in range(1, 100):
        now, used = tenth / 10, 0 if tenth < 10 else 100 * MIB
        life = lived(life, used, now)
        seen.append(is_level(life, used, used, now))

    assert not any(seen[: int(KNOWN_AFTER * 10) - 1])
    assert seen[-1]


# --- the supervisor's part


def enrolled(board, used: int, state: State = State.SERVING):
    """A worker on the board that holds so many MiB, of 30 after its boot; this process stands for it."""
    slot = board.reserve()
    slot.claim()
    slot.publish(Figures(rss=used * MIB, anon=used * MIB, baseline=30 * MIB, soft=200 * MIB), Counters())
    slot.need(used * MIB, Growth())
    slot.set_state(state)
    return slot


def reading(used: int, budget: int = 460) -> Reading:
    """In MiB, of 512."""
    return Reading(Capacity(512 * MIB, CGROUP, working_set=used * MIB, workers=3, others=0), budget * MIB, used * MIB)


def test_it_orders_the_idle_one_to_go(board, said) -> None:
    """One that works, one that has just worked, one that has long done nothing, and one that boots."""
    slots = [enrolled(board, size) for size in (150, 140, 120)]
    enrolled(board, 0, State.STARTING)
    works, worked, idle = slots
    for slot, ago, ended in ((works, 5.0, False), (worked, 0.2, True), (idle, 60.0, True)):
        _, write, cells = slot.cells()
        write(cells[-1], 5, time.monotonic() - ago, 0, b"GET /", 0 if ended else 1)
    budget = Budget(board, lambda *_: None)

    budget.tick(Policy(max_unavailable=2), lambda: reading(470), False, time.monotonic())

    assert [slot.order for slot in slots] == [Order.NONE, Order.NONE, Order.BUDGET]
    (line,) = said()
    assert line == (
        "the pool holds 470 MiB > budget 460 MiB: the worker in slot 2 is to go: it has nothing to do; 120 MiB of its own, "
        "90.0 MiB more than a fresh one"
    )
    assert budget.is_above
    budget.tick(Policy(max_unavailable=2), lambda: reading(455), False, time.monotonic())
    assert not budget.is_above


def test_page_cache_is_no_reason(board, said) -> None:
    """The kernel drops it by itself."""
    slot, _ = enrolled(board, 150), enrolled(board, 150)
    found = reading(470)
    cached = found._replace(capacity=replace(found.capacity, droppable=20 * MIB))

    Budget(board, lambda *_: None).tick(Policy(), lambda: cached, False, time.monotonic())

    assert slot.order is Order.NONE
    assert said() == []


def test_what_it_shares_is_not_its_own(board, monkeypatch) -> None:
    """One holds more, and shares most of it."""
    sharing, other, _ = enrolled(board, 150), enrolled(board, 140), enrolled(board, 31)
    shared = {sharing.number: 100 * MIB, other.number: 10 * MIB, 2: 10 * MIB}
    budget = Budget(board, lambda *_: None)
    monkeypatch.setattr(budget, "_shares", lambda entry, _: shared[entry.number])

    budget.tick(Policy(metric="private"), lambda: reading(470), True, time.monotonic())

    assert [sharing.order, other.order] == [Order.NONE, Order.BUDGET]


def test_a_dry_run_orders_nothing(board, said) -> None:
    """It says who would go, one after the other until that would be enough, once."""
    slots = [enrolled(board, size) for size in (150, 140, 120)]
    budget = Budget(board, lambda *_: None)

    for _ in range(3):
        budget.tick(Policy(dry_run=True), lambda: reading(470), False, time.monotonic())

    assert [slot.order for slot in slots] == [Order.NONE] * 3
    assert [line.partition(": the worker in ")[2][:40] for line in said()] == ["slot 0 would be recycled (dry run): it h"]
    assert board.read().totals.by_reason["budget"] == 1


def test_why_nothing_is_done_is_said_once_for_a_budget(board, said) -> None:
    """And anew for another."""
    for _ in range(3):
        enrolled(board, 31)
    budget = Budget(board, lambda *_: None)

    for allowed in (100, 100, 101, 50, 50):
        budget.tick(Policy(), lambda: reading(110, budget=allowed), False, time.monotonic())  # noqa: B023

    assert [line[:46] for line in said()] == [
        "the pool holds 110 MiB > budget 100 MiB, and r",
        "the pool holds 110 MiB > budget 50.0 MiB, and ",
    ]
    assert said()[0].endswith(
        "recycling does not help: with 3 workers fresh from their boot it would hold 107 MiB; no worker is recycled for it. "
        "Have fewer workers, or a larger budget or more memory"
    )


def test_nobody_goes_while_the_server_replaces_its_workers_itself(board, said) -> None:
    """Two pools are there for a while (SIGUSR2), and hold what one must not."""
    slots = [enrolled(board, size) for size in (150, 140, 120)]
    may_act = [False]
    budget = Budget(board, lambda *_: None, lambda: may_act[0])

    budget.tick(Policy(), lambda: reading(470), False, time.monotonic())
    before = [slot.order for slot in slots]
    may_act[0] = True
    budget.tick(Policy(), lambda: reading(470), False, time.monotonic() + 1)

    assert before == [Order.NONE] * 3
    assert [slot.order for slot in slots] == [Order.BUDGET, Order.NONE, Order.NONE]
    assert len(said()) == 1


def test_its_own_failure_hurts_nobody(board, said) -> None:
    """Logged once."""

    def read() -> Reading:
        raise OSError("no such file")

    budget = Budget(board, lambda *_: None)
    for _ in range(2):
        budget.tick(Policy(), read, False, time.monotonic())

    assert len(said()) == 1
