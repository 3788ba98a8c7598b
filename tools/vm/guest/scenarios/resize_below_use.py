"""memory.max goes below what the pool holds: the kernel kills at once, a worker, never the supervisor; the next have the new limits."""

from guest import MIB, until


def run(vm):
    """No process can prevent this kill: the kernel kills until what is left fits (cgroup-v2, memory.max)."""
    pool = vm.gunicorn("pool", {"jitter": 0}, MemoryMax="600M", OOMPolicy="continue")
    pool.pool()
    supervisor, workers = pool.pid, set(pool.workers())
    until(lambda: pool.get("/fill?mib=240") and all(pool.rss(pid) >= 240 * MIB for pid in workers), "each worker holds 240 MiB")

    pool.set(MemoryMax="300M")

    until(lambda: workers - set(pool.workers()), "a worker is gone")
    vm.check("the supervisor", pool.pid, supervisor)
    vm.note("kernel kills", pool.kills)

    def greatest_soft():
        return max(worker.figures.soft for worker in pool.pool().workers) // MIB

    # the one that lives follows at its next look, and says so
    until(lambda: greatest_soft() < 240, "the living worker has another soft limit", 10)
    after = pool.pool()
    vm.check("the pool's limit, MiB", after.limit // MIB, 300)
    vm.holds("a worker's greatest soft limit is its share of 300 MiB", 90 < greatest_soft() < 135, f"{greatest_soft()} MiB")
