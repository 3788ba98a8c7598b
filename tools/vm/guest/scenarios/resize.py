"""memory.max goes from 600 to 300 MiB: living workers' limits follow, the line at boot is said again, and nobody is killed."""

from guest import MIB, Load, until

MEMORY = 1024


def run(vm):
    """A leak goes on before and after."""
    pool = vm.gunicorn("pool", {"jitter": 0}, MemoryMax="600M", OOMPolicy="continue")
    vm.note("soft limits before, MiB", [worker.figures.soft // MIB for worker in pool.pool().workers])

    with Load(pool):
        until(lambda: all(pool.rss(pid) > 90 * MIB for pid in pool.workers()), "each worker holds 90 MiB")
        living = set(pool.workers())
        vm.note("in use when it is resized, MiB", pool.usage // MIB)
        pool.set(MemoryMax="300M")
        vm.check("recycled after it", pool.recycled(4), 4, least=True)

    after = pool.pool()
    vm.check("kernel kills", pool.kills, 0)
    vm.check("the pool's limit, MiB", after.limit // MIB, 300)
    soft = max(worker.figures.soft for worker in after.workers) // MIB
    vm.holds("a worker's greatest soft limit is its share of 300 MiB", 90 < soft < 135, f"{soft} MiB")
    recycled = [line for line in pool.lines(" recycling: ") if any(f"worker {pid} " in line for pid in living)]
    vm.check("workers older than it that were recycled by the new limit", sum(" 25" not in line for line in recycled), 2, least=True)
    vm.check("the line at boot is said again", len([line for line in pool.lines("oomsafe guards") if "of 300 MiB" in line]), 1, least=True)
