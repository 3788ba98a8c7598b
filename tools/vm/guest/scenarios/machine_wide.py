"""The whole machine runs out, no cgroup has a limit: a worker dies before its supervisor, which is bigger than any worker gets."""

from guest import MIB, killed, until

MEMORY = 512


def run(vm):
    """A preloading master of 200 MiB, and a hog twice: without swap the machine thrashes for a while before it kills."""
    pool = vm.gunicorn(
        "pool", {"soft_limit": "400MiB"}, settings={"preload_app": True}, OOMPolicy="continue", Environment="BALLAST_MIB=200"
    )
    supervisor = (pool.pool(), pool.pid)[1]
    for _ in range(2):
        workers = set(pool.workers())
        pool.get("/hog", seconds=300)
        until(lambda workers=workers: workers - set(pool.workers()), "a worker is gone")
        pool.pool()
    vm.note("supervisor, MiB", pool.rss(supervisor) // MIB)
    vm.check("the supervisor", pool.pid, supervisor)
    vm.check("killed by the kernel, each a worker", [name[:9] for name in killed()], ["oomsafe-w"] * 2)
    vm.holds("it serves", pool.get("/"), "GET /")
