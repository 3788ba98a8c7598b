"""The kernel takes the dirty worker that balloons, never an HTTP worker or an arbiter. Real kills in a real memory cgroup."""

from __future__ import annotations

import http.client
import re
import subprocess
import threading
from contextlib import suppress

import pytest
from dirtying import dirty, dirty_arbiter, dirty_pool, dirty_workers
from serving import until

pytestmark = pytest.mark.xdist_group("oom")

MIB = 1 << 20
LIMIT = 400 * MIB

#: Two HTTP workers of this size leave the dirty one less (about 145 and 132 MiB of rss): by its memory alone, one of them would be chosen.
HTTP_MIB = 140


def test_the_kernel_kills_the_dirty_worker(cgroup, serve):
    """Five of five times the dirty worker first, beside HTTP workers that are bigger; and both arbiters live."""
    sandbox = cgroup(LIMIT)
    # a worker that is recycled because the pool is above its budget is to be taken before any other
    gunicorn = dirty(serve, 1, soft_limit="380MiB", budget="4GiB", wrap=sandbox.command)
    arbiter = dirty_arbiter(gunicorn)

    # no load meanwhile: what is charged to a full cgroup while its victim still exits has the kernel take another, now and then
    for kill in range(1, 6):
        while any((worker.figures.rss or 0) < HTTP_MIB * MIB for worker in gunicorn.pool().workers):
            gunicorn.get(f"/fill?mib={HTTP_MIB}")
        (victim,) = until(lambda: dirty_workers(gunicorn), "a dirty worker is there")
        before = max((at for at, _ in killed()), default=0.0)
        asking = threading.Thread(target=_hog, args=(gunicorn,))
        asking.start()
        until(lambda victim=victim: victim not in dirty_workers(gunicorn), "it is gone")
        asking.join()
        assert sandbox.cgroup.oom_kills() >= kill
        until(lambda: [worker.state for worker in dirty_pool(gunicorn).workers] == ["serving"], "another serves")
        gunicorn.wait_for(f"dirty pool: worker {victim} (slot ")
        ours = {victim, *map(int, re.findall(r"Booting worker with pid: (\d+)", gunicorn.log()))}
        assert next(pid for at, pid in killed() if at > before and pid in ours) == victim
        assert gunicorn.get("/")[0] == 200
        gunicorn.serving(2)

    assert arbiter in gunicorn.workers()
    told = [line for line in gunicorn.lines("was killed by the kernel's OOM killer (confirmed: ") if "dirty pool: " in line]
    assert len(told) == dirty_pool(gunicorn).ends["oom_confirmed"] == 5
    assert [line for line in told if ".hog (" not in line] == []


def killed() -> list[tuple[float, int]]:
    """Whom the kernel has killed for memory, and when, in seconds since its boot."""
    log = subprocess.run(["dmesg"], capture_output=True, text=True, check=True).stdout
    return [(float(at), int(pid)) for at, pid in re.findall(r"^\[ *([\d.]+)\] .*Killed process (\d+) ", log, re.MULTILINE)]


def _hog(gunicorn) -> None:
    with suppress(OSError, http.client.HTTPException):
        gunicorn.get("/dirty/hog")
