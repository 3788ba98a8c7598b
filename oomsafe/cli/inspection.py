"""``oomsafe status --worker``: what the memory of one worker is while it serves."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from functools import partial
from typing import Any

from rich.text import Text

from oomsafe.cli.columns import Column, cells_of, line_of, that_fit
from oomsafe.cli.labelled import NARROWEST, labelled
from oomsafe.cli.objects_text import objects_lines
from oomsafe.cli.orders import NOT_ORDERED, UNANSWERED, OrderError, Outcome, called, give, worker_of
from oomsafe.cli.output import Out, until_closed
from oomsafe.cli.pools import Found, find_pools
from oomsafe.policy.inspection import Inspection, Phase
from oomsafe.policy.objects import spaced
from oomsafe.policy.units import format_change, format_duration, format_size
from oomsafe.scoreboard.mailbox import Answer, order_inspection
from oomsafe.scoreboard.view import PoolView, WorkerView

#: The version of the JSON object.
VERSION = 1

#: Seconds between two looks at the scoreboard, and for which the worker may take to tell: its supervisor gives up before.
CHECK_EVERY, WITHIN = 0.05, 20.0

#: What each part of a worker's memory is called.
PARTS = {
    "python_live": "in use by Python objects",
    "malloc_live": "in use by malloc",
    "python_kept": "free, kept by Python",
    "malloc_kept": "free, kept by malloc until a trim",
    "malloc_stuck": "free, between malloc's blocks in use",
    "files": "of files",
    "shared": "shared",
    "other": "that no allocator knows of",
}


def inspect(pid: int, name: str | None, path: str | None, as_json: bool) -> int:
    """Order it, wait, and print what the worker has told; the exit status."""
    try:
        found, worker = worker_of(path, pid, name)
        one = _ordered(found, worker)
    except OrderError as error:
        print(f"oomsafe: {error}", file=sys.stderr)
        return error.status
    with until_closed():
        if as_json:
            print(json.dumps(record_of(found.pool, one), allow_nan=False))
        else:
            console = Out(highlight=False)
            # its lines are as wide as they may be: nothing is to wrap or crop them
            console.print(inspection_text(found.pool, one, console.width), soft_wrap=True)
    return 0


def record_of(pool: PoolView, one: Inspection) -> dict[str, Any]:
    """It as JSON data: sizes in bytes, times in seconds, null for what is not known."""
    inspection = asdict(one) | {"grown": one.grown, "parts": asdict(one.parts) | {"total": one.parts.total}}
    for left_out in ("phase", "text"):
        del inspection[left_out]
    return {"version": VERSION, "pool": {"name": pool.name, "server": pool.server, "supervisor": pool.supervisor}, "worker": inspection}


def inspection_text(pool: PoolView, one: Inspection, width: int) -> Text:
    """The parts of its memory that there are, then its objects, the largest growth first."""
    width = max(NARROWEST, width)
    who = f"worker {one.pid} (slot {one.slot}) of {pool.name or pool.server}"
    grown = "" if one.grown is None else f", {format_change(one.grown)} since it was ready"
    done = f"{spaced(one.work)} {pool.unit or 'requests'} in {format_duration(round(one.served))}"
    lines = labelled("", f"{who} holds {format_size(one.parts.total)}{grown}, after {done}", width, "bold", indent=0)
    rows = [(words, size) for part, words in PARTS.items() if (size := getattr(one.parts, part))]
    columns: list[Column[tuple[str, int]]] = [
        Column("", lambda row: row[0], right=False),
        Column("", lambda row: format_size(row[1])),
    ]
    cells = [cells_of(columns, row) for row in rows]
    if cells:
        _, widths = that_fit(columns, cells, width)
        lines += [line_of(row, columns, widths) for row in cells]
    if one.objects is not None:
        lines += objects_lines(f"worker {one.pid}", one.objects, width, "holds")
    if one.took is not None:
        still = "" if one.stopped is None else f"; the worker stood still for {1000 * one.stopped:.1f} ms"
        lines += labelled("", f"counted in {one.took:.2f} s by a fork of the worker{still}", width, indent=0)
    return Text("\n").join(lines)


def _ordered(found: Found, worker: WorkerView) -> Inspection:
    pool = found.pool
    if pool.is_single_process:
        raise OrderError(f"process {worker.pid} has no supervisor of oomsafe's: nothing there takes such an order, nor sees that it ends")
    before, who = pool.inspected, called(pool, worker)
    words = {
        Answer.ORDERED: Outcome(0, ""),
        Answer.BUSY: Outcome(NOT_ORDERED, f"{who} is not inspected: another worker of its pool is, just now: try again in a moment"),
        Answer.SHORT: Outcome(NOT_ORDERED, f"{who} is not inspected: the pool is short of memory, with no room up to its budget"),
    }
    outcome = give(partial(order_inspection, found.path, worker), pool, who, words)
    if outcome.status:
        raise OrderError(outcome.line, outcome.status)
    until = time.monotonic() + WITHIN
    while time.monotonic() < until:
        pools = find_pools([found.path], routes=False)
        if not pools:
            raise OrderError("the pool has ended")
        now = pools[0].pool.inspected
        if now is not None and now.generation == worker.generation and now.phase.is_over and (before is None or now.at != before.at):
            if now.phase is not Phase.DONE:
                status = UNANSWERED if now.phase is Phase.UNTAKEN else NOT_ORDERED
                raise OrderError(f"{who} is not inspected: {now.text}", status)
            return now
        time.sleep(CHECK_EVERY)
    raise OrderError(f"{who} has not told what its memory is within {WITHIN:.0f} s", UNANSWERED)
