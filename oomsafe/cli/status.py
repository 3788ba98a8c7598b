"""``oomsafe status``: the pools of this machine, read from their scoreboards."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Any

import click
from rich.console import Console

from oomsafe.cli.pool_text import pool_text
from oomsafe.cli.pools import find_pools, is_called, none_found
from oomsafe.kernel.process import parent_of
from oomsafe.policy.text import without_controls
from oomsafe.scoreboard.live import live
from oomsafe.scoreboard.places import living_boards
from oomsafe.scoreboard.view import PoolView


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--worker", "pid", type=click.IntRange(min=1), metavar="PID", help="Have this worker tell what its memory is, by objects.")
@click.option("--pool", "name", metavar="NAME", help="Only the pool with this name, or whose supervisor has this pid.")
@click.option("--scoreboard", "path", type=click.Path(), envvar="OOMSAFE_SCOREBOARD", help="Show only the pool with this scoreboard.")
def status(as_json: bool, pid: int | None, name: str | None, path: str | None) -> None:
    """Show every pool: workers against their limits, requests, recycles, work in flight.

    Shows the pools of the user who runs it; for root, those of all users. Exits with 1 if there is none.

    With --worker: what the memory of one worker is that serves, by allocators and by objects. A fork of it counts, and it serves on. Exits
    with 1 if that was refused or failed, with 3 without an answer.
    """
    if pid is not None:
        from oomsafe.cli.inspection import inspect  # imported here, because it takes more than most calls need

        raise SystemExit(inspect(pid, name, path, as_json))
    pools = [pool for pool in read_pools([path] if path else living_boards()) if name is None or is_called(pool, name)]
    if as_json:
        print(json.dumps({"pools": [as_record(pool) for pool in pools]}, allow_nan=False))
    elif pools:
        show(pools, Console())
    else:
        print(none_found() if name is None else f"no pool of this user is called {without_controls(name)}", file=sys.stderr)
    raise SystemExit(0 if pools else 1)


def as_record(pool: PoolView) -> dict[str, Any]:
    """A pool as JSON data: sizes in bytes, times in seconds since 1970, null for what is not known."""
    record = asdict(pool)
    parent = parent_of(pool.supervisor) if pool.is_single_process else None
    record["parent"] = None if parent is None else parent[0]
    record["totals"] |= {"recycles": pool.totals.by_reason, "aborts": pool.totals.aborts_by_reason}
    if pool.probed is not None:
        record["probed"] = pool.probed._asdict() | {"stage": pool.probed.stage.name.lower()}
    if pool.inspected is not None:
        record["inspected"]["phase"] = pool.inspected.phase.name.lower()
    for shown, worker in zip(record["workers"], pool.workers, strict=True):
        shown["counters"] |= {"recycles": worker.counters.by_reason, "aborts": worker.counters.aborts_by_reason}
        for flight, work in zip(shown["in_flight"], worker.in_flight, strict=True):
            flight["grown"] = worker.grown(work)
    return record


def show(pools: list[PoolView], console: Console) -> None:
    """The pools for a person, an empty line between two."""
    ascii_only = not console.encoding.lower().startswith("utf")
    for number, pool in enumerate(pools):
        if number:
            console.print()
        # its lines are as wide as they may be: nothing is to wrap or crop them
        console.print(pool_text(pool, console.width, ascii_only=ascii_only), soft_wrap=True)


def read_pools(paths: list[str]) -> list[PoolView]:
    """The pools that can be read, with what each worker holds now; what is wrong with the others is said on stderr."""
    return [live(found.pool) for found in find_pools(paths)]
