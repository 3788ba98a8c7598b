"""``oomsafe recycle``: order a running pool to replace one of its workers."""

from __future__ import annotations

import sys
import time
from typing import NamedTuple

import click

from oomsafe.cli.pools import Found, find_pools, is_called, none_found, on_stderr
from oomsafe.errors import ScoreboardError
from oomsafe.policy.text import without_controls
from oomsafe.scoreboard.mailbox import PATIENCE, Answer, order_recycle
from oomsafe.scoreboard.places import living_boards
from oomsafe.scoreboard.view import PoolView, WorkerView

#: Exit statuses: the order was not given or not taken; nobody answered it, or its worker is still there.
NOT_ORDERED, UNANSWERED = 1, 3

_CHECK_EVERY = 0.2


class Outcome(NamedTuple):
    """What became of an order."""

    status: int
    """The exit status that says so: 0 for success."""
    line: str


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
    problems: list[str] = []
    chosen = find_worker(find_pools([path] if path else living_boards(), problems.append), pid, name, slot)
    if isinstance(chosen, Outcome):
        for problem in problems:  # the worker may be of a pool that can't be read
            on_stderr(problem)
        outcome = chosen
    else:
        outcome = order(*chosen)
        if wait and not outcome.status:
            outcome = _wait_for(*chosen, wait)
    print(outcome.line, file=sys.stderr if outcome.status else sys.stdout)
    raise SystemExit(outcome.status)


def order(found: Found, worker: WorkerView) -> Outcome:
    """Order this worker to be recycled. Takes as long as its supervisor's answer: PATIENCE seconds at most."""
    who, pool = called(found.pool, worker), found.pool
    if pool.is_single_process:
        return Outcome(NOT_ORDERED, f"{who} has no supervisor of oomsafe's: nothing here could replace it")
    try:
        answer = order_recycle(found.path, worker)
    except ScoreboardError as error:
        return Outcome(NOT_ORDERED, f"{who} can't be ordered: {without_controls(str(error))}")
    if answer is None:
        return Outcome(UNANSWERED, f"{who}: supervisor {pool.supervisor} has not answered within {PATIENCE:.0f} s; the order is withdrawn")
    return {
        Answer.ORDERED: Outcome(0, f"{who} is to be recycled"),
        Answer.LEAVES: Outcome(0, f"{who} leaves already, or has been ordered to"),
        Answer.DRY_RUN: Outcome(NOT_ORDERED, f"{who} would be recycled, but its pool is in a dry run: nothing is done"),
        Answer.UNKNOWN: Outcome(NOT_ORDERED, f"{who} is gone"),
        Answer.STALE: Outcome(NOT_ORDERED, f"{who}: the order came too late to supervisor {pool.supervisor}"),
    }.get(answer, Outcome(NOT_ORDERED, f"{who}: supervisor {pool.supervisor} does not know this order"))


def called(pool: PoolView, worker: WorkerView) -> str:
    """``worker 812 (slot 3) of shop``."""
    return f"worker {worker.pid} (slot {worker.slot}) of {pool.name or pool.server}"


def find_worker(found: list[Found], pid: int | None, name: str | None, slot: int | None = None) -> tuple[Found, WorkerView] | Outcome:
    """The one worker that is meant, by its pid or by its pool and its slot, or why there is none."""
    if not found:
        return Outcome(NOT_ORDERED, none_found())
    named = [each for each in found if name is None or is_called(each.pool, name)]
    if name is not None and (not named or (len(named) > 1 and pid is None)):
        several = f"{len(named)} pools are called {without_controls(name)}: name the worker by its pid, or the pool by its supervisor's"
        return Outcome(NOT_ORDERED, several if named else f"no pool of this user is called {without_controls(name)}")
    everyone = [(each, worker) for each in named for worker in each.pool.workers]
    workers = [(each, worker) for each, worker in everyone if (worker.slot == slot if pid is None else worker.pid == pid)]
    if not workers:
        what = f"worker {pid}" if pid is not None else f"worker in slot {slot}"
        return Outcome(NOT_ORDERED, f"no {what} in {'the pools of this user' if name is None else without_controls(name)}")
    return workers[0]


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
