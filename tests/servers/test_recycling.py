"""A leaking app under load: workers are recycled, clients see nothing of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from clients import Load, Watch
from needs import need
from recycling_lines import recycling_line
from serving import CLASSES, until
from versions import loses_none

from oomsafe.kernel.capacity import read_capacity
from oomsafe.policy.limits import MACHINE

MIB = 1 << 20

#: Over a small app: gunicorn's worker with oomsafe has 28 to 45 MiB after boot, by class.
SOFT = 80 * MIB

#: The user's own: it must be called at each end, and it tells what the scoreboard forgets.
WORKER_EXIT = """
from oomsafe.worker.current import get_guard

def worker_exit(server, worker):
    guard = get_guard()
    worker.log.info("the user's worker_exit: pid %d peak %d in_flight %d", worker.pid, guard.meter.peak_rss, guard.meter.clock.in_flight)
"""

RECYCLING = recycling_line(r"80\.0 MiB", "requests", "GET /leak", "GET /leak")


@pytest.mark.parametrize("worker_class", CLASSES)
def test_leaking_workers_are_recycled_under_load(serve, worker_class):
    """Five recycles or more, told the same by log and scoreboard, by one master; no request is lost, and never does nobody serve."""
    loses_none(worker_class)
    gunicorn = serve(worker_class, soft_limit="80MiB", min_lifetime=0, max_unavailable=1, settings=WORKER_EXIT).serving()

    with Load(gunicorn, "/leak?kib=512") as load:
        gunicorn.wait_for(" recycling: ", times=5, seconds=60)

    assert load.failed == []
    assert load.served > 100
    assert gunicorn.serving().pool().supervisor == gunicorn.pid
    until(lambda: gunicorn.pool().totals.recycles[0] == len(gunicorn.lines(" recycling: ")), "the scoreboard agrees with the log")

    told = [RECYCLING.search(line) for line in gunicorn.lines(" recycling: ")]
    assert all(told)
    recycled = {int(line["pid"]) for line in told if line}
    assert all(int(line["work"]) > 10 for line in told if line)
    ended = re.findall(r"the user's worker_exit: pid (\d+)", gunicorn.log())
    assert recycled <= {int(pid) for pid in ended}
    assert gunicorn.pool().unserved == 0
    stock = [line.partition(" (slot ")[0] for line in gunicorn.lines(" held at its end ")]
    assert len(stock) == len({line.rpartition(" ")[2] for line in stock}) >= 4, "each tells once"


def test_a_sync_worker_that_need_not_wait_ends_as_soon_as_it_is_told(serve):
    """Alone in its pool, it waits for no replacement: its peak is the limit, and what it serves while it asks."""
    gunicorn = serve("sync", 1, soft_limit="80MiB", min_lifetime=0, surge=False, settings=WORKER_EXIT).serving(1)

    with Load(gunicorn, "/leak?kib=512") as load:
        gunicorn.wait_for(" recycling: ", times=3, seconds=60)

    assert load.failed == []
    peaks = [int(peak) for peak in re.findall(r"peak (\d+)", gunicorn.log())]
    assert peaks
    assert max(peaks) <= SOFT * 1.25


@pytest.mark.parametrize(("worker_class", "turns"), [("gthread", 1), ("gthread", 2), ("gevent", 1), ("asgi", 1), (CLASSES[-1], 1)])
def test_no_more_than_max_unavailable_drain_at_once(serve, worker_class, turns):
    """Slow requests hold each drain open, and the others, over their limit too, wait for their turn, however they leak."""
    loses_none(worker_class)
    gunicorn = serve(worker_class, 4, soft_limit="160MiB", min_lifetime=0, jitter=0, max_unavailable=turns, surge=False).serving(4)
    first = set(gunicorn.workers())

    with (
        Watch(lambda: [worker.state for worker in gunicorn.pool().workers].count("draining")) as watch,
        Load(gunicorn, "/slow?s=0.4", clients=6) as slow,
        Load(gunicorn, "/leak?kib=16384&s=0.05", clients=4) as load,
    ):
        until(lambda: not first & set(gunicorn.workers()), "each worker has been recycled", 60)

    assert load.failed + slow.failed == []
    assert 1 <= max(watch.seen) <= turns  # on a busy machine the two need not overlap


def test_gevent_serves_who_was_accepted_just_before_its_listener_was_closed(serve):
    """gunicorn asks the listener for its address only then."""
    gunicorn = serve("slow_start.SlowStart", 1, app="apps:wsgi", soft_limit="80MiB", min_lifetime=0, surge=False).serving(1)

    with Load(gunicorn, "/?", clients=4) as load:
        for times in (1, 2, 3):
            assert gunicorn.get("/fill?mib=84")[0] == 200
            gunicorn.wait_for(" recycling: ", times=times)
            until(lambda times=times: len(gunicorn.lines("Booting worker")) == times + 1, "the next one boots")
            gunicorn.serving(1)

    assert load.failed == []
    assert "Bad file descriptor" not in gunicorn.log()


@pytest.mark.parametrize("worker_class", CLASSES)
def test_an_idle_worker_over_its_limit_ends_too(serve, worker_class):
    """No request comes any more when `sustain` is over: its own tick sees it, and wakes it at once."""
    settings = "timeout = 12"  # a sync worker sleeps, and ticks, for half of it
    gunicorn = serve(worker_class, 1, soft_limit="80MiB", min_lifetime=0, sustain=0.5, settings=settings).serving(1)
    (pid,) = gunicorn.workers()
    assert gunicorn.get("/fill?mib=84")[0] == 200

    gunicorn.wait_for(f"worker {pid} (slot 0) recycling: ")

    until(lambda: pid not in gunicorn.workers(), "it ends before it would have looked again", 4)
    assert gunicorn.serving(1).get("/")[0] == 200


def test_an_idle_sync_worker_that_grows(serve):
    """A thread of its app fills the memory while nobody comes: gunicorn has it sleep for half of `timeout`, and it looks each second."""
    gunicorn = serve("sync", 1, soft_limit="80MiB", min_lifetime=0, reclaim=False, settings="timeout = 60").serving(1)
    (pid,) = gunicorn.workers()

    assert gunicorn.get("/later?mib=100")[0] == 200

    until(lambda: gunicorn.pool().totals.work, "what it has counted is told", 5)
    gunicorn.wait_for(f"worker {pid} (slot 0) recycling: ", seconds=8)
    until(lambda: pid not in gunicorn.workers(), "it hears its order", 5)


def test_a_worker_inside_a_long_request_is_seen(serve):
    """It says what it holds between two requests: until then its supervisor looks."""
    gunicorn = serve("sync", 1, soft_limit="1GiB").serving(1)

    gunicorn.get("/later?mib=150")
    with Load(gunicorn, "/slow?s=6", clients=1):
        (worker,) = until(lambda: [w for w in gunicorn.pool().workers if (w.used or 0) >= 150 * MIB], "it is seen", 5)
        assert worker.in_flight

    assert (worker.figures.rss or 0) > (worker.figures.anon or 0) >= 150 * MIB


@pytest.mark.parametrize("over", [False, True])
def test_a_budget_in_bytes_is_the_pool_s_own(serve, over):
    """What else runs on the machine is none of its business: a worker that is over its limit while it is young waits for its time."""
    machine = read_capacity()
    need(machine.source == MACHINE, "a cgroup limits this one")
    need(machine.working_set > 400 * MIB, "the machine has hardly more in use than one small app")
    budget = 40 * MIB if over else machine.working_set * 3 // 4
    gunicorn = serve("sync", 1, soft_limit="80MiB", min_lifetime=600, budget=budget).serving(1)
    (pid,) = gunicorn.workers()

    gunicorn.get("/fill?mib=90")
    if over:
        gunicorn.wait_for(" recycling: anon ")
        until(lambda: pid not in gunicorn.workers(), "it is replaced")
        return

    def served_by() -> bytes:
        return gunicorn.get("/pid")[2]

    until(lambda: served_by() and gunicorn.pool().workers[0].figures.rss > 90 * MIB, "it has looked at itself")
    assert {served_by() for _ in range(20)} == {str(pid).encode()}
    assert gunicorn.lines(" recycling: ") == []


def test_what_a_worker_maps(serve):
    """Pages of a file that it reads are no reason to recycle it, not even while they await being written. Shared memory is, and so is what
    it has written to."""
    need(not on_tmpfs("/var/tmp"), "/var/tmp is in memory: pages of its files are shared memory")
    gunicorn = serve("sync", 1, soft_limit="80MiB", min_lifetime=0, jitter=0, reclaim=False).serving(1)

    for _ in range(8):
        assert gunicorn.get("/map?mib=25&kind=read")[0] == 200
    (worker,) = until(lambda: [w for w in gunicorn.pool().workers if (w.figures.rss or 0) > 200 * MIB], "it is measured")
    assert (worker.used or 0) < 60 * MIB
    assert gunicorn.lines(" recycling: ") == []

    for times, kind in enumerate(("shared", "dirty"), 1):
        gunicorn.get(f"/map?mib=100&kind={kind}")
        gunicorn.wait_for(" recycling: anon ", times=times, seconds=10)
        until(lambda pid=worker.pid: pid not in gunicorn.workers(), "it is gone")
        (worker,) = gunicorn.serving(1).pool().workers


def on_tmpfs(path: str) -> bool:
    """Whether files there are memory."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    inside = [fields for fields in mounts if path == fields[1] or path.startswith(fields[1].rstrip("/") + "/")]
    return max(inside, key=lambda fields: len(fields[1]))[2] in ("tmpfs", "ramfs")
