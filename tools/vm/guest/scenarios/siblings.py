"""The limit is an ancestor's, a sibling has 100 MB of it: the pool keeps to what is left, nobody is killed, a line names the level."""

import re
import sys

from guest import CGROUPS, MIB, Load, keyed, systemctl


def run(vm):
    """A slice with a limit, two services in it without one."""
    vm.unit("sibling", [sys.executable, "-c", "kept = b'x' * 100_000_000; import time; time.sleep(1e6)"], Slice="shared.slice")
    systemctl("set-property", "--runtime", "shared.slice", "MemoryMax=400M")
    pool = vm.gunicorn("pool", Slice="shared.slice", OOMPolicy="continue")
    vm.note("soft limits, MiB", [worker.figures.soft // MIB for worker in pool.pool().workers])

    with Load(pool):
        vm.check("recycled", pool.recycled(4), 4, least=True)

    vm.check("kernel kills in the slice", keyed(CGROUPS / "shared.slice/memory.events")["oom_kill"], 0)
    vm.check("the pool's limit, MiB", pool.pool().limit // MIB, 400)
    boot = pool.lines("oomsafe guards")[0]
    vm.holds("the line at boot names the slice", re.search(r"/sys/fs/cgroup/shared\.slice(?!/)", boot), boot)
