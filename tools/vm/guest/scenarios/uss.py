"""metric="uss" on Linux 6.1, whose smaps_rollup misses memory while a thread maps some: no worker passes its limit by a quarter."""

from guest import MIB, Load, children

LIMIT = 120


def run(vm):
    """Each worker has a thread that maps and unmaps without a pause."""
    policy = {"metric": "uss", "soft_limit": f"{LIMIT}MiB", "jitter": 0, "min_lifetime": 0}
    pool = vm.gunicorn("pool", policy, Environment="MAPPING=1", MemoryMax="600M", OOMPolicy="continue")
    pool.pool()
    supervisor, peak, soft = pool.pid, 0, 0
    with Load(pool) as load:
        while len(pool.lines(" recycling: ")) < 6 and load.answered < 5_000:
            load.for_seconds(0.3)
            peak = max([peak, *map(pool.rss, children(supervisor))])
            soft = max([soft, *(worker.figures.soft or 0 for worker in pool.pool().workers)])
    vm.note("answers", load.answered)
    vm.note("soft limit, MiB", soft // MIB)
    vm.check("recycled", len(pool.lines(" recycling: ")), 6, least=True)
    vm.holds(f"greatest resident memory of a worker, of {LIMIT} MiB", peak <= 1.25 * LIMIT * MIB, f"{peak // MIB} MiB")
