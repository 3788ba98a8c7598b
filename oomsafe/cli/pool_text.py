"""One pool as text in lines of a given width: what matters most comes first; a figure that does not fit is left out, never cut."""

from __future__ import annotations

import time
from collections.abc import Iterable

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from oomsafe.cli.bars import memory_bar
from oomsafe.cli.columns import Column, cells_of, line_of, that_fit
from oomsafe.kernel.process import parent_of
from oomsafe.policy.ends import End
from oomsafe.policy.probed import Stage
from oomsafe.policy.retention import Kind, judge
from oomsafe.policy.text import printable
from oomsafe.policy.units import counted, format_change, format_duration, format_size
from oomsafe.scoreboard.view import InFlight, PoolView, WorkerView

#: The age in seconds from which it is shown beside the figures.
OLD = 3.0

#: The most pieces of work that are shown for one worker, the oldest first.
SHOWN = 3

#: The cells before the work in flight.
INDENT = 8

#: The width of the bar in cells, if there is room for it.
BAR = 12


def pool_text(pool: PoolView, width: int, now: float | None = None, *, ascii_only: bool = False) -> Text:
    """The pool, in lines of at most `width` cells: its name and limits, its workers, what they have in flight, its totals.

    A figure is never cut or broken; if nothing else helps, its line is longer. `now` in seconds since 1970.
    """
    now = time.time() if now is None else now
    dot = ", " if ascii_only else " · "
    title, totals = _filled(_title(pool), dot, width, "bold"), _filled(_totals(pool), dot, width, "dim")
    if pool.last_recycle is not None:
        totals += _filled([f"last recycle at {_when(pool.last_recycle.at, now)}: {pool.last_recycle.line}"], dot, width, "dim")
    totals += _filled(_memory(pool), dot, width, "")
    totals += _filled(probe_lines(pool, now), dot, width, "")
    for death in pool.deaths:
        totals += _filled([f"death at {_when(death.at, now)}: {death.line}"], dot, width, "")
    # Text, because names that other processes have written must not be read as markup
    return Text("\n").join([*title, *_workers(pool, width, now, ascii_only), *totals])


def _title(pool: PoolView) -> list[str]:
    others = f"others use {format_size(pool.others)}" if pool.others else ""
    source = f"{pool.source}, {others}" if pool.source and others else pool.source or others
    where = f" ({source})" if source else ""
    held = f"holds {format_size(pool.held)}, " if pool.held is not None or not pool.is_single_process else ""
    limits = f"{held}budget {format_size(pool.budget)}, limit {format_size(pool.limit)}{where}"
    return [part for part in (pool.name, pool.server, _whose(pool), limits) if part]


def _whose(pool: PoolView) -> str:
    if not pool.is_single_process:
        return f"supervisor {pool.supervisor}" if pool.supervisor else ""
    # if a server has started several such processes, each has its own pool, and this shows that they belong together
    parent = parent_of(pool.supervisor)
    return "" if parent is None else f"a child of {parent[0]} ({printable(parent[1])})"


def _totals(pool: PoolView) -> list[str]:
    totals = pool.totals
    recycles = ", ".join(f"{count} for {reason}" for reason, count in totals.by_reason.items() if count)
    aborts = ", ".join(f"{count} for {reason}" for reason, count in totals.aborts_by_reason.items() if count)
    deaths = ", ".join(f"{count} {verdict}" for verdict, count in pool.ends.items() if count and not End(verdict).in_order)
    parts = [
        f"{counted(totals.work, _unit(pool))} since the start",
        f"recycles: {recycles or 'none'}",
        *([f"aborted: {aborts}"] if aborts else []),
        *([f"deaths: {deaths}"] if deaths else []),
        f"reclaimed {format_size(totals.reclaimed)}",
    ]
    return [*parts, f"no worker served for {pool.unserved:.1f} s"] if pool.unserved else parts


def _memory(pool: PoolView) -> list[str]:
    """``workers leak: memory in use rises by 259 KiB a request, over all of the workers' lives``; empty: not known."""
    found = judge(pool.retired, _unit(pool))
    if found.kind is Kind.UNKNOWN:
        return []
    leak = "leak" if found.kind is Kind.LEAK else "don't leak"
    return [f"workers {leak}: {found.why} (oomsafe retired)"]


def probe_lines(pool: PoolView, now: float) -> list[str]:
    """What the last probe has found, or how far it is."""
    probed = pool.probed
    if probed is None or probed.stage is Stage.NONE:
        return []
    worker, failed = f"worker {probed.pid}", "failed: " if probed.stage is Stage.FAILED else ""
    if probed.stage.is_over:
        return [f"probe of {worker} at {_when(probed.at, now)}: {failed}{probed.text} (oomsafe probe --last)"]
    return [f"{worker} is probed: {probed.text}"]


def _when(at: float, now: float) -> str:
    """``2026-11-26 11:45:34 (12 s ago)``."""
    return f"{time.strftime('%F %T', time.localtime(at))} ({format_duration(round(max(0.0, now - at)))} ago)"


def _unit(pool: PoolView) -> str:
    return pool.unit or "requests"


def _filled(parts: Iterable[str], dot: str, width: int, style: str) -> list[Text]:
    """`parts` as lines. A line is broken between two parts; a part that is too long is broken after a comma or before a parenthesis,
    else anywhere."""
    lines = [""]
    for part in parts:
        joined = f"{lines[-1]}{dot}{part}" if lines[-1] else part
        if cell_len(joined) <= width:
            lines[-1] = joined
        else:
            lines += _broken(part, width)
    return [Text(line, style=style) for line in lines if line]


def _broken(part: str, width: int) -> list[str]:
    lines = [""]
    # if possible, a size stays with its unit, and the content of parentheses stays together
    for piece in _pieces(part):
        joined = f"{lines[-1]} {piece}" if lines[-1] else piece
        if cell_len(joined) <= width:
            lines[-1] = joined
        else:
            lines += _chopped(piece, width)
    return [line.rstrip() for line in lines if line.strip()]


def _chopped(piece: str, width: int) -> list[str]:
    """`piece` in parts of at most `width` cells. The chop_cells() of rich 13.0 returns text backwards."""
    lines = [""]
    for character in piece:
        if lines[-1] and cell_len(lines[-1] + character) > width:
            lines.append("")
        lines[-1] += character
    return lines


def _pieces(part: str) -> list[str]:
    """`part` split after each comma, semicolon and colon, and before each parenthesis, so that figures stay whole."""
    return part.replace(", ", ",\n").replace("; ", ";\n").replace(": ", ":\n").replace(" (", "\n(").split("\n")


def _workers(pool: PoolView, width: int, now: float, ascii_only: bool) -> list[Text]:
    if not pool.workers:
        return [Text("  no worker")]
    columns = _columns(_unit(pool), now, any(_age(worker, now) for worker in pool.workers), ascii_only)
    rows = [cells_of(columns, worker) for worker in pool.workers]
    kept, widths = that_fit(columns, rows, width)
    lines = [line_of([Text(columns[at].title, style="bold") for at in kept], [columns[at] for at in kept], widths)]
    for worker, row in zip(pool.workers, rows, strict=True):
        lines.append(line_of([row[at] for at in kept], [columns[at] for at in kept], widths))
        lines += [Text(" " * INDENT + line) for line in _doing(worker, max(20, width - INDENT), now)]
    return lines


def _columns(unit: str, now: float, some_are_old: bool, ascii_only: bool) -> list[Column[WorkerView]]:
    def soft(worker: WorkerView) -> str:
        return "none" if worker.figures.soft is None else format_size(worker.figures.soft)

    def age(worker: WorkerView) -> str:
        seconds = _age(worker, now)
        return f"seen {seconds:.0f} s ago" if seconds else ""

    def percent(worker: WorkerView) -> str:
        return f"{worker.used / worker.figures.soft:.0%}" if worker.used is not None and worker.figures.soft else ""

    found = [
        Column("pid", lambda worker: str(worker.pid)),
        Column("state", lambda worker: worker.state.value, right=False),
        Column("used", lambda worker: format_size(worker.used)),
        Column("", age, right=False),
        Column("soft limit", soft, left_out=1),
        Column("", lambda worker: memory_bar(worker.used, worker.figures.soft, BAR, ascii_only=ascii_only), left_out=3, right=False),
        Column("", percent, left_out=2),
        Column(unit, lambda worker: str(worker.counters.work), left_out=4),
        Column("slot", lambda worker: str(worker.slot), left_out=5),
        Column("rss", lambda worker: format_size(worker.figures.rss), left_out=6),
    ]
    return found if some_are_old else [column for column in found if column.cell is not age]


def _age(worker: WorkerView, now: float) -> float | None:
    """The age of the worker's figures in seconds if they are old (OLD), else None."""
    age = None if worker.measured is None else now - worker.measured
    return age if age is not None and age >= OLD else None


def _doing(worker: WorkerView, width: int, now: float) -> list[str]:
    first = sorted(worker.in_flight, key=lambda work: work.began)[:SHOWN]
    lines = [_work(worker, work, width, now) for work in first]
    more = len(worker.in_flight) - len(lines)
    return [*lines, f"and {more} more"] if more > 0 else lines


def _work(worker: WorkerView, work: InFlight, width: int, now: float) -> str:
    """``GET /reports (38.2 s, +840 MiB)``: if there is not enough room, the end of the name is cut, never the figures."""
    growth = worker.grown(work)
    grown = "" if growth is None else f", {format_change(growth)}"
    figures = f" ({max(0.0, now - work.began):.1f} s{grown})"
    room = width - len(figures)
    name = work.name if cell_len(work.name) <= room else set_cell_size(work.name, max(1, room - 3)) + "..."
    return name + figures
