"""memory.oom.group=1: workers are recycled in time; where the kernel must kill, the whole pool dies, and the line at boot has said so."""

from guest import Load, until


def run(vm):
    """OOMPolicy=kill is systemd's name for it; Kubernetes sets it for each container."""
    pool = vm.gunicorn("pool", OOMPolicy="kill", MemoryMax="300M", Restart="always", RestartSec="1")
    pool.pool()
    vm.check("memory.oom.group", (pool.cgroup / "memory.oom.group").read_text().strip(), "1")
    with Load(pool):
        vm.check("recycled", pool.recycled(4), 4, least=True)
    vm.check("kernel kills", pool.kills, 0)

    supervisor = pool.pid
    pool.get("/hog")

    until(lambda: pool.show("NRestarts") != "0", "systemd starts it again")
    until(lambda: pool.pid not in (0, supervisor), "it runs again")
    pool.pool()
    vm.holds("it serves after the whole pool was killed", pool.get("/"), "GET /")
    boot = pool.lines("oomsafe guards")
    vm.check("boots, each with its line", len(boot), 2)
    said = pool.lines("memory.oom.group")
    vm.holds("a line at boot says what memory.oom.group means", said, said)
