"""What oomsafe costs a Celery task, and what becomes of tasks while children are recycled; beside stock Celery.

Each round has fresh nodes with two children, on brokers of their own. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import re
import statistics
import time
from collections.abc import Callable
from typing import Any

import celery_nodes as nodes
import celery_recycling
import common
from celery_nodes import LOOK, QUIET, Contestant, Node, Place

#: Never reached in part cost: nothing is recycled there.
PLENTY = "2GiB"

#: What a task may grow by where it is limited, and the MiB that a task must be killed for, so that it is known to be.
TASK_LIMIT, TOO_MUCH = "64MiB", 128

#: Tasks that a node gets at once, and how often before anything counts: what is done once is done then.
BATCH, WARM_UP = 400, 2

Rows = dict[str, list[dict[str, float]]]
Part = tuple[list[tuple[str, str]], Any]


# --- what a task costs


def cost(options: argparse.Namespace) -> Part:
    """Tasks that do nothing: tasks/s, and CPU time. Stock Celery is there twice: what these two differ by is noise."""
    early, late = {"task_acks_late": False}, {"task_acks_late": True}
    brokers = options.brokers or ["redis"]
    if "filesystem" in brokers:
        options.skipped.append("- filesystem: nothing moves all messages of a batch at once there")
    chosen = [
        one
        for broker in brokers
        if broker != "filesystem"
        for one in (
            Contestant(broker, "stock", early),
            Contestant(broker, "stock again", early, None, "stock"),
            Contestant(broker, "oomsafe", early, {"soft_limit": PLENTY}, "stock"),
            Contestant(broker, "oomsafe, task limit", early, {"soft_limit": PLENTY, "task_memory_limit": TASK_LIMIT}, "stock"),
            Contestant(broker, "stock, acks_late", late),
            Contestant(broker, "oomsafe, acks_late", late, {"soft_limit": PLENTY}, "stock, acks_late"),
        )
    ]
    chosen = picked(chosen, options)
    batches = max(1, round((options.tasks or 20_000) / BATCH))
    seen: Rows = {one.name: [] for one in chosen}
    for number in range(options.rounds or 5):
        for one, median in zip(chosen, cost_of(chosen, batches, f"round {number + 1}"), strict=True):
            seen[one.name].append(median)
    return [(f"{batches} x {BATCH} tasks that do nothing", cost_table(seen, chosen))], seen


class Side:
    """A contestant's node, which lives beside the others' while they take turns."""

    def __init__(self, one: Contestant, stack: contextlib.ExitStack) -> None:
        self.one = one
        self.here = stack.enter_context(nodes.place(one.broker))
        self.node = stack.enter_context(Node(self.here, one.conf, one.policy))
        self.ids: list[str] = []
        self.children: list[int] = []

    def batch(self) -> dict[str, float]:
        """From the moment when the node may take them until all results are there."""
        first = len(self.ids)
        ids, release = self.here.hold("noop", [(number,) for number in range(first, first + BATCH)])
        self.ids += ids
        main, theirs, began = common.cpu_seconds([self.node.pid]), common.cpu_seconds(self.children), time.perf_counter()
        release()
        ended = all_results(self.here, self.node, ids, self.children, len(self.ids))
        seconds, main_spent, theirs_spent = ended[0] - began, ended[1] - main, ended[2] - theirs
        spent = {"cpu": main_spent + theirs_spent, "children": theirs_spent}
        return {"rate": BATCH / seconds, **{key: value / BATCH * 1e6 for key, value in spent.items()}}


def cost_of(chosen: list[Contestant], batches: int, progress: str) -> list[dict[str, float]]:
    """A fresh node of each, all alive, a batch for one after the other: the medians, and of what a batch has more than its baseline's."""
    with contextlib.ExitStack() as stack:
        sides = [Side(one, stack) for one in chosen]
        seen: Rows = {one.name: [] for one in chosen}
        order = list(sides)
        for number in range(WARM_UP + batches):
            common.progress(f"{progress}: batch {number - WARM_UP + 1}/{batches}")
            # nobody is always behind the same one
            random.shuffle(order)
            for side in order:
                measured = side.batch()
                if number >= WARM_UP:
                    seen[side.one.name].append(measured)
                else:
                    side.children = side.node.workers()
        for side in sides:
            children = side.node.workers()
            assert sorted(children) == sorted(side.children), f"children were replaced, and their CPU time is gone:\n{side.node.tail()}"
            proves_its_work(side.one, side.here, side.node, side.ids)
    return [medians(seen[one.name], seen.get(f"{one.broker}: {one.baseline}")) for one in chosen]


def medians(batches: list[dict[str, float]], base: list[dict[str, float]] | None) -> dict[str, float]:
    """Of one round."""
    found = {key: statistics.median(common.column(batches, key)) for key in batches[0]}
    if base:
        found |= {f"{key} against": statistics.median(common.ratios(batches, base, key)) for key in ("rate", "cpu")}
        found["more"] = statistics.median(a["children"] - b["children"] for a, b in zip(batches, base, strict=True))
    return found


def all_results(here: Place, node: Node, ids: list[str], children: list[int], keys_then: int) -> tuple[float, float, float]:
    """Wait for them. Returns when that was, and the CPU time of MainProcess and of its children then, all in seconds.

    `keys_then`: how many keys the backend has then, or more.
    """
    last, moved = 0, time.monotonic()
    while True:
        keys = here.keys()
        if keys >= keys_then:
            then = time.perf_counter(), common.cpu_seconds([node.pid]), common.cpu_seconds(children)
            if here.there(ids) == len(ids):
                return then
        if keys != last:
            last, moved = keys, time.monotonic()
        if not node.alive or time.monotonic() > moved + QUIET:
            raise RuntimeError(f"{here.there(ids)} results of {len(ids)}:\n{node.tail()}")
        time.sleep(LOOK)


def proves_its_work(one: Contestant, here: Place, node: Node, ids: list[str]) -> None:
    """Or the benchmark stops: right results, tasks counted by who counts, limits in force where there are some, nobody recycled."""
    assert here.right(ids) == set(range(len(ids)))
    counted = node.counted(len(ids))
    assert counted == (len(ids) if one.policy is not None else None), f"{one.name} counted {counted} tasks of {len(ids)}"
    pool = node.find_pool()
    assert pool is None or not sum(pool.totals.recycles), f"{one.name} recycled"
    if one.policy is not None and "task_memory_limit" in one.policy:
        ids = here.send("balloon", [(TOO_MUCH, common.PATIENCE)])
        deadline = time.monotonic() + common.PATIENCE
        while not here.there(ids) and time.monotonic() < deadline:
            time.sleep(LOOK)
        assert "MemoryLimitExceeded" in str(here.results(ids)), f"{one.name} has no limit: {here.results(ids)}\n{node.tail()}"


def cost_table(seen: Rows, chosen: list[Contestant]) -> str:
    """Figures, and what each batch has beside its baseline's of the same turn."""
    head = ["", "tasks/s", "against stock", "CPU, us a task", "against stock", "in the children, us", "more than stock, us"]
    rows = []
    for one in chosen:
        runs = seen[one.name]
        figures = [common.shown(common.column(runs, key)) for key in ("rate", "cpu", "children")]
        beside = {"rate against": 3, "cpu against": 3, "more": 1}
        rate, cpu, more = (common.shown(common.column(runs, key), digits) if key in runs[0] else "" for key, digits in beside.items())
        rows.append([one.name, figures[0], rate, figures[1], cpu, figures[2], more])
    return common.table(head, rows)


# --- what becomes of tasks


def recycling(options: argparse.Namespace) -> Part:
    """Tasks that leak, so that children are recycled all the time."""
    ways: dict[str, Any] = {}
    for late in (False, True):
        acks, said = {"task_acks_late": late}, ", acks_late" if late else ""
        ways[f"oomsafe{said}"] = acks, {"soft_limit": f"{options.limit}MiB", "min_lifetime": 0}
        ways[f"worker_max_memory_per_child{said}"] = {**acks, "worker_max_memory_per_child": options.limit * 1024}, None
    chosen = [Contestant(broker, way, *how) for broker in options.brokers or nodes.BROKERS for way, how in ways.items()]
    tasks = options.tasks or 5_000
    wanted = min(100, tasks // 50)
    seen = in_turns(options.rounds or 1, picked(chosen, options), lambda one: celery_recycling.measure(one, tasks, options.leak))
    heading = f"{tasks} tasks that keep {options.leak} KiB each, limit {options.limit} MiB, {wanted} recycles or more"
    raw = {name: [vars(run) for run in runs] for name, runs in seen.items()}
    return [(heading, celery_recycling.table(seen, wanted))], raw


# --- both


def picked(chosen: list[Contestant], options: argparse.Namespace) -> list[Contestant]:
    """Those that were asked for and can take part."""
    wanted = [one for one in chosen if re.search(options.only, one.name)]
    options.skipped += [f"- {one.name}: {why}" for one in wanted if (why := nodes.missing(one.broker))]
    able = [one for one in wanted if not nodes.missing(one.broker)]
    if not able:
        raise SystemExit("\n".join(["no contestant is left", *options.skipped]))
    return able


def in_turns(rounds: int, chosen: list[Contestant], measure: Callable[[Contestant], Any]) -> dict[str, list[Any]]:
    """A round of each, and again."""
    by_name = {one.name: one for one in chosen}
    return common.interleaved(rounds, list(by_name), lambda name: measure(by_name[name]))


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = common.arguments(__doc__ or "", rounds=0)
    parser.add_argument("--part", choices=list(PARTS), default="cost")
    parser.add_argument("--broker", choices=[*nodes.BROKERS, "all"], help="default: redis for part cost, all for part recycling")
    parser.add_argument("--only", default="", help="only the rows that this regular expression finds")
    parser.add_argument("--tasks", type=int, help="of a node, default 20000, of part recycling 5000")
    parser.add_argument("--limit", type=int, default=100, help="of a child, MiB, of part recycling; default 100")
    parser.add_argument("--leak", type=int, default=2048, help="KiB a task, of part recycling; default 2048")
    parser.set_defaults(skipped=[])
    options = parser.parse_args(arguments)
    options.brokers = list(nodes.BROKERS) if options.broker == "all" else [options.broker] if options.broker else None
    return options


PARTS = {"cost": cost, "recycling": recycling}


def main() -> None:
    """Run one part, print its tables."""
    options = options_of()
    about = common.machine("celery", "billiard", "kombu", "redis", "oomsafe")
    with common.quiet_interrupt():
        parts, seen = PARTS[options.part](options)
    if options.skipped:
        parts.append(("Skipped", "\n".join(options.skipped)))
    common.report(f"Celery tasks: {options.part}", about, parts, seen, options.json)


if __name__ == "__main__":
    main()
