"""A preloaded heap in a memory cgroup that holds it once: recycling must not copy it for each worker. Real kills where it would."""

from __future__ import annotations

import pytest
from serving import until

# they take the machine's memory cgroups, kernel log and processors: one after the other
pytestmark = pytest.mark.xdist_group("oom")

MIB = 1 << 20


@pytest.fixture
def recycled(cgroup, serve):
    """Three workers with 160 MiB preloaded in 520 MiB, which recycle six times; the kernel's kills meanwhile: recycled(**policy)."""

    def run(**policy: object) -> int:
        sandbox = cgroup(520 * MIB)
        policy = {"min_lifetime": 0, "soft_limit": "50MiB", "metric": "uss", "jitter": 0, **policy}
        gunicorn = serve(
            "sync", 3, app="preloaded:wsgi", settings="preload_app = True\n", env={"PRELOAD_MIB": "160"}, wrap=sandbox.command, **policy
        )
        gunicorn.serving(3)
        seen = set(gunicorn.workers())

        def again() -> bool:
            gunicorn.get("/leak?kib=4096")
            seen.update(gunicorn.workers())
            return len(seen) >= 9 or bool(sandbox.cgroup.oom_kills())

        until(again, "six workers are recycled", 60)
        gunicorn.stop()
        return sandbox.cgroup.oom_kills() or 0

    return run


def test_recycling_copies_no_preloaded_heap(recycled):
    """No kill, neither while they recycle nor when all end."""
    assert recycled() == 0


def test_without_freezing_the_kernel_kills(recycled):
    """So the test above can tell."""
    assert recycled(freeze_preload=False) > 0
