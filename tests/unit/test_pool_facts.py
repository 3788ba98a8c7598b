"""What a live pool shows of itself: the figures that are made of its scoreboard, and that nothing on it can hurt."""

from __future__ import annotations

import json
import os
from collections.abc import Callable

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from oomsafe.cli import pool_facts
from oomsafe.cli.advice_options import Given
from oomsafe.cli.advice_text import advice_text
from oomsafe.cli.advise import Advised, _deployment, _one, _record
from oomsafe.cli.paste import FILES
from oomsafe.cli.pool_facts import facts_of
from oomsafe.errors import ConfigError, ScoreboardError
from oomsafe.kernel.process import start_time
from oomsafe.policy.sizing.facts import Style
from oomsafe.policy.state import State
from oomsafe.policy.units import MIB
from oomsafe.scoreboard.layout import BUCKETS, COUNT_MAX, Counters
from oomsafe.scoreboard.slot import Figures
from oomsafe.scoreboard.view import PoolView, WorkerView

NOW = 1_800_000_000.0
PID, STARTED = os.getpid(), start_time() or 0


@pytest.fixture(autouse=True)
def _kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Says the same of every process: 60 MiB held, 50 of them private."""
    monkeypatch.setattr(pool_facts, "held_of", lambda pid: 60 * MIB)
    monkeypatch.setattr(pool_facts, "shared_out", lambda pid: pool_facts_shares)
    monkeypatch.setattr(pool_facts.time, "time", lambda: NOW)


pool_facts_shares = type("Shares", (), {"private": 50 * MIB, "held": 55 * MIB})()


def worker(used: int | None, baseline: int | None = 50 * MIB, work: int = 100, soft: int | None = 150 * MIB, peak: int = 0) -> WorkerView:
    return WorkerView(
        slot=0, pid=PID, started=STARTED, generation=1, state=State.SERVING, published=NOW, measured=NOW, used=used, in_flight=[],
        figures=Figures(baseline=baseline, soft=soft, peak_rss=peak or used), counters=Counters(work=work),
    )  # fmt: skip


def pool(*workers: WorkerView, **more: object) -> PoolView:
    found: dict[str, object] = {
        "server": "gunicorn sync", "supervisor": PID, "supervisor_started": STARTED, "created": NOW - 100, "workers_wanted": len(workers),
        "turns": 1, "limit": 1024 * MIB, "budget": 921 * MIB, "workers": list(workers), "metric": "anon", "others": 7,
        "totals": Counters(work=sum(each.counters.work for each in workers)),
    }  # fmt: skip
    return PoolView(**{**found, **more})  # type: ignore[arg-type]


def test_what_is_measured() -> None:
    """The median of the fresh sizes, growth for each piece of work, and the rate since the start."""
    found = facts_of(pool(worker(60 * MIB), worker(58 * MIB, 48 * MIB), worker(59 * MIB, 49 * MIB)))

    assert (found.fresh, found.shared, found.supervisor) == (49 * MIB, 10 * MIB, 60 * MIB)
    assert (found.growth, found.rate) == (30 * MIB / 300, 3)
    assert (found.limit, found.others, found.workers, found.style) == (1024 * MIB, 7, 3, Style.BLOCKING)


def test_workers_that_are_gone_for_their_soft_limits_count_for_the_growth() -> None:
    """Each had grown up to it. Of those that are gone for something else it is not known."""
    totals = Counters(work=2000, recycles=[3, 0, 0, 0, 0, 0, 0, 0])
    others = Counters(work=2000, recycles=[3, 0, 0, 0, 0, 1, 0, 0])
    view = pool(worker(60 * MIB), worker(70 * MIB))

    def growth(**more: object) -> float | None:
        return facts_of(pool(*view.workers, **more)).growth

    assert growth(totals=totals) == (30 + 3 * 100) * MIB / 2000
    assert growth(totals=others) == 30 * MIB / 200
    assert growth(totals=totals, ends={"oom_confirmed": 1}) == 30 * MIB / 200
    assert growth(totals=totals, ends={"recycled": 3}) == (30 + 3 * 100) * MIB / 2000


@pytest.mark.parametrize(
    ("workers", "growth"),
    [
        ([worker(60 * MIB, work=99)], None),
        ([worker(None), worker(60 * MIB, work=0)], None),
        ([worker(40 * MIB)], 0),
        ([worker(60 * MIB, baseline=None), worker(50 * MIB)], 0),
    ],
    ids=["too little work", "nothing is known", "it has shrunk", "one is not known"],
)
def test_growth_that_is_not_known_or_none(workers: list[WorkerView], growth: float | None) -> None:
    """Never a guess, never below zero."""
    assert facts_of(pool(*workers)).growth == growth


@pytest.mark.parametrize(
    ("at", "peak", "gone", "balloon"),
    [
        (None, 60, 0, None),
        (0, 60, 0, 0),
        (5, 500, 0, 16 * MIB),
        (7, 500, 0, 256 * MIB),
        (7, 150, 0, 100 * MIB),
        (7, 60, 0, 64 * MIB),
        (7, 150, 1, 256 * MIB),
        (9, 500, 0, 1024 * MIB),
    ],
    ids=["nothing", "no growth", "16 MiB", "a bucket's end", "a peak", "a peak below the bucket", "a worker is gone", "the last bucket"],
)
def test_the_largest_growth_in_one_piece_of_work(at: int | None, peak: int, gone: int, balloon: int | None) -> None:
    """From the histogram; the peaks of living workers know better, if none is gone."""
    row = [0] * (1 + BUCKETS)
    if at is not None:
        row[1 + at] = 2
    totals = Counters(work=100, routes={"GET /": row}, recycles=[gone, 0, 0, 0, 0, 0, 0, 0])

    assert facts_of(pool(worker(55 * MIB, peak=peak * MIB), totals=totals)).balloon == balloon


def test_growth_and_rate_of_the_last_minute() -> None:
    """Of workers that have lived all the while, and had done something before: what they did first does not count."""
    before = pool(worker(90 * MIB, work=50), worker(50 * MIB, work=0), totals=Counters(work=1000))
    after = pool(worker(100 * MIB, work=300), worker(190 * MIB, work=200), totals=Counters(work=1600))
    for view in (before, after):
        for number, each in enumerate(view.workers):
            object.__setattr__(each, "generation", number)

    found = facts_of(after, before=(before, 60.0))

    assert (found.growth, found.rate) == (10 * MIB / 250, 10)
    assert facts_of(before, before=(before, 60.0)).growth is None


def test_a_private_metric_leaves_out_what_is_shared() -> None:
    """So that is added for the fresh size."""
    assert facts_of(pool(worker(60 * MIB), metric="private")).fresh == 60 * MIB


@pytest.mark.parametrize(
    ("view", "line"),
    [
        (pool(worker(60 * MIB), supervisor_started=STARTED + 1), "is dead"),
        (pool(worker(None, baseline=None)), "has no figures yet"),
        (pool(), "has no figures yet"),
        (pool(worker(60 * MIB), limit=None), "could read no memory limit"),
        (pool(worker(60 * MIB), server="gunicorn dirty"), "is gunicorn's dirty pool"),
    ],
    ids=["dead", "young", "empty", "no limit", "dirty"],
)
def test_a_pool_without_what_is_needed(view: PoolView, line: str) -> None:
    """One line that says what to do."""
    with pytest.raises(ScoreboardError, match=line):
        facts_of(view)


#: Plausible ones too, or no advice would ever come of them.
figures = st.none() | st.integers(0, (1 << 63) - 1) | st.integers(20 * MIB, 200 * MIB)
counts = st.integers(0, COUNT_MAX)


@settings(max_examples=300)
@given(st.data())
def test_nothing_on_a_scoreboard_can_hurt(data: st.DataObject) -> None:
    """Whatever figures and texts stand there: there is an advice, a text, a record and every file; or one line."""
    draw: Callable[..., object] = data.draw
    workers = [
        worker(draw(figures), draw(figures), draw(counts), draw(figures), draw(st.integers(0, (1 << 63) - 1)))  # type: ignore[arg-type]
        for _ in range(draw(st.integers(0, 3)))  # type: ignore[call-overload]
    ]
    totals = Counters(
        work=draw(counts),  # type: ignore[arg-type]
        recycles=[draw(counts) for _ in range(8)],  # type: ignore[misc]
        routes={"GET /": [draw(counts) for _ in range(1 + BUCKETS)]},  # type: ignore[misc]
    )
    view = pool(
        *workers, totals=totals, limit=draw(figures | st.just(1 << 40)), others=draw(figures),
        workers_wanted=draw(st.integers(0, COUNT_MAX)), created=draw(st.floats(0, 1e11)), name=draw(st.text(max_size=64)),
        source=draw(st.text(max_size=96)), server=draw(st.text(max_size=32)),
        metric=draw(st.text(max_size=16)), unit=draw(st.text(max_size=16)),
    )  # fmt: skip
    given_figures = Given(boot=2.0)
    try:
        advised: Advised = _one(given_figures.on(facts_of(view)), given_figures, view)
    except (ScoreboardError, ConfigError) as error:
        assert str(error)
        event("one line")
        return
    event("an advice")

    json.dumps(_record(advised), allow_nan=False)
    assert advice_text("", advised.facts, advised.advice, 80).plain
    for kind, write in FILES.items():
        assert write(_deployment(advised, given_figures, kind, None))
