"""A limit that is not at the process's own cgroup: found at the nearest level that has it, or a line says that it can't be seen."""

from pathlib import Path

from guest import MIB

#: In a cgroup of its own below the unit's, to which the memory controller is not given.
CHILD = ("/bin/sh", "-c", 'd=/sys/fs/cgroup$(cut -d: -f3 /proc/self/cgroup)/inner; mkdir $d; echo $$ > $d/cgroup.procs; exec "$@"', "sh")

#: Sees "/" as its cgroup, and the host's hierarchy mounted.
NAMESPACE = ("unshare", "--cgroup")


def run(vm):
    """A unit with 300 MiB in a machine of 768."""
    with vm.part("child without the memory controller"):
        pool = vm.gunicorn("child", wrap=CHILD, MemoryMax="300M", Delegate="yes")
        vm.check("the pool's limit, MiB", pool.pool().limit // MIB, 300)
        vm.check("the cgroup it is in", Path(f"/proc/{pool.pid}/cgroup").read_text().strip(), "0::/system.slice/child.service/inner")
        boot = pool.lines("oomsafe guards")[0]
        vm.holds("the line at boot names the unit's folder", str(pool.cgroup) in boot, boot)
    with vm.part("private cgroup namespace"):
        pool = vm.gunicorn("private", wrap=NAMESPACE, MemoryMax="300M")
        found = pool.pool().limit // MIB
        said = [line for line in pool.lines("cgroup") if "can't be seen" in line or "namespace" in line]
        vm.holds("the limit of 300 MiB is found, or a line says that it can't be", found == 300 or said, [f"{found} MiB", *said])
