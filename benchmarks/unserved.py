"""How long nobody serves when all workers of a pool get too large at once: the longest wait of an honest request.

While the machine has memory to spare. Each server with oomsafe, beside itself without. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import common
import recycling_tables as tables
from common import MIB, Server
from contestants import LIMITS, MIDDLEWARE, NOT, OOMSAFE, WORKERS, Policy, ServerClass, Tuning, classes, loops
from recycling_runs import Run, Watched

#: Requests a second of the honest clients, and seconds that they wait for an answer.
RATE, TIMEOUT = 40.0, 30.0

#: Seconds before anybody opens the page, and until all workers must have had it.
CALM, OPENED = 3.0, 15.0

#: MiB: what the page keeps, what each worker leaks a second, what a growing request of the attack keeps.
PAGE, LEAK, GROWTH = 150, 5, 40


@dataclass(frozen=True)
class Scenario:
    """What all workers meet."""

    shown: str
    goal: float
    """Seconds that an honest request may wait."""
    seconds: float
    boot: float
    """Seconds that a worker takes to import its app."""
    soft_limit: int
    """MiB."""
    only: str
    """A regular expression: the servers that it is about."""
    path: str = "/"
    """What honest clients ask for."""
    leak: int = 0
    """Bytes that each request for /leak keeps."""
    beside: Callable[[Server, Scenario], None] | None = None
    """What somebody else does meanwhile."""
    workers: int = WORKERS
    half: float = 0
    grow: float = 0
    """Of the attack: half-sent and growing requests a second."""
    lifetimes: tuple[str, ...] = ("0",)
    """oomsafe's min_lifetime, "default" or seconds; each has a row."""


def page(options: argparse.Namespace) -> Scenario:
    """As many users as there are workers open one page."""
    boot = 8.0 if options.boot is None else options.boot
    shown = f"As many users as workers open a page that keeps {PAGE} MiB"
    return Scenario(shown, 0.5, CALM + 3 * boot, boot, soft_limit=120, only="", beside=open_the_page)


def leak(options: argparse.Namespace) -> Scenario:
    """Every request leaks."""
    boot = 8.0 if options.boot is None else options.boot
    each = round(LEAK * MIB * options.workers / RATE)
    shown = f"A leak of {LEAK} MiB/s in each worker"
    return Scenario(shown, 0.5, 20 + 3 * boot, boot, soft_limit=120, only="", path="/leak", leak=each)


def attack(options: argparse.Namespace) -> Scenario:
    """One client sends halves of requests, and some that grow the server."""
    boot = 1.0 if options.boot is None else options.boot
    shown = f"One client with {options.half:g} half-sent requests a second, and {options.grow:g} that keep {GROWTH} MiB each"
    return Scenario(
        shown, 1.0, 60, boot, soft_limit=200, only="UvicornWorker|uvicorn --workers", leak=GROWTH * MIB, beside=send_halves,
        half=options.half, grow=options.grow, lifetimes=("default", "0"),
    )  # fmt: skip


SCENARIOS = {"page": page, "leak": leak, "attack": attack}


def open_the_page(server: Server, scenario: Scenario) -> None:
    """After a calm moment, as many users as workers at once, until it has been opened as often."""
    time.sleep(CALM)
    with ThreadPoolExecutor(scenario.workers) as users:
        list(users.map(lambda _: one_user(server, scenario.workers), range(scenario.workers)))


def one_user(server: Server, times: int) -> None:
    """Opens it, until it has been opened so often; whoever has it already opens it no more."""
    deadline = time.monotonic() + OPENED
    while len(list(server.folder.glob("page-*"))) < times:
        if time.monotonic() > deadline:
            raise TimeoutError("not every worker was asked for the page")
        with contextlib.suppress(OSError, http.client.HTTPException):
            server.get("/page")


def send_halves(server: Server, scenario: Scenario) -> None:
    """As half_sending_load.py does, for as long as the honest clients ask."""
    command = [sys.executable, str(common.HERE / "half_sending_load.py"), str(server.port), "--seconds", str(scenario.seconds)]
    command += ["--half", str(scenario.half), "--grow", str(scenario.grow)]
    patience = scenario.seconds + common.PATIENCE
    done = subprocess.run(command, capture_output=True, text=True, timeout=patience, check=True, env=common.environment())
    seen = Counter[str](json.loads(done.stdout))
    for kind in ("half", "grow"):
        assert seen[f"{kind}: begun"] >= (scenario.half if kind == "half" else scenario.grow) * scenario.seconds * 0.9, seen


@dataclass(frozen=True)
class Contestant:
    """One row of the table."""

    cls: ServerClass
    way: str
    lifetime: str = ""

    @property
    def name(self) -> str:
        """As the table shows it."""
        return f"{self.cls.name}: {self.way}" + (f", min_lifetime {self.lifetime}" if self.lifetime else "")


def contestants(options: argparse.Namespace, scenario: Scenario) -> list[Contestant]:
    """Every server that was asked for, without oomsafe and with it."""
    found = []
    for cls in classes(loops(options.loop), scenario.workers):
        if re.search(options.only or scenario.only, cls.name):
            ways = [way for way in (NOT, OOMSAFE, MIDDLEWARE) if cls.missing(way) is None]
            lifetimes = scenario.lifetimes if len(scenario.lifetimes) > 1 else ("",)
            found += [Contestant(cls, way, lifetime) for way in ways for lifetime in (lifetimes if way in LIMITS else ("",))]
    return [one for one in found if re.search(options.ways, one.way)]


def measure(one: Contestant, scenario: Scenario) -> Run:
    """One run."""
    lifetime = one.lifetime or scenario.lifetimes[0]
    policy: Policy = {"soft_limit": f"{scenario.soft_limit}MiB", "min_lifetime": None if lifetime == "default" else lifetime}
    server = one.cls.server(one.way, Tuning(RATE, leak=scenario.leak), boot=scenario.boot, page=PAGE * MIB, policy=policy)
    with Watched(server, one.cls, one.way) as watched, ThreadPoolExecutor(1) as honest:
        asking = honest.submit(watched.ask, scenario.seconds, RATE, path=scenario.path, timeout=TIMEOUT)
        if scenario.beside is not None:
            scenario.beside(server, scenario)
        asking.result()
    return watched.run


def verdict(runs: list[Run], goal: float) -> str:
    """Whether every round kept the goal."""
    missed = [run for run in runs if run.longest > goal or run.failed]
    return "yes" if not missed else "NO"


def shown(seen: tables.Rounds, scenario: Scenario) -> str:
    """The table."""
    head = ["", "longest wait, s", "nobody served, s", "the longest of it", "failed / requests", "recycles", "peak of one worker, MiB"]
    rows = []
    for name, runs in seen.items():
        waits = [tables.spread(runs, key, 2) for key in ("longest", "unserved", "pause")]
        peak = f"{max(run.peak for run in runs) / MIB:.0f}"
        rows.append([name, *waits, tables.failed(runs), tables.spread(runs, "recycles"), peak, verdict(runs, scenario.goal)])
    return common.table([*head, f"at most {scenario.goal:g} s, 0 failed"], rows) + tables.kinds(seen)


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = common.arguments(__doc__ or "", rounds=1)
    parser.add_argument("--part", choices=[*SCENARIOS, "all"], default="all")
    parser.add_argument("--only", default="", help="only the servers that this regular expression finds; default: all, of attack uvicorn's")
    parser.add_argument("--ways", default="", help=f"only the ways that this regular expression finds: {NOT}, {OOMSAFE}, {MIDDLEWARE}")
    parser.add_argument("--loop", choices=["auto", "asyncio", "uvloop", "both"], default="auto", help="auto: uvloop where it is installed")
    parser.add_argument("--seconds", type=float, help="of load; default 27, of leak 44, of attack 60")
    parser.add_argument("--boot", type=float, help="seconds that an app takes to be imported; default 8, of attack 1")
    parser.add_argument("--workers", type=int, default=WORKERS, help=f"default {WORKERS}")
    parser.add_argument("--half", type=float, default=10, help="of attack: half-sent requests a second, default 10")
    parser.add_argument("--grow", type=float, default=1.5, help="of attack: growing requests a second, default 1.5")
    return parser.parse_args(arguments)


def run(scenario: Scenario, options: argparse.Namespace) -> tuple[str, tables.Rounds]:
    """All rounds of one scenario: its heading, and what was seen."""
    chosen = {one.name: one for one in contestants(options, scenario)}
    seen = common.interleaved(options.rounds, list(chosen), lambda name: measure(chosen[name], scenario))
    figures = f"{scenario.workers} workers, soft limit {scenario.soft_limit} MiB, a boot takes {scenario.boot:g} s, {scenario.seconds:g} s"
    return f"{scenario.shown}; {figures}", seen


def main() -> None:
    """Run the scenarios, print their tables."""
    options = options_of()
    about = common.machine("gunicorn", "gevent", "uvicorn", "uvicorn-worker", "uvloop", "httptools", "oomsafe")
    parts, raw = [], {}
    with common.quiet_interrupt():
        for name in SCENARIOS if options.part == "all" else [options.part]:
            scenario = SCENARIOS[name](options)
            scenario = replace(scenario, workers=options.workers, seconds=options.seconds or scenario.seconds)
            heading, seen = run(scenario, options)
            parts.append((heading, shown(seen, scenario)))
            raw[name] = {row: [vars(run) for run in runs] for row, runs in seen.items()}
    common.report("When all workers get too large at once, with memory to spare", about, parts, raw, options.json)


if __name__ == "__main__":
    main()
