"""`oomsafe status` for a person: at any width, with colour or without, nothing is cut that somebody needs whole."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from oomsafe.cli.pool_text import pool_text
from oomsafe.cli.status import show
from oomsafe.policy.state import State
from oomsafe.policy.units import MIB, format_size
from oomsafe.scoreboard.layout import Counters
from oomsafe.scoreboard.slot import Figures
from oomsafe.scoreboard.view import InFlight, PoolView, Recycled, WorkerView

NOW = 1_800_000_000.0
REPORTS = "GET /reports/2026/annual/by/region/and/department/of/everybody"


def worker(slot: int, used: int, *, age: float = 0.5, doing: str = "", state: State = State.SERVING) -> WorkerView:
    """One with a soft limit of 300 MiB, whose work began 50 s ago, at 26 MiB."""
    return WorkerView(
        slot=slot, pid=7617 + slot, started=1, generation=slot + 1, state=state, figures=Figures(rss=used + 9 * MIB, soft=300 * MIB),
        published=NOW - 60, measured=NOW - age, used=used, counters=Counters(work=1203 + slot),
        in_flight=[InFlight(doing, NOW - 50, 26 * MIB)] if doing else [],
    )  # fmt: skip


def pool(*workers: WorkerView) -> PoolView:
    totals = Counters(work=4812, reclaimed=12 * MIB, recycles=[3, 0, 1, 0, 0, 0, 0, 0])
    return PoolView(
        "gunicorn sync", 7616, 1, NOW - 900, len(workers), 1, 512 * MIB, 461 * MIB, list(workers), totals, 0.0, 421 * MIB, 20 * MIB,
        "cgroup v2 /system.slice/app.service",
    )  # fmt: skip


FOUR = pool(
    worker(0, 866 * MIB, doing=REPORTS, state=State.WAITING),
    worker(1, 151 * MIB),
    worker(2, 26 * MIB, age=38, doing="GET /slow"),
    worker(3, 300 * MIB, state=State.DRAINING),
)

AT_80 = """\
gunicorn sync · supervisor 7616
holds 421 MiB, budget 461 MiB, limit 512 MiB
(cgroup v2 /system.slice/app.service, others use 20.0 MiB)
   pid  state        used  soft limit                      requests  slot
  7617  waiting   866 MiB     300 MiB  ████████████  289%      1203     0
        GET /reports/2026/annual/by/region/and/department/... (50.0 s, +849 MiB)
  7618  serving   151 MiB     300 MiB  ██████░░░░░░   50%      1204     1
  7620  draining  300 MiB     300 MiB  ████████████  100%      1206     3
4812 requests since the start · recycles: 3 for soft_limit, 1 for replaced
reclaimed 12.0 MiB
"""

OLD_AT_80 = """\
   pid  state         used                 soft limit
  7617  waiting    866 MiB                    300 MiB  ████████████  289%
        GET /reports/2026/annual/by/region/and/department/... (50.0 s, +849 MiB)
  7618  serving    151 MiB                    300 MiB  ██████░░░░░░   50%
  7619  serving   26.0 MiB  seen 38 s ago     300 MiB  █░░░░░░░░░░░    9%
        GET /slow (50.0 s, +9.0 MiB)
"""


def shown(view: PoolView, width: int, **how: object) -> str:
    return pool_text(view, width, NOW, **how).plain + "\n"  # type: ignore[arg-type]


def test_at_80_columns() -> None:
    """Every pid, every figure, and what is in flight, whole; the name of a piece of work loses its end, and its figures nothing."""
    assert shown(pool(*(FOUR.workers[at] for at in (0, 1, 3))), 80) == AT_80


def test_a_figure_that_is_old_has_its_age_beside_it() -> None:
    """Requests and slots give way to it."""
    assert "\n".join(shown(FOUR, 80).splitlines()[3:9]) + "\n" == OLD_AT_80


def test_wide() -> None:
    """What there is more room for."""
    header, first = shown(FOUR, 140).splitlines()[1:3]

    assert re.findall(r"\w+(?: \w+)?", header) == ["pid", "state", "used", "soft limit", "requests", "slot", "rss"]
    assert first.split()[-2:] == ["875", "MiB"]


def test_narrow() -> None:
    """Who holds how much is said to the last."""
    lines = shown(FOUR, 48).splitlines()

    assert max(map(cell_len, lines)) <= 48
    assert "  7617  waiting    866 MiB" in lines
    assert "        GET /reports/2026/... (50.0 s, +849 MiB)" in lines


@pytest.mark.parametrize(("age", "expected"), [(12, "12 s ago"), (119, "119 s ago"), (600, "10 min ago"), (90_000, "25 h ago")])
def test_the_last_recycle(age: float, expected: str) -> None:
    """When it was, and its line, which is broken between two figures."""
    line = "worker 812 (slot 3) recycling: anon 812 MiB > soft limit 768 MiB for 2.0 s, after 1203 requests; POST /reports keeps 2 MiB"
    text = shown(replace(FOUR, last_recycle=Recycled(NOW - age, line)), 80)

    last = text[text.index("last recycle at ") :].splitlines()
    when = rf"last recycle at \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d \({expected}\)"
    assert re.fullmatch(rf"{when}: {re.escape(line)}", " ".join(last))
    assert max(map(len, last)) <= 80


def test_as_ascii() -> None:
    """Where the terminal or the pipe has no more."""
    text = shown(FOUR, 80, ascii_only=True)

    assert text.isascii()
    assert "######......   50%" in text


def test_a_pool_without_a_worker() -> None:
    """It boots."""
    assert "  no worker\n" in shown(pool(), 80)


workers = st.builds(
    worker,
    st.integers(0, 4_000_000),
    st.integers(0, 1 << 50),
    age=st.sampled_from([0.0, 38.0, 3e9]),
    doing=st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=96),
    state=st.sampled_from(list(State)),
)


@given(several=st.lists(workers, max_size=5) | workers.map(lambda one: [one] * 129), width=st.integers(60, 200))
def test_no_line_is_longer_and_no_figure_is_broken(several: list[WorkerView], width: int) -> None:
    """Law: at 60 cells and more, whatever stands there."""
    text = shown(pool(*several), width)

    assert max(map(cell_len, text.splitlines())) <= width
    assert "…" not in text
    rows = [line for line in text.splitlines() if re.match(r" +\d+  [a-z]+ ", line)]
    assert len(rows) == len(several)
    for one, row in zip(several, rows, strict=True):
        assert row.split()[:2] == [str(one.pid), one.state.value]
        assert f" {format_size(one.used)}" in row


@pytest.mark.parametrize("name", ["[red]x[/red]", "[/x]", "x" * 300, "\x1b[31m", "全" * 60])
def test_whatever_a_pool_calls_itself(name: str) -> None:
    """No markup, no line that is too long."""
    text = shown(PoolView(name, 1, 1, 0.0, 1, 1, None, None, [worker(0, MIB)]), 80)

    assert max(map(cell_len, text.splitlines())) <= 80
    assert name[:20] in text


@pytest.mark.parametrize(("environ", "colour"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)])
def test_without_colour(environ: dict[str, str], colour: bool) -> None:
    """NO_COLOR leaves bold and dim; a pipe has neither."""
    tty, pipe = io.StringIO(), io.StringIO()
    tty.isatty = lambda: True  # type: ignore[method-assign]
    show([FOUR], Console(file=tty, width=80, _environ={"TERM": "xterm-256color", **environ}))
    show([FOUR], Console(file=pipe, _environ={"TERM": "xterm-256color", **environ}))

    assert bool(re.search(r"\x1b\[(?:\d;)?3\d", tty.getvalue())) is colour
    assert "\x1b" not in pipe.getvalue()
    assert max(map(cell_len, pipe.getvalue().splitlines())) <= 80
