"""``oomsafe status``: the pools of this machine, read from their scoreboards."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict
from itertools import groupby
from typing import Any

import click
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from oomsafe.cli.bars import memory_bar
from oomsafe.errors import ScoreboardError
from oomsafe.policy.text import without_controls
from oomsafe.policy.units import format_change, format_size
from oomsafe.scoreboard.board import Scoreboard
from oomsafe.scoreboard.live import live
from oomsafe.scoreboard.places import can_hold_boards, living_boards
from oomsafe.scoreboard.view import PoolView, WorkerView

#: The most seconds for reading the boards of one folder, and for reading one board again while it is being written.
PATIENCE, EACH = 2.0, 0.25

#: Figures that are older than so many seconds have their age beside them.
OLD = 3.0


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--scoreboard", "path", type=click.Path(), envvar="OOMSAFE_SCOREBOARD", help="Show only the pool with this scoreboard.")
def status(as_json: bool, path: str | None) -> None:
    """Show every pool: workers against their limits, requests, recycles, work in flight.

    Shows the pools of the user who runs it; for root, those of all users. Exits with 1 if there is none.
    """
    pools = _pools([path] if path else living_boards())
    if as_json:
        print(json.dumps({"pools": [as_record(pool) for pool in pools]}, allow_nan=False))
    elif pools:
        Console().print(Group(*(render(pool) for pool in pools)))
    else:
        unseen = "" if can_hold_boards() else ", or its scoreboard is in memory only: no folder here is writable"
        print(f"no pool of this user is guarded by oomsafe now{unseen} (root sees those of all users)", file=sys.stderr)
    raise SystemExit(0 if pools else 1)


def as_record(pool: PoolView) -> dict[str, Any]:
    """A pool as JSON data: sizes in bytes, times in seconds since 1970, null for what is not known."""
    record = asdict(pool)
    record["totals"]["recycles"] = pool.totals.by_reason
    for shown, worker in zip(record["workers"], pool.workers, strict=True):
        shown["counters"]["recycles"] = worker.counters.by_reason
        for flight, work in zip(shown["in_flight"], worker.in_flight, strict=True):
            flight["grown"] = worker.grown(work)
    return record


def render(pool: PoolView) -> Table:
    """A pool as a table for people."""
    title = f"{pool.server} · supervisor {pool.supervisor} · {_memory(pool)}"
    recycles = ", ".join(f"{count} for {reason}" for reason, count in pool.totals.by_reason.items() if count)
    caption = (
        f"{pool.totals.work} requests since the start · recycles: {recycles or 'none'} · reclaimed {format_size(pool.totals.reclaimed)}"
    )
    if pool.unserved:
        caption += f" · no worker served for {pool.unserved:.1f} s"
    # what another user may have written is text, never markup
    table = Table(title=Text(title), caption=Text(caption), title_justify="left", caption_justify="left", expand=False)
    for column in ("slot", "pid", "state", "rss", "used", "soft limit", "", "requests"):
        table.add_column(column, justify="left" if column in ("state", "") else "right", no_wrap=True)
    table.add_column("in flight", overflow="fold")
    for worker in pool.workers:
        table.add_row(*_row(worker))
    return table


def _memory(pool: PoolView) -> str:
    """What the pool holds, and its limits."""
    others = f", others use {format_size(pool.others)}" if pool.others else ""
    where = f" ({pool.source}{others})" if pool.source else ""
    return f"holds {format_size(pool.held)}, budget {format_size(pool.budget)}, limit {format_size(pool.limit)}{where}"


def _row(worker: WorkerView) -> list[str | Text]:
    figures = worker.figures
    soft = "none" if figures.soft is None else format_size(figures.soft)
    bar = memory_bar(worker.used, figures.soft, width=12)
    sizes = (format_size(figures.rss), format_size(worker.used), soft)
    age = None if worker.measured is None else time.time() - worker.measured
    state = worker.state.value if age is None or age < OLD else f"{worker.state.value}, seen {age:.0f} s ago"
    # what a client sent is text, never markup
    doing = Text("\n".join(_doing(worker)))
    return [str(worker.slot), str(worker.pid), state, *sizes, bar, str(worker.counters.work), doing]


def _doing(worker: WorkerView) -> list[str]:
    now, lines = time.time(), []
    for work in sorted(worker.in_flight, key=lambda one: one.began)[:3]:
        growth = worker.grown(work)
        grown = "" if growth is None else f", {format_change(growth)}"
        lines.append(f"{work.name} ({max(0.0, now - work.began):.1f} s{grown})")
    more = len(worker.in_flight) - len(lines)
    return [*lines, f"and {more} more"] if more > 0 else lines


def _pools(paths: list[str]) -> list[PoolView]:
    """The pools that can be read. If a user has filled his folder with boards that take long to read, the rest of them is skipped."""
    pools: list[PoolView] = []
    for folder, in_folder in groupby(paths, os.path.dirname):
        until, left_out = time.monotonic() + PATIENCE, 0
        for path in in_folder:
            if time.monotonic() >= until:
                left_out += 1
                continue
            try:
                with Scoreboard.open(path) as board:
                    pools.append(live(board.read(patience=min(EACH, until - time.monotonic()))))
            except ScoreboardError as error:
                print(f"oomsafe: {without_controls(str(error))}", file=sys.stderr)
        if left_out:
            print(f"oomsafe: {folder}: {left_out} more pools are skipped: they can't be read within {PATIENCE:.0f} s", file=sys.stderr)
    return pools
