"""What fires, and when it is over: edges and no flapping, whatever the figures do."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oomsafe.policy.alerts import CALM, LOST_FOR, PARTS, TERMS, Alert, Event, Key, PoolKey, Reading, Rise, Track, Watch, Worker, breaches
from oomsafe.policy.units import GIB, MIB

PAGE = (Path(__file__).parents[2] / "docs" / "alerts.md").read_text()
POOL = PoolKey("shop", "gunicorn sync", 4711, 99)
KILLED: Key = (Alert.KERNEL_KILL, "oom_confirmed")
QUIET = Reading(limit=GIB, others=0, held=500 * MIB, budget=900 * MIB, margin=50 * MIB, wanted=2, serving=2, counts={KILLED: 7})

times = st.lists(st.floats(0.1, 40), min_size=1, max_size=60).map(lambda pauses: list(accumulate(pauses)))


def worker(held: int, *, used: int | None = None, soft: int | None = 800 * MIB, hard: int | None = GIB, name: str = "worker 1") -> Worker:
    return Worker(name=name, used=held if used is None else used, soft=soft, held=held, hard=hard)


@st.composite
def lives(draw: st.DrawFn) -> list[tuple[float, frozenset[str]]]:
    """When something was looked at, and which subjects were so then."""
    return [(at, draw(st.frozensets(st.sampled_from("ab")) | st.just(frozenset()))) for at in draw(times)]


@given(lives(), st.sampled_from([0.0, 30.0, 60.0]), st.sampled_from([10.0, 60.0]))
def test_an_alert_alternates_and_never_flaps(life: list[tuple[float, frozenset[str]]], lasts: float, calm: float) -> None:
    """Laws: it fires when a subject has been so throughout `lasts`, and not before; it is over after `calm` without any, and not before."""
    track, fires, changed = Track(), False, []
    for number, (now, subjects) in enumerate(life):
        track = track.follow(subjects, now, lasts, calm)
        until_now = life[: number + 1]
        if not fires:
            lasting = any(_throughout(until_now, subject, lasts) for subject in subjects)
            assert (track.fires_since is not None) == lasting
        else:
            last = max((at for at, found in until_now if found), default=0.0)
            assert (track.fires_since is None) == (now - last >= calm)
        if fires != (track.fires_since is not None):
            fires = not fires
            changed.append(now)
    over = changed[1::2]
    assert all(begins - ends >= 0 for ends, begins in zip(over, changed[2::2], strict=False))
    # it takes `calm` to be over, so it can't be over more often than that
    assert len(over) <= life[-1][0] / calm + 1


def _throughout(life: Sequence[tuple[float, frozenset[str]]], subject: str, seconds: float) -> bool:
    """Whether it has been so each time, and that for so many seconds until the last."""
    now = first = life[-1][0]
    for at, subjects in reversed(life):
        if subject not in subjects:
            break
        first = at
    return now - first >= seconds


@given(times, st.data())
def test_a_rise_counts_the_last_seconds(ats: list[float], data: st.DataObject) -> None:
    """Law: what a count has risen by within the time, give or take a part of it; and few parts are kept."""
    within = 60.0
    counts = list(accumulate(data.draw(st.lists(st.integers(0, 5), min_size=len(ats), max_size=len(ats)))))
    rise = Rise(within, ats[0], counts[0])

    for number, (now, count) in enumerate(zip(ats, counts, strict=True)):
        found = rise.add(now, count)
        assert _count(ats, counts, now - within * (1 - 1 / PARTS)) >= count - found >= _count(ats, counts, now - within), number
        assert len(rise._parts) <= 2 * PARTS


def _count(ats: list[float], counts: list[int], at: float) -> int:
    """What the count was then; before it was known, what it was first."""
    return next((count for known, count in zip(reversed(ats), reversed(counts), strict=True) if known <= at), counts[0])


def test_a_rise_over_a_long_time_keeps_few_parts() -> None:
    """However often it rises."""
    rise = Rise(3600.0, 0.0, 0)

    for second in range(20_000):
        found = rise.add(float(second), second)

    assert found == pytest.approx(3600, rel=2 / PARTS)
    assert len(rise._parts) <= PARTS + 2


def test_a_count_that_falls_has_begun_anew() -> None:
    """As Prometheus counts it."""
    rise = Rise(60.0, 0.0, 10)

    assert [rise.add(at, count) for at, count in ((1.0, 12), (2.0, 3), (3.0, 3))] == [2, 5, 5]


readings = st.builds(
    Reading,
    limit=st.none() | st.sampled_from([0, GIB]),
    others=st.none() | st.just(100 * MIB),
    held=st.none() | st.sampled_from([0, 500 * MIB, 1000 * MIB]),
    budget=st.none() | st.sampled_from([0, 900 * MIB]),
    margin=st.none() | st.sampled_from([float("inf"), float("-inf"), -1.0, 1.0]).filter(lambda margin: margin != float("-inf")),
    wanted=st.sampled_from([0, 2]),
    serving=st.sampled_from([0, 2]),
    workers=st.lists(st.builds(worker, st.sampled_from([0, GIB]), hard=st.sampled_from([None, 0, GIB])), max_size=3),
    refused=st.lists(st.sampled_from(["soft_limit", "hard_limit"]), unique=True),
    counts=st.dictionaries(
        st.tuples(st.sampled_from([Alert.KERNEL_KILL, Alert.SHEDDING, Alert.RECYCLE_STORM, Alert.CULPRIT_FOUND]), st.sampled_from("xy")),
        st.integers(0, (1 << 64) - 1),
    ),
    last_death=st.sampled_from(["", "worker 5 was killed"]),
)


@given(times, st.data())
def test_whatever_a_pool_shows(ats: list[float], data: st.DataObject) -> None:
    """Law: each alert of it alternates, begins with firing, and is over at the latest when the pool ends; every event is JSON and text."""
    watch, events = Watch(), list[Event]()
    for at in ats:
        events += watch.read(POOL, data.draw(readings), at, new=data.draw(st.booleans()))
    events += watch.ended(POOL, ats[-1], in_order=True)

    for alert in Alert:
        edges = [event.firing for event in events if event.alert is alert]
        assert edges == [number % 2 == 0 for number in range(len(edges))]
        assert len(edges) % 2 == 0
    for event in events:
        json.dumps(event.figures, allow_nan=False)
        assert event.text.isprintable() and event.text


CASES: list[tuple[Alert, dict[str, Any], dict[str, Any]]] = [
    (
        Alert.WORKER_NEAR_HARD_LIMIT,
        {"workers": [worker(1000 * MIB)]},
        {"workers": [worker(900 * MIB), worker(1000 * MIB, soft=1001 * MIB)]},
    ),
    (Alert.POOL_NEAR_LIMIT, {"held": 930 * MIB, "others": 50 * MIB, "budget": GIB}, {"held": 920 * MIB, "others": 50 * MIB, "budget": GIB}),
    (Alert.SUPERVISOR_NOT_SAFE, {"margin": -1.0}, {"margin": float("inf")}),
    (Alert.NO_WORKER_SERVES, {"serving": 0}, {"serving": 0, "wanted": 0}),
    (Alert.BUDGET_EXCEEDED, {"held": 901 * MIB}, {"held": 900 * MIB}),
    (Alert.LIMIT_REFUSED, {"refused": ["soft_limit"]}, {"refused": []}),
    (Alert.LEAK_FOUND, {"leak": 262144}, {"leak": None}),
]


@pytest.mark.parametrize(("alert", "so", "not_so"), CASES, ids=[str(case[0]) for case in CASES])
def test_what_must_last(alert: Alert, so: dict[str, Any], not_so: dict[str, Any]) -> None:
    """It is pending first; it fires once it has lasted; it is over a minute after it was last so."""
    watch, lasts = Watch(), TERMS[alert].lasts
    fires, calm = (Reading(**{**vars(QUIET), **figures}) for figures in (so, not_so))

    assert watch.read(POOL, fires, 0.0) == watch.read(POOL, fires, lasts - 1) == []
    (fired,) = watch.read(POOL, fires, lasts)
    assert watch.read(POOL, calm, lasts + 1) == watch.read(POOL, fires, lasts + 2) == watch.read(POOL, calm, lasts + 3) == []
    (over,) = watch.read(POOL, calm, lasts + 2 + CALM)
    assert watch.read(POOL, calm, lasts + 1000) == []

    assert (fired.alert, fired.firing, fired.since) == (alert, True, 0.0)
    assert (over.alert, over.firing, over.since) == (alert, False, 0.0)


def counted(**counts: int) -> Reading:
    """With these counts, by alert and name."""
    keys = {
        "confirmed": KILLED,
        "recycles": (Alert.RECYCLE_STORM, ""),
        "shed": (Alert.SHEDDING, ""),
        "leak": (Alert.CULPRIT_FOUND, "GET /a"),
    }
    return Reading(wanted=1, serving=1, workers=[worker(MIB)], counts={keys[name]: count for name, count in counts.items()})


def test_a_kill_fires_at_once_and_for_ten_minutes() -> None:
    """Kills before it was watched don't count; another one in that time is no other alert."""
    watch = Watch()
    assert watch.read(POOL, counted(confirmed=7), 0.0) == []
    (fired,) = watch.read(POOL, counted(confirmed=9), 5.0)
    assert watch.read(POOL, counted(confirmed=10), 300.0) == []
    assert watch.read(POOL, counted(confirmed=10), 300.0 + 599) == []
    assert watch.read(POOL, counted(confirmed=10), 300.0 + 610) == []
    (over,) = watch.read(POOL, counted(confirmed=10), 300.0 + 600 + CALM)

    assert fired.figures["oom_confirmed"] == 2
    assert fired.text == "the kernel's OOM killer took 2 workers (2 oom_confirmed)"
    assert (fired.alert, over.alert, over.firing) == (Alert.KERNEL_KILL, Alert.KERNEL_KILL, False)


def test_what_a_new_pool_has_counted_happened_since() -> None:
    """It began while others were watched, and has lost a worker before it was read for the first time."""
    assert Watch().read(POOL, counted(confirmed=1), 5.0, new=False) == []
    assert [event.alert for event in Watch().read(POOL, counted(confirmed=1), 5.0, new=True)] == [Alert.KERNEL_KILL]


def test_a_route_that_is_called_for_the_first_time_counts_from_nothing() -> None:
    """Its count joins the others later."""
    watch = Watch()
    watch.read(POOL, counted(shed=0), 0.0)
    (found,) = watch.read(POOL, counted(shed=0, leak=2), 5.0)

    assert (found.alert, found.figures["routes"]) == (Alert.CULPRIT_FOUND, {"GET /a": 2})


def test_a_storm_is_more_than_three_recycles_for_each_worker() -> None:
    """Within ten minutes."""
    watch = Watch()
    assert watch.read(POOL, counted(recycles=0), 0.0) == watch.read(POOL, counted(recycles=3), 300.0) == []

    assert [event.alert for event in watch.read(POOL, counted(recycles=4), 301.0)] == [Alert.RECYCLE_STORM]


def test_shedding_must_last() -> None:
    """A burst of a second is none; requests that are shed all the time for two minutes are."""
    burst, lasting = Watch(), Watch()
    bursts = [burst.read(POOL, counted(shed=50 if at else 0), float(at)) for at in range(0, 400, 5)]
    shed = [(at, burst) for at in range(0, 200, 5) if (burst := lasting.read(POOL, counted(shed=at), float(at)))]

    assert [events for events in bursts if events] == []
    ((at, (event,)),) = shed
    assert (at, event.alert) == (125, Alert.SHEDDING)


def test_one_worker_after_the_other_near_its_limit_is_not_one_for_a_minute() -> None:
    """Each begins anew."""
    watch = Watch()
    events = [
        watch.read(POOL, Reading(workers=[worker(1000 * MIB, name=f"worker {second // 40}")]), float(second)) for second in range(0, 400, 5)
    ]

    assert [event for found in events for event in found] == []


def test_a_pool_that_is_gone_is_back_when_another_of_its_name_has_lasted() -> None:
    """What ends in a crash loop is gone once, and what ends in order is not gone."""
    watch, nth = Watch(), lambda number: POOL._replace(supervisor=number)
    watch.read(nth(1), QUIET, 0.0)
    (gone,) = watch.ended(nth(1), 5.0, in_order=False, orphans=2)
    watch.read(nth(2), QUIET, 10.0)
    assert watch.ended(nth(2), 20.0, in_order=False) == []
    watch.read(nth(3), QUIET, 25.0)
    assert watch.read(nth(3), QUIET, 24.0 + CALM) == []
    (back,) = watch.read(nth(3), QUIET, 25.0 + CALM)

    assert (gone.alert, gone.firing, gone.pool.supervisor, gone.figures["orphans"]) == (Alert.POOL_GONE, True, 1, 2)
    assert (back.alert, back.firing, back.pool.supervisor) == (Alert.POOL_GONE, False, 1)
    assert watch.ended(nth(3), 200.0, in_order=True) == []


def test_its_twin_does_not_stand_for_a_pool_that_is_gone() -> None:
    """It was there before; and when it is gone, too, that is another alert."""
    watch, twin = Watch(), POOL._replace(supervisor=1)
    for pool in (POOL, twin):
        watch.read(pool, QUIET, 0.0)
    assert len(watch.ended(POOL, 5.0, in_order=False)) == 1
    assert watch.read(twin, QUIET, 500.0) == []

    assert [event.pool for event in watch.ended(twin, 600.0, in_order=False)] == [twin]
    watch.ended(POOL, 700.0 + LOST_FOR, in_order=True)
    assert watch._lost == {}


def test_what_fires_is_over_with_its_pool() -> None:
    """In the same moment in which the pool is gone."""
    watch = Watch()
    watch.read(POOL, Reading(refused=["soft_limit"], held=5, limit=9), 0.0)
    watch.read(POOL, Reading(refused=["soft_limit"], held=5, limit=9), 60.0)

    events = watch.ended(POOL, 61.0, in_order=False)

    assert [(event.alert, event.firing) for event in events] == [(Alert.LIMIT_REFUSED, False), (Alert.POOL_GONE, True)]
    assert "it was killed, or crashed; the pool held 5 B of 9 B" in events[1].text


def test_what_is_not_known_is_no_condition() -> None:
    """Nor is it 0."""
    assert breaches(Reading(), {}) == {}


def test_rules_names() -> None:
    """As Prometheus writes them."""
    assert Alert.WORKER_NEAR_HARD_LIMIT.rule == "OomsafeWorkerNearHardLimit"


def test_the_figures_are_documented() -> None:
    """On the page, in each alert's section."""
    watch = Watch()
    fired = {}
    counts = {
        (alert, name): 0 for alert in (Alert.RECYCLE_STORM, Alert.KERNEL_KILL, Alert.SHEDDING, Alert.CULPRIT_FOUND) for name in ("x",)
    }
    for at in range(0, 1000, 5):
        all_of_it = {"workers": [worker(1000 * MIB)], "held": 1000 * MIB, "margin": -1.0, "serving": 0, "refused": ["soft_limit"]}
        all_of_it["leak"] = 9
        reading = Reading(**{**vars(QUIET), **all_of_it, "counts": dict.fromkeys(counts, at)})
        fired |= {event.alert: event.figures for event in watch.read(POOL, reading, float(at))}
    fired |= {event.alert: event.figures for event in watch.ended(POOL, 1000.0, in_order=False) if event.firing}

    assert set(fired) == set(Alert)
    for alert, figures in fired.items():
        section = PAGE.partition(f"\n### {alert}\n")[2].partition("\n### ")[0]
        documented = set(re.findall(r"`(\w+)`", section.partition("\n`figures`: ")[2]))
        assert documented == set(figures), alert
