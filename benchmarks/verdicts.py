"""What a pool is said to grow by, against what it does grow by: apps that leak in some way, and apps that don't, each many times.

Every run is a server with two workers and its own sizes, drawn at random, under load until enough workers were recycled. A run is right if
nothing else than the truth was said in it, nor nothing at all. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import random
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import count

import celery_nodes as nodes
import common
from common import PORT, Server

from oomsafe.demo.server_process import ServerProcess
from oomsafe.policy.retention import Kind, judge
from oomsafe.policy.retirement import Retirement

WORKERS = 2

#: Workers that must have been recycled, and the seconds that this may take.
ENDED, PATIENCE = 6, 180.0

#: Clients, each of which asks again when it is answered. Pauses of so many seconds leave the machine some time for others.
CLIENTS, PAUSE = 3, 0.002

#: MiB that a worker with a leak may hold, and seconds for which one without lives.
SOFT, LIFETIME = 100, 6

#: Of these sizes is everything that is done in a moment.
NOISE = "/balloon?2000"

#: What is asked at random, with its weight.
Mix = dict[str, float]


@dataclass(frozen=True)
class Way:
    """How an app grows, and what is to be said of that."""

    truth: tuple[Kind, ...]
    mix: Callable[[], Mix]
    """Of one run: the requests and their weights."""
    leaks: bool = False
    """Whether its workers reach their soft limit; others are replaced by the clock."""
    server: str = "any"
    late: Callable[[], str] = str
    """A request that is made once in the middle of each worker's life."""
    soft: int | None = None
    """MiB; None: as it leaks."""


def _kib(least: int, most: int) -> int:
    return random.randint(least, most)


LEAK, KEPT, CACHE, NEEDED = (Kind.LEAK,), (Kind.KEPT,), (Kind.CACHE,), (Kind.NEEDED,)

WAYS: dict[str, Way] = {
    "leaks dicts": Way(LEAK, lambda: {f"/leak_dicts?{_kib(150, 500)}": 1, NOISE: 2}, leaks=True),
    "leaks bytes": Way(LEAK, lambda: {f"/leak_bytes?{_kib(150, 500)}": 1, NOISE: 2}, leaks=True),
    "leaks in C": Way(LEAK, lambda: {f"/leak_in_c?{_kib(150, 500)}": 1, NOISE: 2}, leaks=True),
    "leaks arrays of numpy": Way(LEAK, lambda: {f"/leak_arrays?{_kib(150, 500)}": 1, NOISE: 2}, leaks=True),
    "loads a model, then leaks": Way(
        LEAK, lambda: {f"/model?{random.randint(60, 120)}": 1, f"/leak_dicts?{_kib(150, 400)}": 1, NOISE: 1}, leaks=True, soft=250
    ),
    "fragments malloc": Way(KEPT, lambda: {f"/fragment_malloc?{random.randint(40, 80)}": 1, NOISE: 5}),
    "fragments pymalloc": Way(KEPT, lambda: {f"/fragment_pymalloc?{random.randint(40, 80)}": 1, NOISE: 5}),
    "caches up to a bound": Way(CACHE, lambda: {f"/cache?{_kib(300, 900)}": 1, NOISE: 1}),
    "loads a model with its first request": Way(NEEDED, lambda: {f"/model?{random.randint(40, 150)}": 1, NOISE: 1}),
    "loads a model some time": Way(NEEDED, lambda: {"/": 1, NOISE: 1}, late=lambda: f"/model?{random.randint(40, 150)}"),
}  # fmt: skip

#: Of what leaks nothing, some at once.
HARMLESS = (
    lambda: f"/fragment_malloc?{random.randint(20, 60)}",
    lambda: f"/fragment_pymalloc?{random.randint(20, 60)}",
    lambda: f"/cache?{_kib(200, 900)}",
    lambda: f"/model?{random.randint(30, 150)}",
    lambda: f"/balloon?{_kib(1000, 30_000)}",
)

MIXED = "leaks nothing, in several ways"
WAYS[MIXED] = Way(
    (Kind.KEPT, Kind.CACHE, Kind.NEEDED, Kind.UNKNOWN),
    lambda: {"/": 5, **{how(): random.uniform(0.2, 1) for how in random.sample(HARMLESS, random.randint(1, 4))}},
)

CELERY = {"Celery: leaks dicts": "leaks dicts", "Celery: loads a model with its first task": "loads a model with its first request"}


@dataclass
class Run:
    """What was said."""

    server: str
    mix: Mix
    kinds: list[str] = field(default_factory=list)
    """Each verdict that was not the one before it."""
    why: str = ""
    """Of the last one."""
    workers: int = 0
    """That were recycled."""
    seconds: float = 0.0
    retired: list[Retirement] = field(default_factory=list)

    def right(self, truth: Sequence[Kind]) -> bool:
        """Nothing else was said than the truth, and it was said."""
        values = {kind.value for kind in truth}
        return set(self.kinds) <= values | {Kind.UNKNOWN.value} and self.kinds[-1:] != [] and self.kinds[-1] in values

    def lied(self, truth: Sequence[Kind]) -> bool:
        """Something else was said at some time."""
        return not set(self.kinds) <= {kind.value for kind in truth} | {Kind.UNKNOWN.value}


SERVERS = ("gunicorn sync", "gunicorn gthread", "uvicorn")

_CONF = """
control_socket_disable = True
import oomsafe.gunicorn
oomsafe.gunicorn.install(globals())
"""


def started(server: str, way: Way) -> Server:
    """A pool of this kind."""
    policy = {"soft_limit": f"{way.soft or SOFT}MiB" if way.leaks else "2GiB", "min_lifetime": 0}
    if not way.leaks:
        policy["max_lifetime"] = f"{LIFETIME}s"
    environ = {f"OOMSAFE_{name.upper()}": str(value) for name, value in policy.items()}
    if server == "uvicorn":
        argv = ["oomsafe.uvicorn", "growing_apps:asgi", "--port", PORT, "--workers", str(WORKERS), "--log-level", "warning"]
        return Server([sys.executable, "-m", *argv, "--no-access-log"], environ=environ)
    threads = ["-k", "gthread", "--threads", "4"] if server.endswith("gthread") else ["-k", "sync"]
    argv = ["gunicorn", "-b", f"127.0.0.1:{PORT}", "-c", "conf.py", "-w", str(WORKERS), *threads, "growing_apps:wsgi"]
    return Server([sys.executable, "-m", *argv], environ=environ, files={"conf.py": _CONF})


@contextlib.contextmanager
def loaded(server: Server, mix: Mix, late: str) -> Iterator[None]:
    """Clients that ask at random."""
    stopped = threading.Event()
    paths, weights = list(mix), list(mix.values())

    def client() -> None:
        while not stopped.wait(PAUSE):
            with contextlib.suppress(OSError, http.client.HTTPException):
                server.get(*random.choices(paths, weights))

    def now_and_then() -> None:
        # often enough that each worker gets one somewhere in its life, and mostly not with its first requests
        while not stopped.wait(random.uniform(0.5, 1.5)):
            with contextlib.suppress(OSError, http.client.HTTPException):
                server.get(late)

    threads = [threading.Thread(target=client) for _ in range(CLIENTS)] + ([threading.Thread(target=now_and_then)] if late else [])
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stopped.set()
        for thread in threads:
            thread.join()


def watched(run: Run, server: ServerProcess, unit: str) -> Run:
    """Note what is said of it until enough of its workers were recycled."""
    began = time.monotonic()
    while time.monotonic() < began + PATIENCE and run.workers < ENDED:
        time.sleep(0.1)
        pool = server.find_pool()
        if pool is None or len(pool.retired) == run.workers:
            continue
        found = judge(pool.retired, unit)
        run.workers, run.retired, run.why = len(pool.retired), list(pool.retired), found.why
        if run.kinds[-1:] != [found.kind.value]:
            run.kinds.append(found.kind.value)
    run.seconds = time.monotonic() - began
    return run


def measure(name: str, number: int, options: argparse.Namespace) -> Run:
    """One run."""
    if name in CELERY:
        return in_celery(WAYS[CELERY[name]])
    way = WAYS[name]
    late = way.late()
    run = Run(SERVERS[number % len(SERVERS)], way.mix() | ({late: 0} if late else {}))
    with started(run.server, way) as server, loaded(server, run.mix, late):
        watched(run, server, "requests")
        if options.log:
            with open(options.log, "a") as file:
                file.write(f"--- {name}: {json.dumps(asdict(run), default=str)}\n{server.log()}")
    return run


def in_celery(way: Way) -> Run:
    """One run with a Celery node; a few tasks wait at any time."""
    run = Run("Celery prefork", way.mix())
    policy = {
        "soft_limit": f"{SOFT * 3 // 2}MiB" if way.leaks else "2GiB",
        "min_lifetime": 0,
        **({} if way.leaks else {"max_lifetime": LIFETIME}),
    }
    stopped = threading.Event()
    with nodes.place("redis") as here, nodes.Node(here, {}, policy) as node:

        def client() -> None:
            paths, weights = list(run.mix), list(run.mix.values())
            while not stopped.is_set():
                if here.waiting() > 50:
                    time.sleep(0.02)
                    continue
                here.send("grow", [tuple(path.split("?")) for path in random.choices(paths, weights, k=20)])

        thread = threading.Thread(target=client)
        thread.start()
        try:
            watched(run, node, "tasks")
        finally:
            stopped.set()
            thread.join()
    return run


def main() -> None:
    """Run them, print the table."""
    parser = common.arguments(__doc__ or "", rounds=10)
    parser.add_argument("--only", default="", help="only the apps that this regular expression finds")
    parser.add_argument("--log", help="a file for the servers' logs")
    options = parser.parse_args()
    names = [name for name in [*WAYS, *CELERY] if re.search(options.only, name)]
    numbers = {name: count() for name in names}
    seen: dict[str, list[Run]] = {name: [] for name in names}
    with common.quiet_interrupt():
        for round_ in range(options.rounds * 2):
            for name in names:
                wanted = max(1, options.rounds // 2) if name in CELERY else options.rounds * (2 if name == MIXED else 1)
                if round_ < wanted:
                    common.progress(f"round {round_ + 1}: {name}")
                    seen[name].append(measure(name, next(numbers[name]), options))
    truths = {name: WAYS[CELERY.get(name, name)].truth for name in names}
    rows = [
        [
            name, "not leak" if name == MIXED else truths[name][0].value,
            f"{sum(run.right(truths[name]) for run in runs)} / {len(runs)}", f"{sum(run.lied(truths[name]) for run in runs)}",
            ", ".join(f"{kind} {times}" for kind, times in Counter(run.kinds[-1] if run.kinds else "none" for run in runs).most_common()),
            f"{sum(run.workers for run in runs)}", common.shown([run.seconds for run in runs]),
        ] for name, runs in seen.items()
    ]  # fmt: skip
    head = ["the app", "the truth", "right / runs", "wrong at some time", "said at the end", "workers recycled", "seconds"]
    raw = {name: [json.loads(json.dumps(asdict(run), default=str)) for run in runs] for name, runs in seen.items()}
    title = f"what pools of {WORKERS} workers were said to grow by"
    common.report(title, common.machine("gunicorn", "uvicorn", "celery", "oomsafe"), [("", common.table(head, rows))], raw, options.json)


if __name__ == "__main__":
    main()
