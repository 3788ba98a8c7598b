"""A pool that the kernel throttles at memory.high says so, once: with the level, an ancestor's, and with what to do."""

import threading

from guest import systemctl

MEMORY = 1024


def run(vm):
    """One request takes more than the slice's MemoryHigh; a soft limit can't help before it is over."""
    systemctl("set-property", "--runtime", "shop.slice", "MemoryHigh=200M")
    pool = vm.gunicorn("pool", {"soft_limit": "150MiB"}, Slice="shop.slice", MemoryMax="600M", OOMPolicy="continue")
    pool.pool()
    boot = pool.lines("oomsafe guards")[0]
    vm.holds("the line at boot names the ancestor's file", "of 200 MiB (memory.high of cgroup v2 /sys/fs/cgroup/shop.slice" in boot, boot)
    vm.check("lines before", len(pool.lines("the kernel throttles this pool")), 0)

    asking = threading.Thread(target=pool.get, args=("/fill?mib=260", 400), daemon=True)
    asking.start()

    (line, *_) = pool.wait_for("the kernel throttles this pool")
    vm.holds("it names the same", "above memory.high 200 MiB of cgroup v2 /sys/fs/cgroup/shop.slice;" in line, line)
    asking.join(20)
    vm.check("lines", len(pool.lines("the kernel throttles this pool")), 1)
    vm.check("kernel kills", pool.kills, 0)
