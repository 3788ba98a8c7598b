"""memory.max goes from 600 to 300 MiB: living workers' limits follow, the line at boot is said again, and nobody is killed."""

import re
import time
from pathlib import Path

from guest import MIB, Load, until

MEMORY = 1024


def run(vm):
    """A leak goes on before and after; without a hard limit, with one that is worked out, and with one that is given."""
    for name, more in (("plain", {}), ("auto", {"hard_limit": "auto"}), ("size", {"hard_limit": "250MiB"})):
        with vm.part(name):
            unit = vm.gunicorn(f"pool-{name}", {"jitter": 0, **more}, MemoryMax="600M", OOMPolicy="continue")
            resized(vm, unit, bool(more))
            vm.stop(unit)


def resized(vm, pool, hard):
    """One pool, before and after."""
    before = pool.pool().workers
    vm.note("soft limits before, MiB", [worker.figures.soft // MIB for worker in before])
    if hard:
        vm.note("hard limits before, MiB", [worker.figures.hard // MIB for worker in before])

    with Load(pool):
        until(lambda: all(pool.rss(pid) > 90 * MIB for pid in pool.workers()), "each worker holds 90 MiB")
        living = set(pool.workers())
        allowed = {pid: may_map(pid) for pid in living}
        vm.note("in use when it is resized, MiB", pool.usage // MIB)
        began = time.monotonic()
        pool.set(MemoryMax="300M")
        (line,) = pool.wait_for("of 300 MiB")
        vm.note("seconds until the line at boot is said again", round(time.monotonic() - began, 1))
        auto = "(auto)" in line.partition(", hard limit ")[2].partition(",")[0]
        followed = follow(pool, living, auto, began)
        vm.holds("what workers may map has come down", not auto or any(may_map(pid) < allowed[pid] for pid in living), allowed)
        vm.holds("limits follow within 5 s", followed is not None and followed <= 5, followed)
        vm.check("recycled after it", pool.recycled(4), 4, least=True)

    after = pool.pool()
    vm.check("kernel kills", pool.kills, 0)
    vm.check("the pool's limit, MiB", after.limit // MIB, 300)
    soft = max(worker.figures.soft for worker in after.workers) // MIB
    vm.holds("a worker's greatest soft limit is its share of 300 MiB", 90 < soft < 135, f"{soft} MiB")
    if hard:
        # auto: what is left beside the supervisor and the other worker at its soft limit
        most = 300 - soft - 10 if auto else 250
        found = [worker.figures.hard // MIB for worker in after.workers]
        vm.holds("hard limits", all(soft < limit <= most for limit in found), f"{found} MiB, at most {most}")
    step = int(re.search(r"workers' oom_score_adj \+(\d+)", pool.lines("of 300 MiB")[-1])[1])
    scores = [int(Path(f"/proc/{pid}/oom_score_adj").read_text()) for pid in pool.workers()]
    vm.holds("scores are those of the line", all(score >= step for score in scores), f"{scores}, +{step}")
    recycled = [line for line in pool.lines(" recycling: ") if any(f"worker {pid} " in line for pid in living)]
    vm.check("workers older than it that were recycled by the new limit", sum(" 25" not in line for line in recycled), 2, least=True)


def follow(pool, living, auto, began):
    """Seconds until the living workers that still serve have published limits that fit the new one; None: not within 30 s."""
    while time.monotonic() - began < 30:
        workers = [worker for worker in pool.pool().workers if worker.pid in living]
        if all(worker.figures.soft <= 135 * MIB and (not auto or worker.figures.hard <= 180 * MIB) for worker in workers):
            return round(time.monotonic() - began, 1)
        time.sleep(0.1)
    return None


def may_map(pid):
    """The soft value of a process's RLIMIT_DATA; 0 where it is gone."""
    try:
        lines = Path(f"/proc/{pid}/limits").read_text().splitlines()
    except OSError:
        return 0
    value = next(line.split()[3] for line in lines if line.startswith("Max data size"))
    return (1 << 62) if value == "unlimited" else int(value)
