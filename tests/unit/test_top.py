"""`oomsafe top` without its screen: what is read when, what stands in a line of any width, and the order of the workers."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from unit.retiring import several

from oomsafe.cli.pools import Found
from oomsafe.cli.top import observer
from oomsafe.cli.top.lines import COLUMNS, Sort, detail, fitted, heading, in_order, lines_of, worker_line
from oomsafe.cli.top.observer import GONE_FOR, SELDOM, Observed, Observer, Worker
from oomsafe.policy.ends import End
from oomsafe.policy.probed import Probed, Stage
from oomsafe.policy.state import State
from oomsafe.policy.trend import Sample
from oomsafe.policy.units import MIB
from oomsafe.scoreboard.layout import Counters
from oomsafe.scoreboard.slot import Figures
from oomsafe.scoreboard.view import DeathView, InFlight, PoolView, WorkerView

NOW = 1_800_000_000.0


def view(slot: int, used: int | None, *, soft: int | None = 300 * MIB, age: float = 0.5, doing: str = "", busy: int = 0) -> WorkerView:
    """A worker whose work began 50 s ago."""
    return WorkerView(
        slot=slot, pid=7617 + slot, started=1, generation=slot + 1, state=State.SERVING,
        figures=Figures(rss=used, soft=soft, hard=None if soft is None else 2 * soft, in_flight=busy), published=NOW - age,
        measured=NOW - age, used=used, counters=Counters(work=1203 + slot), in_flight=[InFlight(doing, NOW - 50, 0)] if doing else [],
    )  # fmt: skip


def grows(pace: int, used: int = 100 * MIB) -> tuple[Sample, ...]:
    """Samples of ten seconds."""
    return tuple(Sample(float(n), used - (10 - n) * pace) for n in range(11))


def pool(*workers: WorkerView, name: str = "shop") -> PoolView:
    """With two deaths and some recycles."""
    totals = Counters(work=4812, recycles=[3, 0, 1, 0, 0, 0, 2, 0])
    deaths = [DeathView(NOW - n, End.OOM_LIKELY.value, f"worker {n} was killed") for n in range(3)]
    return PoolView(
        "gunicorn sync", 7616, 1, NOW - 900, 4, 1, 512 * MIB, 461 * MIB, list(workers), totals, held=421 * MIB, name=name, unit="requests",
        ends={End.OOM_LIKELY.value: 2, End.RECYCLED.value: 6}, deaths=deaths,
    )  # fmt: skip


def observed(*workers: Worker, name: str = "shop", **more: object) -> Observed:
    return replace(Observed(f"/{name}", pool(*(each.view for each in workers), name=name), workers), **more)  # type: ignore[arg-type]


FOUR = observed(
    Worker(view(0, 866 * MIB, doing="GET /reports/2026/annual", busy=2), grows(5 * MIB)),
    Worker(view(1, 100 * MIB), grows(MIB)),
    Worker(view(2, 150 * MIB, age=38), grows(-MIB)),
    Worker(view(3, None)),
)

AT_80 = """\
shop · gunicorn sync · supervisor 7616
  holds 421 MiB of 461 MiB · 2 in flight · recycles 6 · deaths: 2 oom_likely
    7617 serving   866 MiB  300 MiB ████████ 289%  +5.0 MiB/s     over    2
    7619 serving   150 MiB  300 MiB ████░░░░  50%  -1.0 MiB/s        -
    7618 serving   100 MiB  300 MiB ███░░░░░  33%  +1.0 MiB/s 3.33 min
    7620 serving   unknown  300 MiB                         -        -
  died 07:59:59 worker 0 was killed
  died 07:59:58 worker 1 was killed"""


def text(pools: list[Observed], width: int, sort: Sort = Sort.USED, *, ascii_only: bool = False) -> str:
    """All lines at this width."""
    return "\n".join(line.text(width, NOW, ascii_only).plain.rstrip() for line in lines_of(pools, sort)).rstrip()


def test_at_80() -> None:
    """A title, the totals, the workers, the last deaths."""
    shown = text([FOUR], 80)

    assert [line for line in shown.splitlines() if "died" not in line] == [line for line in AT_80.splitlines() if "died" not in line]
    assert [line.partition("worker")[2] for line in shown.splitlines()[-2:]] == [" 0 was killed", " 1 was killed"]


def test_at_40() -> None:
    """What matters most."""
    assert text([FOUR], 40).splitlines()[2:6] == [
        "    7617  866 MiB 289%     over",
        "    7619  150 MiB  50%        -",
        "    7618  100 MiB  33% 3.33 min",
        "    7620  unknown             -",
    ]


def test_wide() -> None:
    """With what each one does, and how old its figures are."""
    shown = text([FOUR], 140)

    assert "50.0 s GET /reports/2026/annual" in shown
    assert "seen 38 s ago" in shown


@given(st.integers(1, 300), st.sampled_from(list(Sort)), st.booleans())
def test_no_line_is_wider(width: int, sort: Sort, ascii_only: bool) -> None:
    """Law: and the title of a column stands above it. The columns that are never left out need 32 cells."""
    lines = [line.text(width, NOW, ascii_only) for line in lines_of([FOUR, observed(problem="it can't be read")], sort)]

    least = sum(column.width + 1 for column in COLUMNS if not column.left_out)
    assert max(line.cell_len for line in lines) <= max(width, least)
    assert heading(width).cell_len <= max(width, least)
    assert cell_len(detail(FOUR.workers[0], "requests", width, NOW).plain) <= max(width, 3)
    if ascii_only:
        assert all(line.plain.isascii() for line in lines)


@given(st.integers(1, 400))
def test_more_room_never_shows_less(width: int) -> None:
    """Law: a column that is there stays as the screen gets wider."""
    narrow, wide = fitted(width)[0], fitted(width + 1)[0]

    assert set(narrow) <= set(wide)


def slots(sort: Sort) -> list[int]:
    return [worker.view.slot for worker in in_order(FOUR.workers, sort)]


@pytest.mark.parametrize(
    ("sort", "expected"),
    [
        (Sort.USED, [0, 2, 1, 3]),
        (Sort.SHARE, [0, 2, 1, 3]),
        (Sort.GROWTH, [0, 1, 2, 3]),
        (Sort.TIME, [0, 1, 2, 3]),
        (Sort.SLOT, [0, 1, 2, 3]),
    ],
)
def test_the_order(sort: Sort, expected: list[int]) -> None:
    """What matters most is first, what is not known last."""
    assert slots(sort) == expected


def test_every_order_comes_round() -> None:
    """By the same key."""
    sort, seen = Sort.USED, []
    for _ in Sort:
        seen.append(sort)
        sort = sort.following

    assert (seen, sort) == (list(Sort), Sort.USED)


@given(
    st.lists(st.tuples(st.none() | st.integers(0, 1 << 40), st.none() | st.integers(0, 1 << 40)), max_size=20), st.sampled_from(list(Sort))
)
def test_nobody_is_lost(sizes: list[tuple[int | None, int | None]], sort: Sort) -> None:
    """Law: sorting and formatting take any figures."""
    workers = [Worker(view(slot, used, soft=soft)) for slot, (used, soft) in enumerate(sizes)]

    assert sorted(each.view.slot for each in in_order(workers, sort)) == list(range(len(sizes)))
    assert all(worker_line(each, 120, NOW, False).plain for each in workers)


def test_text_from_outside_is_no_markup() -> None:
    """As it stands there."""
    shown = text([observed(Worker(view(0, MIB, doing="GET /[red]x[/red]")), name="[bold]shop")], 160)

    assert "[bold]shop · gunicorn" in shown
    assert "GET /[red]x[/red]" in shown


def test_a_pool_that_can_not_be_read_has_one_line() -> None:
    """And the next pool stands below it."""
    assert text([Observed("/a", problem="/a is not a scoreboard"), FOUR], 80).splitlines()[:2] == [
        "/a is not a scoreboard", "shop · gunicorn sync · supervisor 7616",
    ]  # fmt: skip


class Machine:
    """Scoreboards, and who reads them when."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        self.pools: dict[str, PoolView | str] = {}
        self.read: list[str] = []
        self.lived: list[str] = []
        monkeypatch.setattr(observer, "living_boards", lambda: sorted(self.pools))
        monkeypatch.setattr(observer, "find_pools", self._read)
        monkeypatch.setattr(observer, "live", self._live)

    def _read(self, paths: list[str], say: Callable[[str], None], *, routes: bool) -> list[Found]:
        (path,) = paths
        assert not routes
        self.read.append(path)
        found = self.pools[path]
        if isinstance(found, str):
            say(found)
            return []
        return [Found(path, found)]

    def _live(self, found: PoolView) -> PoolView:
        self.lived.append(found.name)
        return found


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def test_what_is_not_shown_is_read_less_often(machine: Machine) -> None:
    """And the kernel is asked for the shown ones alone; all at first."""
    machine.pools = {"/a": pool(view(0, MIB), name="a"), "/b": pool(view(0, MIB), name="b")}
    looking = Observer(clock=lambda: machine.now)
    assert [each.path for each in looking.observe(set())] == ["/a", "/b"]
    assert (machine.read, machine.lived) == (["/a", "/b"], ["a", "b"])
    machine.read, machine.lived = [], []

    for _ in range(int(SELDOM)):
        machine.now += 1
        looking.observe({"/a"})

    assert machine.read == ["/a"] * int(SELDOM) + ["/b"]
    assert machine.lived == ["a"] * int(SELDOM)


def test_growth_is_told_from_the_last_readings(machine: Machine) -> None:
    """By worker; one that is new has none, and what a dead one left is forgotten."""
    looking = Observer(clock=lambda: machine.now)
    for second in range(10):
        machine.now += 1
        machine.pools["/a"] = pool(view(0, (100 + second) * MIB), view(1, 50 * MIB))
        (found,) = looking.observe(None)
    machine.pools["/a"] = pool(replace(view(0, 90 * MIB), generation=9), view(1, 50 * MIB))
    machine.now += 1
    (after,) = looking.observe(None)

    assert [(worker.pace, worker.seconds) for worker in found.workers] == [(MIB, 191.0), (0.0, None)]
    assert [worker.pace for worker in after.workers] == [None, 0.0]
    assert set(looking._samples) == {("/a", 9), ("/a", 2)}


def test_a_pool_that_ends_is_shown_for_a_while(machine: Machine) -> None:
    """With one line; no order can be given to it."""
    machine.pools = {"/a": pool(view(0, MIB))}
    looking = Observer(clock=lambda: machine.now)
    assert looking.observe(None)[0].found is not None
    machine.pools = {}

    (ended,) = looking.observe(None)
    machine.now += GONE_FOR - 1
    still = looking.observe(None)
    machine.now += 1

    assert (ended.problem, ended.workers, ended.found) == ("its supervisor 7616 has ended", (), None)
    assert text([ended], 80).splitlines() == ["shop · gunicorn sync · supervisor 7616", "  its supervisor 7616 has ended"]
    assert len(still) == 1
    assert looking.observe(None) == []


def test_a_board_that_can_not_be_read_any_more(machine: Machine) -> None:
    """Its last title stays, with why; when it can be read again, it is as before. Those that never could come last."""
    machine.pools = {"/a": "/a is too new", "/b": pool(view(0, MIB), name="b")}
    looking = Observer(clock=lambda: machine.now)
    assert [each.path for each in looking.observe(None)] == ["/b", "/a"]
    machine.pools["/b"] = "/b: Permission denied"

    (broken, _) = looking.observe(None)
    machine.pools["/b"] = pool(view(0, MIB), name="b")
    (mended, never) = looking.observe(None)

    assert (broken.problem, broken.workers) == ("/b: Permission denied", ())
    assert (mended.problem, len(mended.workers)) == ("", 1)
    assert (never.pool, never.problem) == (None, "/a is too new")


def test_a_real_board(new_board: Callable[..., object], tmp_path: Path) -> None:
    """Read by the reader that all commands have; a file that is none has its one line."""
    board = new_board()
    slot = board.reserve()  # type: ignore[attr-defined]
    slot.claim()
    slot.set_state(State.SERVING)
    (tmp_path / "none").write_bytes(b"")

    (found,) = Observer(board.path).observe(None)  # type: ignore[attr-defined]
    (none,) = Observer(str(tmp_path / "none")).observe(None)

    assert [worker.view.pid for worker in found.workers] == [os.getpid()]
    assert "is not a scoreboard" in none.problem


def test_a_probe_has_a_line() -> None:
    """While it goes on, and with what it has found; as text, and cut at the width."""
    traces = Probed(at=900.0, pid=812, generation=3, stage=Stage.TRACES, text="traces its allocations", path="")
    done = traces._replace(stage=Stage.DONE, text="app.py:42 in leak keeps 64 KiB a call of GET /[red]\x1b[31m")

    def shown(probed: Probed, width: int) -> list[str]:
        lines = lines_of([Observed("/a", replace(pool(), probed=probed), (), read_at=0.0)], Sort.USED)
        return [line.text(width, 1000.0, True).plain for line in lines]

    assert "  worker 812 is probed: traces its allocations" in shown(traces, 120)
    (line,) = [line for line in shown(done, 160) if "probe of" in line]
    assert "app.py:42 in leak keeps 64 KiB a call of GET /[red]" in line and line.isprintable()
    assert all(len(line) <= 40 for line in shown(done, 40))
    assert not [line for line in shown(traces._replace(stage=Stage.NONE), 120) if "prob" in line]


def test_what_recycled_workers_show_stands_beside_the_figures() -> None:
    """A leak, with its figure."""
    shown = Observed("/a", replace(pool(), retired=several(3)), (), read_at=0.0)

    text = "\n".join(line.text(120, 0.0, False).plain for line in lines_of([shown], Sort.USED))

    assert "leaks 102 KiB each" in text
