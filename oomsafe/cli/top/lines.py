"""What stands in the lines of the screen: a pool's title and totals, its workers, its deaths. Only lines that are visible are formatted."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from functools import lru_cache, partial
from typing import NamedTuple

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from oomsafe.cli.bars import memory_bar
from oomsafe.cli.pool_text import probe_lines
from oomsafe.cli.top.observer import Observed, Worker
from oomsafe.policy.ends import End
from oomsafe.policy.probed import Stage
from oomsafe.policy.retention import judge
from oomsafe.policy.text import without_controls
from oomsafe.policy.units import counted, format_change, format_duration, format_size
from oomsafe.scoreboard.view import DeathView, PoolView

#: The age in seconds from which a worker's figures are called old.
OLD = 5.0

#: The last deaths of a pool that are shown.
DEATHS = 2

#: The least cells in which work in flight says something.
DOING = 16

#: A wide screen gives what is left to the work in flight, from this width of the bar on.
WIDEST_BAR = 20


class Sort(Enum):
    """The order of a pool's workers; the value is what the screen calls it."""

    USED = "used"
    SHARE = "% of limit"
    GROWTH = "growth"
    TIME = "time to limit"
    SLOT = "slot"

    @property
    def following(self) -> Sort:
        """The next one, and after the last the first."""
        every = tuple(Sort)
        return every[(every.index(self) + 1) % len(every)]


#: The smallest first; whose figure is not known comes last, and of equal ones the lower slot first.
_KEYS: dict[Sort, Callable[[Worker], float | None]] = {
    Sort.USED: lambda worker: None if worker.view.used is None else -worker.view.used,
    Sort.SHARE: lambda worker: None if worker.share is None else -worker.share,
    Sort.GROWTH: lambda worker: None if worker.pace is None else -worker.pace,
    Sort.TIME: lambda worker: worker.seconds,
    Sort.SLOT: lambda _: 0.0,
}


def in_order(workers: Iterable[Worker], sort: Sort) -> list[Worker]:
    """The workers, those that matter most first."""

    def key(worker: Worker) -> tuple[bool, float, int]:
        figure = _KEYS[sort](worker)
        return figure is None, figure or 0.0, worker.view.slot

    return sorted(workers, key=key)


class Line(NamedTuple):
    """One line of the screen."""

    path: str
    """The scoreboard of its pool."""
    text: Callable[[int, float, bool], Text]
    """Its text, given the width in cells, the time in seconds since 1970, and whether it must be ASCII."""
    worker: Worker | None = None
    """The worker that it shows; None: it shows something else."""


def lines_of(pools: Sequence[Observed], sort: Sort) -> list[Line]:
    """All lines, not formatted yet; an empty one behind each pool."""
    found: list[Line] = []
    for observed in pools:
        found += _lines(observed, sort)
        found += [] if observed.pool is None else [Line(observed.path, plain(""))]
    return found


def plain(text: str, style: str = "") -> Callable[[int, float, bool], Text]:
    """For a Line that is always the same, cut at the width."""
    return lambda width, *_: _cut(Text(text, style), width)


def _lines(observed: Observed, sort: Sort) -> Iterable[Line]:
    path, pool = observed.path, observed.pool
    if pool is None:
        yield Line(path, plain(observed.problem, "yellow"))
        return
    yield Line(path, partial(_title, pool))
    if observed.problem:
        yield Line(path, plain(f"  {observed.problem}", "yellow"))
        return
    yield Line(path, partial(_totals, observed, pool))
    if pool.probed is not None and pool.probed.stage is not Stage.NONE:
        yield Line(path, partial(_probe, pool))
    for worker in in_order(observed.workers, sort):
        yield Line(path, partial(worker_line, worker), worker)
    for death in pool.deaths[:DEATHS]:
        yield Line(path, partial(_death, death))


def _title(pool: PoolView, width: int, _: float, ascii_only: bool) -> Text:
    whose = f"supervisor {pool.supervisor}" if not pool.is_single_process else f"pid {pool.supervisor}"
    return _cut(Text((", " if ascii_only else " · ").join(part for part in (pool.name, pool.server, whose) if part), "bold"), width)


def _totals(observed: Observed, pool: PoolView, width: int, _: float, ascii_only: bool) -> Text:
    """As many of the figures as fit, none of them cut."""
    recycles = sum(pool.totals.by_reason.values())
    deaths = ", ".join(f"{count} {verdict}" for verdict, count in pool.ends.items() if count and not End(verdict).in_order)
    parts = [
        *([] if pool.held is None else [f"holds {format_size(pool.held)} of {format_size(pool.budget)}"]),
        f"{sum(worker.busy for worker in observed.workers)} in flight",
        f"recycles {recycles}",
        *([f"deaths: {deaths}"] if deaths else []),
        *([brief] if (brief := judge(pool.retired).brief) else []),
        counted(pool.totals.work, pool.unit or "requests"),
        *([f"no worker served for {pool.unserved:.1f} s"] if pool.unserved else []),
    ]
    dot, line = ", " if ascii_only else " · ", ""
    for part in parts:
        joined = f"{line}{dot}{part}" if line else f"  {part}"
        line = joined if cell_len(joined) <= width else line
    return Text(line, "dim")


def _probe(pool: PoolView, width: int, now: float, _: bool) -> Text:
    """How far the last probe is, or what it has found."""
    return _cut(Text(f"  {without_controls(' '.join(probe_lines(pool, now)))}"), width)


def _death(death: DeathView, width: int, *_: object) -> Text:
    at = time.strftime("%H:%M:%S", time.localtime(death.at))
    return _cut(Text.assemble((f"  died {at} ", "red"), without_controls(death.line)), width)


class Column(NamedTuple):
    """One figure of a worker."""

    title: str
    width: int
    cell: Callable[[Worker], str]
    left_out: int = 0
    """If there is not enough room, the column with the highest number is left out first; 0: never."""
    right: bool = True


def _percent(worker: Worker) -> str:
    return "" if worker.share is None else f"{min(worker.share, 9.99):.0%}"


def _pace(worker: Worker) -> str:
    return "-" if worker.pace is None else f"{format_change(round(worker.pace))}/s"


def _seconds(worker: Worker) -> str:
    seconds = worker.seconds
    return "-" if seconds is None else "over" if not seconds else format_duration(seconds)


def _limit(worker: Worker) -> str:
    return "none" if worker.limit is None else format_size(worker.limit)


#: The bar's place; it is as wide as there is room.
BAR = Column("", 8, lambda _: "", left_out=3, right=False)

COLUMNS = (
    Column("pid", 7, lambda worker: str(worker.view.pid)),
    Column("state", 8, lambda worker: worker.view.state.value, left_out=2, right=False),
    Column("used", 8, lambda worker: format_size(worker.view.used)),
    Column("limit", 8, _limit, left_out=4),
    BAR,
    Column("", 4, _percent),
    Column("growth", 11, _pace, left_out=1),
    Column("to limit", 8, _seconds),
    Column("busy", 4, lambda worker: str(worker.busy or ""), left_out=5),
)


@lru_cache(maxsize=8)
def fitted(width: int) -> tuple[tuple[Column, ...], int, int]:
    """The columns for which there is room in `width` cells, the width of the bar, and what is left for the work in flight."""
    columns = list(COLUMNS)
    while sum(column.width + 1 for column in columns) > width:
        least = max(columns, key=lambda column: column.left_out)
        if not least.left_out:
            break
        columns.remove(least)
    left = max(0, width - sum(column.width + 1 for column in columns))
    wider = min(max(0, left - 24) // 2, WIDEST_BAR - BAR.width) if BAR in columns else 0
    return tuple(columns), BAR.width + wider, left - wider


def heading(width: int) -> Text:
    """The titles of the columns."""
    columns, bar, left = fitted(width)
    text = Text(style="bold")
    for column in columns:
        size = bar if column is BAR else column.width
        text.append(" " + (column.title.rjust(size) if column.right else column.title.ljust(size)))
    text.append(" in flight" if left >= DOING else "")
    return text


def worker_line(worker: Worker, width: int, now: float, ascii_only: bool) -> Text:
    """The worker's figures, and the oldest of its work in flight, cut at `width` cells."""
    columns, bar, left = fitted(width)
    text = Text()
    for column in columns:
        if column is BAR:
            drawn = memory_bar(worker.view.used, worker.limit, bar, ascii_only=ascii_only)
            text.append(" ").append_text(drawn).append(" " * (bar - drawn.cell_len))
        else:
            cell = column.cell(worker)
            text.append(" " + (cell.rjust(column.width) if column.right else cell.ljust(column.width)))
    doing = _doing(worker, now)
    return text.append(" " + _cut_text(doing, left - 1, "..."), "dim") if doing and left >= DOING else text


def detail(worker: Worker, unit: str, width: int, now: float) -> Text:
    """What the columns have no room for: of the marked worker, in one line. `unit` is what it counts, in the plural."""
    view, figures = worker.view, worker.view.figures
    hard = "" if figures.hard is None else f", hard limit {format_size(figures.hard)}"
    line = f"worker {view.pid} (slot {view.slot}): rss {format_size(figures.rss)}{hard}, {counted(view.counters.work, unit)}"
    doing = _doing(worker, now)
    return Text(_cut_text(f"{line}; {doing}" if doing else line, width, "..."))


def _doing(worker: Worker, now: float) -> str:
    age = None if worker.view.measured is None else now - worker.view.measured
    seen = f"seen {age:.0f} s ago " if age is not None and age >= OLD else ""
    if not worker.view.in_flight:
        return seen
    oldest = min(worker.view.in_flight, key=lambda work: work.began)
    return f"{seen}{max(0.0, now - oldest.began):.1f} s {without_controls(oldest.name)}"


def _cut(text: Text, width: int) -> Text:
    text.truncate(max(0, width), overflow="crop")
    return text


def _cut_text(text: str, width: int, mark: str) -> str:
    return text if cell_len(text) <= width else set_cell_size(text, max(0, width - len(mark))) + mark
