"""Who made a process grow: a name only where the data is sure of it."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from unit.scripted import MIB, Clock, Memory

from oomsafe.policy.culprit import MOMENTS, Culprit, Moment, Moments, culprit_of
from oomsafe.scoreboard.slot import Slot
from oomsafe.worker.meter import MOST_NAMES, Meter, Work
from oomsafe.worker.suspects import Suspects

KIB = 1024


def life(
    seed: int,
    rates: dict[str, int],
    leaks: dict[str, int],
    moments: int = 40,
    noise: int = 200 * KIB,
    balloons: int = 0,
    by_itself: int = 0,
) -> list[Moment]:
    """Each route is called about so often in a moment, and keeps so many bytes each time; every tenth moment has a balloon in it."""
    chance = random.Random(seed)
    made = []
    for _ in range(moments):
        calls = {route: max(0, round(chance.gauss(rate, rate**0.5))) for route, rate in rates.items()}
        growth = sum(leaks.get(route, 0) * number for route, number in calls.items()) + by_itself + chance.gauss(0, noise)
        growth += balloons if chance.random() < 0.1 else 0
        made.append(Moment(0.2, int(growth), {route: number for route, number in calls.items() if number}))
    return made


MIX = {f"/r{number}": 5 for number in range(20)}


@pytest.mark.parametrize("seed", range(10))
def test_it_names_who_leaks_beside_one_that_waits(seed: int) -> None:
    """And what a call keeps, within a tenth."""
    found = culprit_of(life(seed, {"/leak": 30, "/slow": 2}, {"/leak": 300 * KIB}))

    assert found is not None
    assert found.route == "/leak"
    assert abs(found.each - 300 * KIB) < 30 * KIB
    assert found.share > 0.9


@pytest.mark.parametrize(
    "unsure",
    [
        pytest.param(lambda seed: life(seed, MIX, {"/r3": 64 * KIB}, noise=3 * MIB, balloons=20 * MIB), id="a noisy mix of twenty"),
        pytest.param(lambda seed: life(seed, {"/a": 30, "/b": 30}, {"/a": 300 * KIB, "/b": 300 * KIB}), id="two that leak alike"),
        pytest.param(lambda seed: life(seed, {"/a": 30, "/b": 5}, {}, by_itself=600 * KIB), id="a thread of the app's own"),
        pytest.param(lambda seed: life(seed, MIX, {}, balloons=8 * MIB), id="balloons of nobody's"),
        pytest.param(lambda seed: life(seed, {"/a": 30, "/b": 5}, {"/a": 300 * KIB}, moments=4), id="too short a life"),
        pytest.param(lambda seed: life(seed, {"/a": 30, "/b": 5}, {"/a": 2 * KIB}, noise=0), id="next to nothing"),
        pytest.param(lambda _: [], id="nothing"),
        pytest.param(lambda _: [Moment(1.0, MIB, {})] * 40, id="no calls"),
        pytest.param(lambda _: [Moment(1.0, MIB, {"/a": 10, "/b": 10})] * 40, id="two that are always called together"),
    ],
)
def test_it_names_nobody_where_that_is_not_sure(unsure: Callable[[int], list[Moment]]) -> None:
    """A wrong name costs an afternoon."""
    assert [found for seed in range(10) if (found := culprit_of(unsure(seed))) is not None] == []


def test_one_balloon_does_not_hide_a_leak() -> None:
    """A moment that is far off counts for less."""
    for seed in range(10):
        found = culprit_of(life(seed, {"/leak": 30, "/other": 10}, {"/leak": 300 * KIB}, moments=60, balloons=20 * MIB))
        assert found is None or found.route == "/leak"


def test_the_only_work_there_was() -> None:
    """Nobody else can have done it."""
    assert culprit_of([Moment(1.0, 5 * MIB, {"/a": 10})]) == Culprit("/a", MIB // 2, 10, 1.0)
    assert culprit_of([Moment(1.0, 5 * MIB, {"/a": 7})]) is None


def test_a_long_life_takes_no_more_memory() -> None:
    """Its moments become longer, and no byte and no call is lost."""
    moments = Moments()
    for second in range(5000):
        moments.add(float(second), 100 * MIB + second * 10 * KIB, {"/a": second * 3, "/b": second})
    kept = moments.kept

    assert MOMENTS / 2 - 1 <= len(kept) <= MOMENTS
    assert sum(moment.growth for moment in kept) <= 4999 * 10 * KIB
    assert sum(moment.growth for moment in kept) > 4800 * 10 * KIB
    assert sum(moment.calls["/a"] for moment in kept) == 3 * sum(moment.calls["/b"] for moment in kept)


def test_what_is_explained_already_is_taken_off_in_any_moment() -> None:
    """Also where the measurement comes too soon to make a moment of its own."""
    moments = Moments()
    for part, apart in ((0.0, 0), (1.0, 0), (1.001, 3 * MIB), (2.0, 2 * MIB)):
        moments.add(part, 100 * MIB + (8 * MIB if part == 2.0 else 0), {"/a": int(part)}, apart)

    assert [moment.growth for moment in moments.kept] == [0, 3 * MIB]


def suspected(memory: Memory, clock: Clock) -> tuple[Meter, Suspects]:
    """A worker that has just begun to serve."""
    meter = Meter(Slot.private(), memory)
    suspects = Suspects(meter)
    suspects.follow(clock.now)
    return meter, suspects


def work(meter: Meter, memory: Memory, name: str, grows: int, route: str | None = None) -> None:
    """One piece of work that keeps so many bytes."""
    piece = meter.begin(name.encode())
    if route is not None:
        piece.route = route
    memory.be((memory.now or 0) + grows)
    piece.end()


def test_the_first_of_a_route_is_told_apart(clock: Clock) -> None:
    """Its lazy imports are not what it keeps each time."""
    memory = Memory(50 * MIB)
    meter, suspects = suspected(memory, clock)
    for number in range(40):
        clock.go(0.1)
        work(meter, memory, "GET /a", 45 * MIB if not number else 100 * KIB, "/a")
        suspects.follow(clock.now)

    assert (meter.first, meter.warm_up) == ((45 * MIB, b"GET /a"), 45 * MIB)
    assert suspects.blame(clock.now).text == "; first of its kind here: GET /a (+45.0 MiB)"


def test_paths_without_a_route_are_told_apart(clock: Clock) -> None:
    """By their words: what is a number or an id in them is somebody's."""
    memory = Memory(50 * MIB)
    meter, suspects = suspected(memory, clock)
    for number in range(400):
        clock.go(0.05)
        for part in range(number % 3):
            work(meter, memory, f"GET /items/{number * 3 + part}", MIB)
        work(meter, memory, f"GET /pages/{number % 3}/edit", 0)
        work(meter, memory, "GET /files/0123456789abcdef01", 0)
        suspects.follow(clock.now)

    assert suspects.blame(clock.now).text.startswith("; GET /items/* keeps about ")
    assert len(meter.names) <= MOST_NAMES


def test_a_balloon_in_flight_is_not_put_down_to_others(clock: Clock) -> None:
    """Its own call is counted when it ends; until then, what it grows by explains no call of others."""
    memory = Memory(50 * MIB)
    meter, suspects = suspected(memory, clock)
    for path in ("/page", "/balloon"):
        work(meter, memory, f"GET {path}", 0, path)  # the first of its route is apart
    balloon = meter.begin(b"GET /balloon")
    balloon.route = "/balloon"
    for number in range(60):
        clock.go(0.1)
        memory.be((memory.now or 0) + (10 - number % 3) * MIB)
        meter.measure()
        balloon.mark = meter.clock.value - (memory.now or 0) + 50 * MIB  # as its thread's faults tell
        for _ in range(10 - number % 3):
            work(meter, memory, "GET /page", 0, "/page")
        suspects.follow(clock.now)

    assert suspects.blame(clock.now).text == ""
    balloon.end()
    assert suspects.blame(clock.now).text.startswith("; largest growth in one of them: GET /balloon (+")


def test_work_that_waits_beside_a_leak_does_not_hide_it(clock: Clock) -> None:
    """It has an equal share of all growth while it waits, and the more of that the longer it waits."""
    memory, chance = Memory(50 * MIB), random.Random(1)
    meter, suspects = suspected(memory, clock)
    for path in ("/slow", "/leak"):
        work(meter, memory, f"GET {path}", 0, path)
    waiting: list[Work] = []
    for number in range(60):
        clock.go(0.1)
        while len(waiting) < 4:
            waiting.append(meter.begin(b"GET /slow"))
            waiting[-1].route = "/slow"
        for _ in range(max(0, round(chance.gauss(40, 6)))):
            work(meter, memory, "GET /leak", 300 * 1024, "/leak")
        meter.measure()
        if number % 3 == 2:
            waiting.pop(0).end()
        suspects.follow(clock.now)

    assert suspects.blame(clock.now).text.startswith("; /leak keeps about ")


def test_what_grows_while_nothing_is_in_flight_is_no_calls(clock: Clock) -> None:
    """A thread of the app's own, say."""
    memory = Memory(50 * MIB)
    meter, suspects = suspected(memory, clock)
    for _ in range(40):
        clock.go(0.1)
        memory.be((memory.now or 0) + MIB)
        meter.measure()
        work(meter, memory, "GET /health", 0)
        suspects.follow(clock.now)

    assert suspects.blame(clock.now).text == "; +40.0 MiB of it while nothing was in flight"


def test_what_a_worker_has_loaded_before_it_serves_is_no_part_of_its_growth(clock: Clock) -> None:
    """A guard may be made before the app is loaded."""
    memory = Memory(50 * MIB)
    meter = Meter(Slot.private(), memory)
    memory.be(150 * MIB)
    meter.measure()
    suspects = Suspects(meter)
    suspects.follow(clock.now)
    for _ in range(40):
        clock.go(0.1)
        work(meter, memory, "GET /leak", MIB)
        suspects.follow(clock.now)

    assert suspects.blame(clock.now).text.startswith("; GET /leak keeps about ")


def test_a_hostile_name_is_printable(clock: Clock) -> None:
    """It comes from a client."""
    memory = Memory(50 * MIB)
    meter, suspects = suspected(memory, clock)
    for _ in range(20):
        clock.go(0.1)
        work(meter, memory, "GET /\x1b[2J\n\u202e", MIB)
        suspects.follow(clock.now)

    assert suspects.blame(clock.now).text.isprintable()
    assert " keeps about " in suspects.blame(clock.now).text
