"""The kernel takes the dirty worker that balloons, never an HTTP worker or an arbiter. Real kills in a real memory cgroup."""

from __future__ import annotations

import http.client
import threading
from contextlib import suppress

import pytest
from dirtying import dirty, dirty_arbiter, dirty_pool, dirty_workers
from serving import until

pytestmark = pytest.mark.xdist_group("oom")

MIB = 1 << 20
LIMIT = 400 * MIB


#: Two HTTP workers of this size leave the dirty one hardly more: by its memory alone, one of them would be chosen.
HTTP_MIB = 120


def test_the_kernel_kills_the_dirty_worker(cgroup, serve):
    """Five of five times the dirty worker; the HTTP workers, which are as big, serve on."""
    sandbox = cgroup(LIMIT)
    gunicorn = dirty(serve, 1, soft_limit="380MiB", wrap=sandbox.command)
    arbiter = dirty_arbiter(gunicorn)
    http_workers = set(gunicorn.workers()) - {arbiter}
    while any((worker.figures.rss or 0) < HTTP_MIB * MIB for worker in gunicorn.pool().workers):
        gunicorn.get(f"/fill?mib={HTTP_MIB}")

    # no load meanwhile: what is charged to a full cgroup while its victim still exits may have the kernel choose another
    for kill in range(1, 6):
        (victim,) = until(lambda: dirty_workers(gunicorn), "a dirty worker is there")
        asking = threading.Thread(target=_hog, args=(gunicorn,))
        asking.start()
        until(lambda victim=victim: victim not in dirty_workers(gunicorn), "it is gone")
        asking.join()
        assert sandbox.cgroup.oom_kills() >= kill
        until(lambda: [worker.state for worker in dirty_pool(gunicorn).workers] == ["serving"], "another serves")
        gunicorn.wait_for(f"dirty pool: worker {victim} (slot ")
        assert gunicorn.get("/")[0] == 200

    # while a victim's memory is still charged, for some 20 ms, the kernel may take a second one
    assert len(http_workers - set(gunicorn.workers())) <= 1
    assert arbiter in gunicorn.workers()
    told = [line for line in gunicorn.lines("was killed by the kernel's OOM killer (confirmed: ") if "dirty pool: " in line]
    assert len(told) == dirty_pool(gunicorn).ends["oom_confirmed"] == 5
    assert [line for line in told if ".hog (" not in line] == []


def _hog(gunicorn) -> None:
    with suppress(OSError, http.client.HTTPException):
        gunicorn.get("/dirty/hog")
