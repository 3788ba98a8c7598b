"""``oomsafe recycle``: order a running pool to replace one of its workers."""

from __future__ import annotations

import sys
import time
from functools import partial

import click

from oomsafe.cli.orders import NOT_ORDERED, UNANSWERED, OrderError, Outcome, called, give, worker_of
from oomsafe.cli.pools import Found, find_pools
from oomsafe.scoreboard.mailbox import Answer, order_recycle
from oomsafe.scoreboard.view import WorkerView

_CHECK_EVERY = 0.2


@click.command()
@click.argument("pid", type=click.IntRange(min=1), required=False)
@click.option("--pool", "name", metavar="NAME", help="The pool's name, or its supervisor's pid; with --worker, in place of PID.")
@click.option("--worker", "slot", type=click.IntRange(min=0), metavar="SLOT", help="The worker's slot, as status shows it.")
@click.option("--scoreboard", "path", type=click.Path(), envvar="OOMSAFE_SCOREBOARD", help="Look only in the pool with this scoreboard.")
@click.option("--wait", type=click.FloatRange(min=0), default=0.0, metavar="SECONDS", help="Wait for so long until the worker is gone.")
def recycle(pid: int | None, name: str | None, slot: int | None, path: str | None, wait: float) -> None:
    """Replace one worker without losing a request: oomsafe recycle PID, or --pool NAME --worker SLOT.

    The replacement comes first where the server can start one. Only for the pool's own user and root. Exits with 0 if the worker is
    ordered to leave (with --wait: if it is gone), 1 if it can't be ordered, 2 for wrong arguments, 3 without an answer, or if the
    worker is still there.
    """
    if (pid is None) == (name is None) or (name is None) != (slot is None):
        raise click.UsageError("name the worker by its PID, or by --pool NAME and --worker SLOT")
    try:
        chosen = worker_of(path, pid, name, slot)
        outcome = order(*chosen)
        if wait and not outcome.status:
            outcome = _wait_for(*chosen, wait)
    except OrderError as error:
        outcome = Outcome(error.status, str(error))
    print(outcome.line, file=sys.stderr if outcome.status else sys.stdout)
    raise SystemExit(outcome.status)


def order(found: Found, worker: WorkerView) -> Outcome:
    """Order this worker to be recycled. As give()."""
    who, pool = called(found.pool, worker), found.pool
    if pool.is_single_process:
        return Outcome(NOT_ORDERED, f"{who} has no supervisor of oomsafe's: nothing here could replace it")
    words = {
        Answer.ORDERED: Outcome(0, f"{who} is to be recycled"),
        Answer.LEAVES: Outcome(0, f"{who} leaves already, or has been ordered to"),
        Answer.DRY_RUN: Outcome(NOT_ORDERED, f"{who} would be recycled, but its pool is in a dry run: nothing is done"),
    }
    return give(partial(order_recycle, found.path, worker), pool, who, words)


def _wait_for(found: Found, worker: WorkerView, seconds: float) -> Outcome:
    """Wait until this worker is gone."""
    who, until = called(found.pool, worker), time.monotonic() + seconds
    while True:
        now = find_pools([found.path])
        if not any(each.generation == worker.generation for pool in now for each in pool.pool.workers):
            return Outcome(0, f"{who} is gone")
        if time.monotonic() >= until:
            return Outcome(UNANSWERED, f"{who} has been ordered to leave, and is still there after {seconds:g} s")
        time.sleep(_CHECK_EVERY)
