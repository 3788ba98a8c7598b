"""``oomsafe retired``: what the memory of the workers was that were recycled last, and whether they leak."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import click
from rich.text import Text

from oomsafe.cli.columns import Column, cells_of, line_of, that_fit
from oomsafe.cli.labelled import NARROWEST, labelled
from oomsafe.cli.objects_text import objects_lines
from oomsafe.cli.output import Out, until_closed
from oomsafe.cli.pools import find_pools, is_called, none_found
from oomsafe.policy.retention import Kind, Retention, judge
from oomsafe.policy.retirement import Retirement
from oomsafe.policy.text import without_controls
from oomsafe.policy.units import format_change, format_duration, format_size
from oomsafe.scoreboard.places import living_boards
from oomsafe.scoreboard.view import PoolView

#: The version of the JSON object.
VERSION = 1

WORDS = {
    Kind.LEAK: "LEAK",
    Kind.KEPT: "no leak: kept",
    Kind.CACHE: "no leak: levels off",
    Kind.NEEDED: "no leak: needed",
    Kind.UNKNOWN: "not known",
}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object (docs/leaks.md).")
@click.option("--pool", "name", metavar="NAME", help="Only the pool with this name, or whose supervisor has this pid.")
@click.option("--scoreboard", "path", type=click.Path(), envvar="OOMSAFE_SCOREBOARD", help="Only the pool with this scoreboard.")
def retired(as_json: bool, name: str | None, path: str | None) -> None:
    """Show what the memory of the last 16 recycled workers of each pool was, and whether it is a leak.

    Exits with 0 if a pool was found, else with 1.
    """
    pools = [found.pool for found in find_pools([path] if path else living_boards(), routes=False)]
    pools = [pool for pool in pools if name is None or is_called(pool, name)]
    with until_closed():
        if as_json:
            print(json.dumps({"version": VERSION, "pools": [record_of(pool) for pool in pools]}, allow_nan=False))
        elif pools:
            console = Out(highlight=False)
            for number, pool in enumerate(pools):
                if number:
                    console.print()
                # its lines are as wide as they may be: nothing is to wrap or crop them
                console.print(retired_text(pool, console.width), soft_wrap=True)
    if not pools and not as_json:
        print(none_found() if name is None else f"no pool of this user is called {without_controls(name)}", file=sys.stderr)
    raise SystemExit(0 if pools else 1)


def judged(pool: PoolView) -> Retention:
    """What its recycled workers have grown by."""
    return judge(pool.retired, pool.unit or "requests")


def record_of(pool: PoolView) -> dict[str, Any]:
    """A pool as JSON data: sizes in bytes, null for what is not known."""
    verdict = judged(pool)
    return {
        "name": pool.name,
        "server": pool.server,
        "supervisor": pool.supervisor,
        "verdict": {**asdict(verdict), "kind": verdict.kind.value},
        "retired": [asdict(one) | {"points": [point._asdict() for point in one.points]} for one in pool.retired],
    }


def retired_text(pool: PoolView, width: int, now: float | None = None) -> Text:
    """The verdict, and a line for each worker, the latest first."""
    now, width = time.time() if now is None else now, max(NARROWEST, width)
    lines = [Text(f"{pool.name or pool.server} (supervisor {pool.supervisor})", style="bold")]
    lines += verdict_lines(judged(pool), width)
    if pool.retired:
        columns = _columns(pool.unit or "requests", now)
        rows = [cells_of(columns, one) for one in pool.retired]
        kept, widths = that_fit(columns, rows, width)
        lines.append(line_of([Text(columns[at].title, style="bold") for at in kept], [columns[at] for at in kept], widths))
        lines += [line_of([row[at] for at in kept], [columns[at] for at in kept], widths) for row in rows]
        lines += _objects_lines(pool.retired, width)
    return Text("\n").join(lines)


def verdict_lines(verdict: Retention, width: int) -> list[Text]:
    """``LEAK: memory in use rises by 259 KiB a request``, and what would help."""
    lines = labelled("", f"{WORDS[verdict.kind]}: {without_controls(verdict.why)}", width, indent=2)
    return lines + (labelled("", verdict.help, width, "green", indent=2) if verdict.help else [])


def _objects_lines(retired: Sequence[Retirement], width: int) -> list[Text]:
    """What the latest worker held by objects."""
    for one in retired:
        if one.objects is not None:
            return objects_lines(f"worker {one.pid}", one.objects, width)
    return []


def _columns(unit: str, now: float) -> list[Column[Retirement]]:
    return [
        Column("ago", lambda one: format_duration(round(max(0.0, now - one.at)))),
        Column("pid", lambda one: str(one.pid)),
        Column("for", lambda one: one.reason, left_out=3, right=False),
        Column(unit, lambda one: str(one.work), left_out=2),
        Column("grown", lambda one: "unknown" if one.grown is None else format_change(one.grown)),
        Column("in use", lambda one: format_size(one.parts.live)),
        Column("kept", lambda one: format_size(one.parts.kept)),
        Column("other", lambda one: format_size(one.parts.other + one.parts.shared), left_out=1),
        Column("files", lambda one: format_size(one.parts.files), left_out=4),
    ]
