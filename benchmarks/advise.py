"""What oomsafe advise foretells of a leaking pool, and what comes of it. A pool is measured under load; another is started with what was
advised, in a memory cgroup of the same size, under the same load. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import common
from common import MIB, Server
from contestants import OOMSAFE, Policy, ServerClass, Tuning, classes, loops
from recycling_runs import Watched, recycled

#: MiB: of the cgroup, of the soft limit that the measured pool has; its workers.
CGROUP, SOFT, WORKERS = 512, 120, 2

#: Requests a second, and MiB a second that they leak together.
RATE, LEAK = 100.0, 3.5

#: Seconds of load before the pool is asked.
MEASURED = 40.0

#: What a line holds that says that a limit is not used.
REFUSED = "is not used"


@dataclass
class Seen:
    """One contestant."""

    advice: dict[str, Any]
    """As oomsafe advise --json prints it."""
    seconds: float = 0
    """For how long recycles were counted."""
    recycles: int = 0
    kills: int = 0
    """By the kernel, in both pools."""
    refused: list[str] = field(default_factory=list)
    """Lines about limits that are not used."""
    failed: int = 0
    requests: int = 0
    peak: int = 0
    """The largest rss of a worker, in bytes."""

    @property
    def foretold(self) -> float:
        """Recycles an hour."""
        return float(self.advice["advice"]["recycles"])

    @property
    def an_hour(self) -> float:
        """Recycles an hour that were seen."""
        return self.recycles / self.seconds * 3600


def advice_for(server: Server, *more: str) -> dict[str, Any]:
    """What the command says of this server's pool."""
    command = [sys.executable, "-m", "oomsafe.cli", "advise", "--pool", str(server.pid), "--json", *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=common.environment())
    if done.returncode:
        raise SystemExit(f"no advice: {done.stderr}")
    return dict(json.loads(done.stdout)["advice"][0])


def measure(cls: ServerClass, options: argparse.Namespace) -> Seen:
    """Ask a pool under load for advice, then follow it."""
    tuning = Tuning(options.rate, leak=int(options.leak * MIB / options.rate))
    policy: Policy = {"soft_limit": f"{SOFT}MiB", "min_lifetime": None}
    with Watched(cls.server(OOMSAFE, tuning, policy=policy, memory=CGROUP * MIB), cls, OOMSAFE) as watched, ThreadPoolExecutor() as pool:
        load = pool.submit(watched.ask, MEASURED, options.rate)
        time.sleep(MEASURED - 2)
        seen = Seen(advice_for(watched.server))
        load.result()
        seen.kills = watched.server.kernel_kills()
    (advised,) = (one for one in classes(loops("auto"), seen.advice["advice"]["workers"]) if one.shown == renamed(cls, seen))
    follow(advised, tuning, seen, options)
    return seen


def renamed(cls: ServerClass, seen: Seen) -> str:
    """The contestant's name with as many workers as were advised."""
    return cls.shown.replace(f"--workers {WORKERS}", f"--workers {seen.advice['advice']['workers']}")


def follow(cls: ServerClass, tuning: Tuning, seen: Seen, options: argparse.Namespace) -> None:
    """A fresh pool with what was advised. Recycles are counted for whole lives of its workers, half a life after the load began."""
    advice = seen.advice["advice"]
    hard = advice["hard"]
    policy: Policy = {
        "soft_limit": f"{advice['soft'] // MIB}MiB", "hard_limit": hard and f"{hard // MIB}MiB", "metric": advice["metric"],
        "min_lifetime": advice["min_lifetime"],
    }  # fmt: skip
    life = advice["life"]
    seconds = options.lives * life
    with Watched(cls.server(OOMSAFE, tuning, policy=policy, memory=CGROUP * MIB), cls, OOMSAFE) as watched, ThreadPoolExecutor() as pool:
        load = pool.submit(watched.ask, seconds + life / 2 + 2, options.rate)
        time.sleep(life / 2)
        before, began = recycled(watched.server) or 0, time.monotonic()
        time.sleep(seconds)
        seen.recycles = (recycled(watched.server) or 0) - before
        seen.seconds = time.monotonic() - began
        load.result()
        seen.kills += watched.server.kernel_kills()
        seen.refused = [line for line in watched.server.log().splitlines() if REFUSED in line]
    seen.failed, seen.requests, seen.peak = watched.run.failed, watched.run.requests, watched.run.peak


def row_of(name: str, seen: Seen) -> list[str]:
    """Of the table."""
    advice = seen.advice["advice"]
    return [
        name, f"{advice['workers']}", f"{advice['soft'] // MIB}", f"{(advice['hard'] or 0) // MIB or 'none'}", f"{seen.foretold:.0f}",
        f"{seen.an_hour:.0f} ({seen.recycles} in {seen.seconds:.0f} s)", f"{seen.an_hour / seen.foretold:.2f}", f"{seen.kills}",
        f"{len(seen.refused)}", f"{seen.failed} / {seen.requests}", f"{seen.peak / MIB:.0f}",
    ]  # fmt: skip


def main() -> None:
    """Run them, print the table."""
    parser = common.arguments(__doc__ or "", rounds=1)
    parser.add_argument("--only", default="sync|uvicorn --", help="only the servers that this regular expression finds")
    parser.add_argument("--rate", type=float, default=RATE, help=f"requests a second, default {RATE:g}")
    parser.add_argument("--leak", type=float, default=LEAK, help=f"MiB a second of all together, default {LEAK:g}")
    parser.add_argument("--lives", type=int, default=3, help="lives of workers that are counted, default 3")
    options = parser.parse_args()
    chosen = {cls.name: cls for cls in classes(loops("auto"), WORKERS) if re.search(options.only, cls.name)}
    with common.quiet_interrupt():
        seen = common.interleaved(options.rounds, list(chosen), lambda name: measure(chosen[name], options))
    rows = [row_of(name, one) for name, runs in seen.items() for one in runs]
    head = [
        "", "workers", "soft limit, MiB", "hard limit, MiB", "recycles an hour: foretold", "seen", "seen / foretold", "kernel kills",
        "limits refused", "failed / requests", "peak of a worker, MiB",
    ]  # fmt: skip
    title = f"advice for pools that leak {options.leak:g} MiB/s at {options.rate:g} requests/s, in {CGROUP} MiB, and what came of it"
    raw = {name: [vars(one) for one in runs] for name, runs in seen.items()}
    common.report(title, common.machine("gunicorn", "uvicorn", "oomsafe"), [("", common.table(head, rows))], raw, options.json)


if __name__ == "__main__":
    main()
