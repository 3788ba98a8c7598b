"""Eight workers that leak, each within its soft limit, in a memory cgroup that holds half of what these limits add up to: kernel kills,
failed and shed requests. Each server without oomsafe, with it, and with it and shed=True. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass, field

import common
import recycling_tables as tables
from common import MIB
from contestants import NOT, OOMSAFE, Policy, ServerClass, Tuning, classes, loops
from recycling_runs import Run, Watched

#: Workers, and MiB: of their cgroup, and of each one's soft limit, which add up to twice the cgroup.
WORKERS, CGROUP, SOFT = 8, 512, 128

#: Requests a second of the clients that verify, and MiB a second that these make the pool leak.
RATE, LEAK = 100.0, 20.0

SHEDS = f"{OOMSAFE}, shed=True"
WAYS = (NOT, OOMSAFE, SHEDS)


@dataclass
class Seen:
    """One run."""

    run: Run
    kills: int = 0
    """By the kernel, as the cgroup counts them."""
    shed: int = 0
    """Answers of 503."""
    for_budget: int = 0
    """Workers recycled for the budget, by the scoreboard."""
    ended: bool = False
    """The supervisor did not live to the end."""
    log: list[str] = field(default_factory=list)

    @property
    def failed(self) -> int:
        """All that failed otherwise."""
        return self.run.failed - self.shed


def measure(cls: ServerClass, way: str, options: argparse.Namespace) -> Seen:
    """One contestant under load."""
    tuning = Tuning(options.rate, leak=int(options.leak * MIB / options.rate))
    policy: Policy = {"soft_limit": f"{SOFT}MiB", "min_lifetime": None, "shed": way == SHEDS, "shed_exempt": "/health"}
    oomsafe = NOT if way == NOT else OOMSAFE
    with Watched(cls.server(oomsafe, tuning, policy=policy, memory=CGROUP * MIB), cls, oomsafe) as watched:
        watched.ask(options.seconds, options.rate)
        pool = None if way == NOT else watched.server.find_pool()
        seen = Seen(watched.run, watched.server.kernel_kills(), ended=not watched.server.alive)
        seen.log = watched.server.log().splitlines()
    seen.shed = sum(count for kind, count in seen.run.failures.items() if "status 503" in kind)
    seen.for_budget = 0 if pool is None else pool.totals.by_reason["budget"]
    return seen


def main() -> None:
    """Run them, print the table."""
    parser = common.arguments(__doc__ or "", rounds=1, seconds=120)
    parser.add_argument("--only", default="sync|uvicorn --", help="only the servers that this regular expression finds")
    parser.add_argument("--ways", default="", help=f"only the ways that this regular expression finds: {', '.join(WAYS)}")
    parser.add_argument("--rate", type=float, default=RATE, help=f"requests a second, default {RATE:g}")
    parser.add_argument("--leak", type=float, default=LEAK, help=f"MiB a second of all together, default {LEAK:g}")
    parser.add_argument("--log", help="a file for the servers' logs")
    options = parser.parse_args()
    chosen = [cls for cls in classes(loops("auto"), WORKERS) if re.search(options.only, cls.name)]
    pairs = {f"{cls.name}: {way}": (cls, way) for cls in chosen for way in WAYS if re.search(options.ways, way)}
    with common.quiet_interrupt():
        seen = common.interleaved(options.rounds, list(pairs), lambda name: measure(*pairs[name], options))
    rows = [
        [
            name, f"{sum(one.kills for one in runs)}{' THE SUPERVISOR ENDED' if any(one.ended for one in runs) else ''}",
            f"{sum(one.failed for one in runs)} / {sum(one.run.requests for one in runs)}", f"{sum(one.shed for one in runs)}",
            f"{sum(one.run.recycles for one in runs)} ({sum(one.for_budget for one in runs)})",
            f"{max(one.run.longest for one in runs):.1f}", f"{max(one.run.pause for one in runs):.1f}",
        ] for name, runs in seen.items()
    ]  # fmt: skip
    kinds = tables.kinds({name: [one.run for one in runs] for name, runs in seen.items()})
    head = ["", "kernel kills", "failed / requests", "shed", "workers gone (for the budget)", "longest wait, s", "nobody served, s"]
    about = common.machine("gunicorn", "uvicorn", "oomsafe")
    if options.log:
        with open(options.log, "w") as file:
            file.writelines(f"{name}: {line}\n" for name, runs in seen.items() for one in runs for line in one.log)
    title = f"{WORKERS} workers that leak {options.leak:g} MiB/s together, {SOFT} MiB each, in {CGROUP} MiB, {options.seconds:g} s"
    raw = {name: [{**vars(one.run), "kills": one.kills, "shed": one.shed} for one in runs] for name, runs in seen.items()}
    common.report(title, about, [("", common.table(head, rows) + kinds)], raw, options.json)


if __name__ == "__main__":
    main()
