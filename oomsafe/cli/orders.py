"""Orders to a running pool: whom they are for, who takes them, and in words what became of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, NoReturn

from oomsafe.cli.pools import Found, find_pools, is_called, none_found, on_stderr
from oomsafe.errors import ScoreboardError
from oomsafe.policy.text import without_controls
from oomsafe.scoreboard.mailbox import PATIENCE, Answer
from oomsafe.scoreboard.places import living_boards
from oomsafe.scoreboard.view import PoolView, WorkerView

#: Exit statuses: the order was not given or not taken; nobody answered it, or what was ordered has not come about.
NOT_ORDERED, UNANSWERED = 1, 3


class Outcome(NamedTuple):
    """What became of an order."""

    status: int
    """The exit status that says so: 0 for success."""
    line: str


class OrderError(Exception):
    """Nothing came of an order; `status` is the command's exit status."""

    def __init__(self, text: str, status: int = NOT_ORDERED) -> None:
        super().__init__(without_controls(text))
        self.status = status


def called(pool: PoolView, worker: WorkerView) -> str:
    """``worker 812 (slot 3) of shop``."""
    return f"worker {worker.pid} (slot {worker.slot}) of {pool.name or pool.server}"


def worker_of(path: str | None, pid: int | None, name: str | None, slot: int | None = None) -> tuple[Found, WorkerView]:
    """The one worker that is meant, by its pid or by its pool and its slot; `path`: look only there. Raises OrderError if there is none."""
    found, problems = _pools(path)
    named = [each for each in found if name is None or is_called(each.pool, name)]
    if name is not None and (not named or (len(named) > 1 and pid is None)):
        several = f"{len(named)} pools are called {name}: name the worker by its pid, or the pool by its supervisor's"
        _nobody(problems, found, several if named else f"no pool of this user is called {name}")
    everyone = [(each, worker) for each in named for worker in each.pool.workers]
    workers = [(each, worker) for each, worker in everyone if (worker.slot == slot if pid is None else worker.pid == pid)]
    if not workers:
        what = f"worker {pid}" if pid is not None else f"worker in slot {slot}"
        _nobody(problems, found, f"no {what} in {'the pools of this user' if name is None else name}")
    return workers[0]


def pool_of(path: str | None, pid: int | None, name: str | None) -> Found:
    """The one pool that is meant, by its name, or by a worker's pid; the only one there is without either. As worker_of()."""
    found, problems = _pools(path)
    named = [each for each in found if name is None or is_called(each.pool, name)]
    named = [each for each in named if pid is None or any(worker.pid == pid for worker in each.pool.workers)]
    if not named:
        _nobody(problems, found, f"there is no {f'worker {pid}' if pid is not None else f'pool called {name}'}")
    if len(named) > 1:
        names = ", ".join(f"{each.pool.name or each.pool.server} ({each.pool.supervisor})" for each in named[:8])
        _nobody(problems, found, f"there are {len(named)} pools: name one with --pool: {names}")
    return named[0]


def _pools(path: str | None) -> tuple[list[Found], list[str]]:
    problems: list[str] = []
    return find_pools([path] if path else living_boards(), problems.append, routes=False), problems


def _nobody(problems: list[str], found: list[Found], why: str) -> NoReturn:
    for problem in problems:  # who is meant may be of a pool that can't be read
        on_stderr(problem)
    raise OrderError(why if found else none_found())


def give(order: Callable[[], Answer | None], pool: PoolView, who: str, words: Mapping[Answer, Outcome]) -> Outcome:
    """Give an order, and say what became of it: in `words`, where the answer means something of its own for this order.

    Takes as long as the supervisor's answer: PATIENCE seconds at most.
    """
    try:
        answer = order()
    except ScoreboardError as error:
        return Outcome(NOT_ORDERED, f"{who} can't be ordered: {without_controls(str(error))}")
    supervisor = f"supervisor {pool.supervisor}"
    if answer is None:
        return Outcome(UNANSWERED, f"{who}: {supervisor} has not answered within {PATIENCE:.0f} s; the order is withdrawn")
    if answer in words:
        return words[answer]
    for_all = {
        Answer.UNKNOWN: f"{who} is gone",
        Answer.LEAVES: f"{who} does not serve now",
        Answer.STALE: f"{who}: the order came too late to {supervisor}",
    }
    return Outcome(NOT_ORDERED, for_all.get(answer, f"{who}: {supervisor} does not know this order"))
