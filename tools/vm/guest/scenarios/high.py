"""MemoryHigh is a limit: a leaking pool under it answers as one without it, is not throttled, and is recycled in time."""

import threading
import time

from guest import MIB, keyed, stalled

MEMORY = 1024

#: Seconds: the first minute is the warm-up; at the end, or when enough workers were recycled, it is over.
WARM, END, RECYCLES = 60, 700, 4

#: At most 20 MiB a second in each pool: both clients ask one after the other.
LEAK = "/leak?kib=1024&s=0.05"


def run(vm):
    """Two pools alike but for MemoryHigh, asked in turns by each client: whatever else the host does meanwhile slows both."""
    pools = {
        "with": vm.gunicorn("with-high", MemoryHigh="300M", MemoryMax="600M", OOMPolicy="continue"),
        "without": vm.gunicorn("without-high", MemoryMax="600M", OOMPolicy="continue"),
    }
    for pool in pools.values():
        pool.pool()
    high, boot = pools["with"], pools["with"].lines("oomsafe guards")[0]
    ask(pools, lambda seconds: seconds > WARM)
    before, throttled, warm = stalled(high.cgroup), keyed(high.cgroup / "memory.events")["high"], len(high.lines(" recycling: "))

    waits, failed = ask(pools, lambda seconds: seconds > END or (seconds > WARM and high.recycled(warm + RECYCLES, 0) >= warm + RECYCLES))

    vm.note("answers of each", len(waits["with"]))
    vm.check("failed", failed, 0)
    vm.check("answers a second, with memory.high against without", round(sum(waits["without"]) / sum(waits["with"]), 2), 0.9, least=True)
    vm.check("seconds throttled (PSI, full)", round(stalled(high.cgroup) - before, 1), 0.0)
    vm.note("times over memory.high", keyed(high.cgroup / "memory.events")["high"] - throttled)
    vm.check("recycled", len(high.lines(" recycling: ")) - warm, RECYCLES, least=True)
    vm.note("recycled without it, warm-up included", len(pools["without"].lines(" recycling: ")))
    vm.check("kernel kills", high.kills, 0)
    vm.note("soft limits, MiB", [worker.figures.soft // MIB for worker in high.pool().workers])
    vm.holds("the line at boot names the 300 MiB", "of 300 MiB" in boot, boot)


def ask(pools, over):
    """Two clients until `over(seconds)`: how long each answer of each pool took, and how many there were not."""
    waits, failed, began = {name: [] for name in pools}, [], time.monotonic()

    def client():
        while not over(time.monotonic() - began):
            for name, pool in pools.items():
                asked = time.monotonic()
                failed.extend([] if pool.get(LEAK, 60) else [name])
                waits[name].append(time.monotonic() - asked)

    threads = [threading.Thread(target=client) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return waits, len(failed)
