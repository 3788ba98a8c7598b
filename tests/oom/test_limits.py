"""Limits that move, and limits that others eat from: the pool keeps within what is left, and the kernel kills nobody."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from clients import Load
from hogs import ENOUGH
from needs import need
from serving import Gunicorn, until

from oomsafe.kernel.sandbox import Sandbox

# they take the machine's memory cgroups, kernel log and processors: one after the other
pytestmark = pytest.mark.xdist_group("oom")

MIB = 1 << 20

#: Some 25 MiB/s for each client: what a pool of two can be replaced at.
LEAK = "/leak?kib=256&s=0.01"


def softs(gunicorn: Gunicorn) -> list[int]:
    """The soft limits in force, one for each worker."""
    return [worker.figures.soft or 0 for worker in gunicorn.pool().workers]


@contextmanager
def sibling(sandbox: Sandbox, mib: int) -> Iterator[None]:
    """A process that holds so much inside of `sandbox`."""
    hold = f"held = b'x' * ({mib} << 20); print('holds', flush=True); input()"
    process = subprocess.Popen(
        sandbox.command([sys.executable, "-c", hold]), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "holds\n"
        yield
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()


def test_a_limit_that_is_lowered_holds_for_workers_that_live(cgroup, serve):
    """600 MiB become 300 while two workers serve: they, the scoreboard and the log follow, and nobody is killed under load."""
    sandbox = cgroup(600 * MIB)
    gunicorn = serve("gthread", 2, min_lifetime=0, jitter=0, wrap=sandbox.command).serving(2)
    before = gunicorn.workers()
    assert min(softs(gunicorn)) > 200 * MIB

    sandbox.limit(300 * MIB)

    gunicorn.wait_for("oomsafe guards 2 workers", times=2)
    assert "budget 270 MiB of 300 MiB" in gunicorn.lines("oomsafe guards 2 workers")[1]
    assert (gunicorn.pool().limit, gunicorn.pool().budget) == (300 * MIB, 270 * MIB)
    until(lambda: all(0 < soft < 135 * MIB for soft in softs(gunicorn)), "living workers have their new share")
    assert gunicorn.workers() == before
    with Load(gunicorn, LEAK, clients=2) as load:
        gunicorn.wait_for(" recycling: ", times=2, seconds=60)
    assert (sandbox.cgroup.oom_kills(), gunicorn.lines("SIGKILL"), load.failed) == (0, [], [])


def test_what_a_sibling_uses_is_not_the_pools(cgroup, serve):
    """400 MiB for two cgroups, and 100 of them are taken: the pool keeps to the rest, and its line says whose limit that is."""
    parent = cgroup(400 * MIB)
    beside, own = cgroup(None, parent), cgroup(390 * MIB, parent)
    with sibling(beside, 100):
        gunicorn = serve("gthread", 2, min_lifetime=0, jitter=0, wrap=own.command).serving(2)
        (line,) = gunicorn.lines("oomsafe guards 2 workers")
        assert f"of 400 MiB (cgroup v{parent.cgroup.version} {parent.cgroup.path}, others use 10" in line
        assert gunicorn.pool().budget < 275 * MIB
        with Load(gunicorn, LEAK, clients=2) as load:
            gunicorn.wait_for(" recycling: ", times=2, seconds=60)
        assert (own.cgroup.oom_kills(), beside.cgroup.oom_kills(), load.failed) == (0, 0, [])


def test_celery_says_whose_limit_it_was(cgroup, celery):
    """The child is killed for its parent's 300 MiB, of which a sibling has 100, long before it meets those of its own cgroup."""
    parent = cgroup(300 * MIB)
    beside, own = cgroup(None, parent), cgroup(290 * MIB, parent)
    with sibling(beside, 100):
        node = celery(soft_limit="280MiB", env=ENOUGH, wrap=own.command).ready()
        text = node.ask("result = str(proj.hog_early.delay(1).get(timeout=60, propagate=False))")

    assert f"limit 300 MiB (cgroup v{parent.cgroup.version} {parent.cgroup.path}, others use 10" in text
    assert node.process.poll() is None


def test_a_namespace_of_its_own_over_the_host_s_cgroups(cgroup, serve):
    """To itself it seems to be at the root of what is mounted: its cgroup is found, below that root, and not the machine's memory used."""
    sandbox = cgroup(300 * MIB)
    alone = ["unshare", "--cgroup"]
    need(subprocess.run([*alone, "true"], check=False).returncode == 0, "no cgroup namespace can be made")
    gunicorn = serve("sync", 1, wrap=lambda command: sandbox.command([*alone, *command])).serving(1)

    (line,) = gunicorn.lines("oomsafe guards 1 worker")
    assert f"budget 270 MiB of 300 MiB (cgroup v{sandbox.cgroup.version} {sandbox.cgroup.path})" in line
    assert gunicorn.pool().held < 100 * MIB


def test_a_sibling_that_comes_later_is_seen(cgroup, serve):
    """The workers live when it takes its 150 MiB: they have less from then on."""
    parent = cgroup(400 * MIB)
    beside, own = cgroup(None, parent), cgroup(None, parent)
    gunicorn = serve("gthread", 2, jitter=0, wrap=own.command).serving(2)
    before = min(softs(gunicorn))
    assert before > 140 * MIB

    with sibling(beside, 150):
        until(lambda: max(softs(gunicorn)) < before - 60 * MIB, "the workers have less")
        pool = gunicorn.pool()
        assert pool.others > 150 * MIB
        assert pool.held < pool.budget < 250 * MIB
        assert parent.cgroup.path in pool.source
