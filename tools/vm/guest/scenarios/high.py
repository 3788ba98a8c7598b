"""MemoryHigh is a limit: a leaking pool under it serves as without it, is not throttled, and is recycled in time."""

from guest import MIB, Load, keyed, stalled

MEMORY = 1024

#: Turns under load of so many seconds for each pool; the first minute is the warm-up.
TURNS, SECONDS, WARM = 18, 5, 6


def run(vm):
    """Two pools alike but for MemoryHigh, loaded in turns: whatever else the host does meanwhile slows both."""
    pools = {
        "with": vm.gunicorn("with-high", MemoryHigh="300M", MemoryMax="600M", OOMPolicy="continue"),
        "without": vm.gunicorn("without-high", MemoryMax="600M", OOMPolicy="continue"),
    }
    for pool in pools.values():
        pool.pool()
    boot = pools["with"].lines("oomsafe guards")[0]
    rates = {name: [] for name in pools}
    for turn in range(TURNS):
        if turn == WARM:
            before, throttled = stalled(pools["with"].cgroup), keyed(pools["with"].cgroup / "memory.events")["high"]
        for name, pool in pools.items():
            with Load(pool) as load:
                rates[name].append(round(load.for_seconds(SECONDS), 1))
    vm.note("answers a second", rates)
    share = sum(rates["with"][WARM:]) / sum(rates["without"][WARM:])
    vm.check("answers after the warm-up, with memory.high against without", round(share, 2), 0.9, least=True)
    vm.check("seconds throttled after the warm-up (PSI, full)", round(stalled(pools["with"].cgroup) - before, 1), 0.0)
    vm.note("times over memory.high after the warm-up", keyed(pools["with"].cgroup / "memory.events")["high"] - throttled)
    vm.check("recycled", len(pools["with"].lines(" recycling: ")), 4, least=True)
    vm.note("recycled without it", len(pools["without"].lines(" recycling: ")))
    vm.check("kernel kills", pools["with"].kills, 0)
    vm.note("soft limits, MiB", [worker.figures.soft // MIB for worker in pools["with"].pool().workers])
    vm.holds("the line at boot names the 300 MiB", "of 300 MiB" in boot, boot)
