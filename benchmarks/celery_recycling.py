"""Part recycling of celery_tasks.py: leaking tasks, each of which tells by itself that it ran, and what became of them."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field

import celery_nodes as nodes
import common
from celery_nodes import LOOK, QUIET, Contestant, Node


@dataclass
class Run:
    """A round of part recycling."""

    tasks: int
    results: int
    """Of tasks that ended well, with their own number."""
    runs: int
    """By the tasks' own account."""
    twice: int
    """Tasks that ran more than once."""
    recycles: int
    """Children that have run tasks and were replaced by one that did."""
    board: int | None
    """What the scoreboard counted; None where there is none."""
    alive: bool
    """MainProcess, at the end."""
    seconds: float
    """From the first task taken to the last result."""
    failed: dict[str, int] = field(default_factory=dict)
    """What should not be: other results by their state, messages left over, tasks that the scoreboard has too few or too many."""

    def doubt(self, at_least: int) -> str | None:
        """What makes this round no proof; None: nothing."""
        if self.recycles < at_least:
            return f"only {self.recycles} recycles"
        # its last recycles may have had no task left for the replacement
        if self.board is not None and not 0 <= self.board - self.recycles <= nodes.CHILDREN:
            return f"the scoreboard has {self.board}"
        return None


def measure(one: Contestant, tasks: int, leak: int) -> Run:
    """One round, until all results are there or no more come."""
    with nodes.place(one.broker) as here:
        ids = here.send("leak", [(number,) for number in range(tasks)])
        with Node(here, one.conf, one.policy, leak=leak << 10) as node:
            node.takes_the_first_of(here, tasks)
            began = moved = time.monotonic()
            there = 0
            while there < tasks and node.alive and time.monotonic() < moved + QUIET:
                time.sleep(LOOK)
                now = here.there(ids) if here.keys() >= tasks else here.keys()
                if now != there:
                    there, moved = now, time.monotonic()
            counted = node.counted(tasks)
            pool = node.find_pool()
            assert (pool is not None) == (one.policy is not None), f"{one.name}: a scoreboard, or none, where it should not be so"
            good = here.right(ids)
            failed = Counter(str(result["status"]) for result in here.results(ids) if result and result["status"] != "SUCCESS")
            if counted not in (None, tasks):
                failed["tasks on the scoreboard"] = counted
            alive, recycled = node.alive, None if pool is None else sum(pool.totals.recycles)
        # the node has ended, and given back what it had not acknowledged: that would run again
        left = here.waiting()
        if left:
            failed["left in the broker"] = left
        runs = [line.split() for line in node.runs.read_text().splitlines()]
    each = Counter(number for number, _ in runs)
    return Run(
        tasks, len(good), len(runs), sum(count > 1 for count in each.values()), len({pid for _, pid in runs}) - nodes.CHILDREN,
        recycled, alive, moved - began, dict(failed),
    )  # fmt: skip


def table(seen: dict[str, list[Run]], wanted: int) -> str:
    """Sums over all rounds; what must not be overlooked in capitals."""
    head = ["", "results / tasks", "lost", "runs", "ran twice", "recycles", "MainProcess", "s"]
    rows = []
    for name, runs in seen.items():
        tasks, results = sum(run.tasks for run in runs), sum(run.results for run in runs)
        doubts = {doubt for run in runs if (doubt := run.doubt(wanted))}
        doubts |= {f"{kind}: {count}" for run in runs for kind, count in run.failed.items()}
        recycles = common.shown([float(run.recycles if run.board is None else run.board) for run in runs])
        cells = [f"{results} / {tasks}", tasks - results, sum(run.runs for run in runs), sum(run.twice for run in runs)]
        cells += [recycles + "".join(f" ({doubt.upper()})" for doubt in sorted(doubts))]
        cells += ["alive" if all(run.alive for run in runs) else "DEAD", common.shown([run.seconds for run in runs], 1)]
        rows.append([name, *map(str, cells)])
    return common.table(head, rows)
