"""Workers whose soft limits add up to twice their cgroup: the pool keeps to its budget, and the kernel kills nobody."""

from __future__ import annotations

import pytest
from clients import Load

# they take the machine's memory cgroups, kernel log and processors: one after the other
pytestmark = pytest.mark.xdist_group("oom")

MIB = 1 << 20

#: For each of the clients; two of them leak some 50 MiB/s together.
LEAK = "/leak?kib=256&s=0.01"

FOR_BUDGET = " recycling: by its supervisor's order, for the pool's budget: "


@pytest.mark.parametrize("kind", ["sync", "uvicorn"])
def test_the_kernel_kills_nobody(cgroup, serve, serve_uvicorn, kind: str) -> None:
    """Four of 150 MiB in 300 MiB, most of which leave long before they are over their own limits."""
    sandbox = cgroup(300 * MIB)
    policy = {"soft_limit": "150MiB", "jitter": 0, "wrap": sandbox.command}
    server = serve(kind, 4, **policy) if kind == "sync" else serve_uvicorn(workers=4, app="apps:asgi", **policy)
    server.serving(4)

    with Load(server, LEAK, clients=2) as load:
        server.wait_for(FOR_BUDGET, times=8, seconds=90)

    assert (sandbox.cgroup.oom_kills(), load.failed) == (0, [])
    assert not server.lines("recycling does not help")
    assert not server.lines("were recycled for it")
