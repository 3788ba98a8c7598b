"""A leaking worker is recycled before systemd sees a kill; one that is killed ends its unit by default, not with OOMPolicy=continue."""

from guest import Load, until


def run(vm):
    """systemd's default is OOMPolicy=stop, which ends a unit for one killed process, whoever it was: nothing inside can prevent that."""
    with vm.part("OOMPolicy=continue"):
        pool = vm.gunicorn("continue", {"soft_limit": "250MiB"}, MemoryMax="300M", OOMPolicy="continue")
        supervisor = hog(pool)
        pool.pool()
        vm.check("kernel kills", pool.kills, 1)
        vm.check("the supervisor", pool.pid, supervisor)
        vm.check("the unit", pool.show("ActiveState"), "active")
        vm.stop(pool)
    with vm.part("systemd's default"):
        pool = vm.gunicorn("default", MemoryMax="300M")
        pool.pool()
        with Load(pool):
            vm.check("recycled", pool.recycled(4), 4, least=True)
        vm.check("kernel kills", pool.kills, 0)
        vm.check("the unit", pool.show("ActiveState"), "active")
        hog(pool)
        until(lambda: pool.show("ActiveState") not in ("active", "deactivating"), "systemd ends the unit")
        vm.check("the unit ends with", pool.show("Result"), "oom-kill")


def hog(pool):
    """One request takes all. Returns the supervisor's pid, once a worker is gone."""
    pool.pool()
    supervisor, workers = pool.pid, set(pool.workers())
    pool.get("/hog")
    until(lambda: workers - set(pool.workers()), "a worker is gone")
    return supervisor
