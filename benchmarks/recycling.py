"""What recycling costs the clients: latency, requests/s and failed requests; not recycling, by max requests, with oomsafe.

Each server has two workers and recycles one every other second. Clients verify every answer. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Callable
from typing import Any

import common
import recycling_tables as tables
from contestants import NOT, OOMSAFE, STOCK, WAYS, ServerClass, Tuning, classes, loops
from recycling_runs import Goal, Run, calibrate, held, saturated, until, verified

#: Seconds of a request in flight while its worker recycles; three times the --timeout.
SLOW = 9.0

#: For sync, where a request in progress keeps the heartbeat waiting: below the --timeout.
SLOW_ON_SYNC = 2.0

#: How many of them, and for how many seconds other requests make all workers recycle meanwhile.
SLOW_CLIENTS, SLOW_LOAD = 3, 5.0

#: Requests/s of these others: only as many as it takes.
SLOW_RATE = 200.0

Rounds = dict[str, list[Run]]


@dataclasses.dataclass(frozen=True)
class Contestant:
    """One row: a server class, its way to recycle, and how both loads are tuned."""

    cls: ServerClass
    way: str
    paced: Tuning
    wrk: Tuning
    slow: float = 0

    @property
    def name(self) -> str:
        """As the tables show it."""
        return f"{self.cls.name}: {self.way}" + (f", {self.slow:g} s" if self.slow else "")


def contestants(options: argparse.Namespace, *, ways: tuple[str, ...] = WAYS) -> list[Contestant]:
    """Every class that was asked for, calibrated, with each of the `ways` that it can."""
    found = []
    for cls in classes(loops(options.loop)):
        wanted = [way for way in ways if re.search(options.only, f"{cls.name}: {way}")]
        options.skipped += [f"- {cls.name}: {way}: {why}" for way in wanted if (why := cls.missing(way))]
        wanted = [way for way in wanted if not cls.missing(way)]
        if wanted:
            paced, wrk = calibrate(cls, options.load, options.every)
            found += [Contestant(cls, way, paced, wrk) for way in wanted]
    if not found:
        raise SystemExit("\n".join(["no contestant is left", *options.skipped]))
    return found


def in_turns(rounds: int, chosen: list[Contestant], measure: Callable[[Contestant], Run]) -> Rounds:
    """A round of each, and again."""
    by_name = {one.name: one for one in chosen}
    return common.interleaved(rounds, list(by_name), lambda name: measure(by_name[name]))


def cost(options: argparse.Namespace) -> tuple[list[tuple[str, str]], dict[str, Rounds]]:
    """Latency at a steady rate, and requests/s under wrk."""
    chosen = contestants(options)
    seen: dict[str, Rounds] = {}
    parts = []
    if options.clients != "wrk":
        seen["verified"] = in_turns(options.rounds, chosen, lambda one: verified(one.cls, one.way, one.paced, options.seconds))
        heading = f"Clients that verify, at {options.load:.0%} of what the server can"
        parts.append((heading, tables.latency(seen["verified"], baselines(chosen), ways(chosen))))
    if options.clients != "verifying":
        seen["wrk"] = in_turns(options.rounds, chosen, lambda one: saturated(one.cls, one.way, one.wrk, options.seconds))
        parts.append(("wrk -t1 -c16, as fast as it goes", tables.throughput(seen["wrk"], baselines(chosen), ways(chosen))))
    return parts, seen


def failed(options: argparse.Namespace) -> tuple[list[tuple[str, str]], dict[str, Rounds]]:
    """Failed requests, over many requests and many recycles."""
    goal = Goal(options.requests, options.recycles, options.limit, options.seconds)
    chosen = contestants(options, ways=(STOCK, OOMSAFE))
    seen = in_turns(1, chosen, lambda one: until(one.cls, one.way, one.paced, goal))
    heading = f"At least {tables.thousands(goal.requests)} requests over {goal.recycles} recycles, or {goal.limit:g} s"
    return [(heading, tables.failures(seen, ways(chosen), goal))], {"failed": seen}


def timeout(options: argparse.Namespace) -> tuple[list[tuple[str, str]], dict[str, Rounds]]:
    """A request in flight at the recycle that takes longer than the server's --timeout."""
    options.every = 0.5  # all workers recycle while the slow requests are under way, also one that gets less than its share
    chosen = [slow for one in contestants(options, ways=(NOT, STOCK, OOMSAFE)) for slow in slowly(one, options.every)]
    if not chosen:
        raise SystemExit("no contestant is left: only sync takes part without recycling")

    def measure(one: Contestant) -> Run:
        return held(one.cls, one.way, one.paced, slow=one.slow, clients=SLOW_CLIENTS, seconds=SLOW_LOAD)

    seen = in_turns(options.rounds, chosen, measure)
    heading = f"--timeout 3, {SLOW_CLIENTS} slow requests in flight while all workers recycle; for sync they are shorter"
    return [(heading, tables.slow(seen, ways(chosen)))], {"timeout": seen}


def slowly(one: Contestant, every: float) -> list[Contestant]:
    """The same with slow requests. sync can't have any longer than --timeout, recycling or not: one row shows it."""
    sync = one.cls.shown == "gunicorn sync"
    if one.way == NOT and not sync:
        return []
    # the same leak in all over few requests, whatever the server could do
    requests = round(SLOW_RATE * every)
    few = dataclasses.replace(
        one.paced, rate=SLOW_RATE, requests=requests, leak=one.paced.leak * one.paced.requests // requests if one.way != NOT else 0
    )
    return [dataclasses.replace(one, paced=few, slow=SLOW_ON_SYNC if sync and one.way != NOT else SLOW)]


def baselines(chosen: list[Contestant]) -> dict[str, str]:
    """By name, that of the contestant that does not recycle, on the same class."""
    return {one.name: dataclasses.replace(one, way=NOT).name for one in chosen if one.way != NOT}


def ways(chosen: list[Contestant]) -> dict[str, str]:
    """By name, how each recycles."""
    return {one.name: one.way for one in chosen}


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = common.arguments(__doc__ or "", rounds=3, seconds=10)
    parser.add_argument("--part", choices=list(PARTS), default="cost")
    parser.add_argument("--only", default="", help="only the rows that this regular expression finds")
    parser.add_argument("--loop", choices=["auto", "asyncio", "uvloop", "both"], default="auto", help="auto: uvloop where it is installed")
    parser.add_argument("--clients", choices=["both", "verifying", "wrk"], default="both", help="of part cost")
    parser.add_argument("--load", type=float, default=0.6, help="share of its capacity that verifying clients ask of a server")
    parser.add_argument("--every", type=float, default=2, help="seconds between two recycles of the pool")
    parser.add_argument("--requests", type=int, default=200_000, help="of part failed, at least")
    parser.add_argument("--recycles", type=int, default=50, help="of part failed, at least")
    parser.add_argument("--limit", type=float, default=240, help="seconds for each row of part failed, at most")
    parser.set_defaults(skipped=[])
    return parser.parse_args(arguments)


PARTS = {"cost": cost, "failed": failed, "timeout": timeout}


def main() -> None:
    """Run one part, print its tables."""
    options = options_of()
    about = common.machine("gunicorn", "gevent", "uvicorn", "uvicorn-worker", "uvloop", "httptools", "oomsafe")
    with common.quiet_interrupt():
        parts, seen = PARTS[options.part](options)
    if options.skipped:
        parts.append(("Skipped", "\n".join(options.skipped)))
    raw: Any = {part: {name: [vars(run) for run in runs] for name, runs in rounds.items()} for part, rounds in seen.items()}
    common.report(f"What recycling costs the clients: {options.part}", about, parts, raw, options.json)


if __name__ == "__main__":
    main()
