"""What a worker is shown to hold: what the kernel says of it now, else its last word, and of when that is."""

from __future__ import annotations

import os
import time
from dataclasses import replace

import pytest

from oomsafe.kernel.process import sizes_of, start_time
from oomsafe.policy.state import State
from oomsafe.policy.units import MIB
from oomsafe.scoreboard.layout import Counters
from oomsafe.scoreboard.live import brought_forward, live
from oomsafe.scoreboard.slot import Figures
from oomsafe.scoreboard.view import InFlight, PoolView, WorkerView

#: No process has this pid: it is above the kernel's pid_max.
NOBODY = 1 << 23


def worker(pid: int, started: int | None, **more: object) -> WorkerView:
    """It has said 38 s ago that it holds 1 MiB."""
    then = time.time() - 38
    given = WorkerView(
        slot=0, pid=pid, started=started or 0, generation=1, state=State.SERVING, figures=Figures(rss=MIB, anon=MIB), published=then,
        measured=then, used=MIB, counters=Counters(), in_flight=[],
    )  # fmt: skip
    return replace(given, **more)  # type: ignore[arg-type]


def pool(one: WorkerView, metric: str = "anon") -> PoolView:
    return PoolView("test", 1, 1, 0.0, 1, 1, None, None, [one], metric=metric)


@pytest.mark.parametrize("metric", ["anon", "private", "rss", "uss", ""])
def test_a_worker_is_shown_as_it_is_now(metric: str) -> None:
    """This process stands for it. What it has grown by since its last word is added to what its limit is compared with."""
    rss, anon = sizes_of() or (0, 0)
    (shown,) = live(pool(worker(os.getpid(), start_time()), metric)).workers

    assert shown.figures.rss == pytest.approx(rss, abs=4 * MIB)
    assert shown.figures.anon == pytest.approx(anon, abs=4 * MIB)
    assert shown.used == pytest.approx(rss if metric in ("rss", "uss") else anon, abs=4 * MIB)
    assert time.time() - (shown.measured or 0) < 5


@pytest.mark.parametrize(("pid", "started"), [(NOBODY, 1), (os.getpid(), 1)], ids=["hidden or gone", "another process has its pid"])
def test_a_worker_that_cannot_be_asked_keeps_its_last_word(pid: int, started: int) -> None:
    """With its time."""
    before = worker(pid, started)

    assert live(pool(before)).workers == [before]


@pytest.mark.parametrize(
    ("sizes", "before", "dirty", "counts_clean", "now"),
    [
        pytest.param((90, 60), (50, 40, 40), 0, False, (90, 60, 60), id="anon"),
        pytest.param((90, 60), (50, 40, 10), 0, False, (90, 60, 30), id="private: what is shared stays so"),
        pytest.param((90, 60), (50, 40, 50), 0, True, (90, 60, 90), id="rss"),
        pytest.param((90, 60), (50, 45, 45), 5, False, (90, 65, 65), id="dirty pages of files count"),
        pytest.param((62, 60), (50, 45, 45), 5, False, (62, 62, 62), id="not more of them than there are"),
        pytest.param((30, 20), (90, 80, 40), 0, False, (30, 20, 0), id="it has shrunk"),
        pytest.param((90, 60), (None, None, None), 0, False, (90, 60, None), id="it has said nothing"),
    ],
)
def test_brought_forward(
    sizes: tuple[int, int], before: tuple[int | None, int | None, int | None], dirty: int, counts_clean: bool, now: object
) -> None:
    """What a process has grown by since is taken to be its own."""
    assert brought_forward(sizes, before, dirty, counts_clean=counts_clean) == now


def test_growth_is_not_known_from_figures_that_are_older() -> None:
    """A request that began after its worker was measured has no growth; one that began before has."""
    one = worker(NOBODY, 1)
    measured = one.measured or 0

    assert one.grown(InFlight("GET /", measured - 1, MIB // 2)) == MIB // 2
    assert one.grown(InFlight("GET /", measured + 1, MIB // 2)) is None
    assert one.grown(InFlight("GET /", measured - 1, None)) is None
    assert replace(one, measured=None).grown(InFlight("GET /", measured - 1, MIB // 2)) is None
