"""Settings that can't be right, and settings that this machine can't meet."""

from __future__ import annotations

import pytest
from clients import Load
from serving import CLASSES, until

from oomsafe.kernel.net import migrates_requests

BAD = [
    ({"soft_limit": "300"}, {}, "soft_limit='300'", 'soft_limit="300MiB"'),
    ({"soft_limit": 300}, {}, "soft_limit=300", 'soft_limit="300MiB"'),
    ({"soft_limit": "300MB"}, {}, "soft_limit='300MB'", 'soft_limit="300MiB"'),
    ({"soft_limit": None}, {}, "soft_limit=None", 'soft_limit="300MiB"'),
    ({"soft_limit": "-1MiB"}, {}, "soft_limit='-1MiB'", 'soft_limit="300MiB"'),
    ({"hard_limit": "much"}, {}, "hard_limit='much'", 'hard_limit="500MiB"'),
    ({"soft_limit": "300MiB", "hard_limit": "200MiB"}, {}, "soft_limit=", "soft_limit="),
    ({"budget": "120%"}, {}, "budget='120%'", 'budget="'),
    ({"max_unavailable": 0}, {}, "max_unavailable=0", "max_unavailable=1"),
    ({"jitter": 2}, {}, "jitter=2", "jitter=0.1"),
    ({"sustain": "soon"}, {}, "sustain='soon'", "sustain=10"),
    ({"worker_oom_score_adj": -5}, {}, "worker_oom_score_adj=-5", "worker_oom_score_adj=300"),
    ({"headers": "too short"}, {}, "headers='***'", "headers=True"),
    ({}, {"OOMSAFE_SOFT_LIMIT": "300"}, "OOMSAFE_SOFT_LIMIT='300'", 'OOMSAFE_SOFT_LIMIT="300MiB"'),
    ({"soft_limt": "300MiB"}, {}, "soft_limt", "soft_limit"),
]


@pytest.mark.parametrize(("policy", "env", "said", "example"), BAD, ids=[bad[2] for bad in BAD])
def test_a_setting_that_cannot_be_right_is_one_line_and_no_start(serve, policy, env, said, example):
    """With the field, the value and an example that would be taken; no traceback."""
    gunicorn = serve(env=env, **policy)
    assert gunicorn.ended() == 1
    (line,) = gunicorn.log().splitlines()
    assert line.startswith("oomsafe: ")
    assert said in line
    assert example in line.replace(said, "", 1)


def test_an_unknown_variable_is_a_warning(serve):
    """It may be another version's: it is named, with what it may have meant, and gunicorn starts."""
    gunicorn = serve(env={"OOMSAFE_SOFT_LIMTI": "300MiB", "OOMSAFE_JITTER": "0"}, soft_limit="100MiB").serving()
    (line,) = gunicorn.lines("OOMSAFE_SOFT_LIMTI")
    assert "[WARNING]" in line
    assert "did you mean OOMSAFE_SOFT_LIMIT" in line
    assert gunicorn.get("/")[0] == 200


def test_a_soft_limit_above_the_machine_is_a_warning(serve):
    """One, with both figures; auto takes its place."""
    gunicorn = serve(soft_limit="100TiB").serving()
    (line,) = gunicorn.lines("above the effective limit")
    assert "[WARNING]" in line
    assert "soft_limit 100 TiB" in line
    assert "GiB" in line
    pool = gunicorn.pool()
    assert all(worker.figures.soft < pool.limit for worker in pool.workers)
    assert gunicorn.get("/")[0] == 200


@pytest.mark.parametrize("worker_class", CLASSES)
def test_a_soft_limit_below_what_a_worker_needs_at_boot_is_not_used(serve, worker_class):
    """One line for the whole pool, with both figures; it serves on, and nobody is ever recycled."""
    gunicorn = serve(worker_class, 3, soft_limit="5MiB", min_lifetime=0, settings="timeout = 4").serving(3)
    workers = set(gunicorn.workers())
    with Load(gunicorn, "/?") as load:
        until(lambda: load.served >= 300, "300 requests")
    until(lambda: gunicorn.pool().totals.work >= 300, "the figures are published")

    (line,) = gunicorn.lines("is not used")
    assert "[ERROR]" in line
    assert "soft limit 5.0 MiB" in line
    assert "needs" in line
    assert line.count("MiB") >= 3
    assert load.failed == []
    assert set(gunicorn.workers()) == workers
    assert sum(gunicorn.pool().totals.recycles) == 0


def test_an_app_that_needs_more_than_the_limit_for_its_first_work_is_not_recycled_for_ever(serve):
    """Three recycles of workers that grew no more after it, then one line, and the next serves on with a higher limit."""
    # long enough, on a busy machine, for a first request and for a second over the limit: who has been seen for less does not count
    gunicorn = serve("sync", 1, soft_limit="80MiB", min_lifetime=2.5).serving(1)

    def stays_after_another_request() -> bool:
        assert gunicorn.get("/fill?mib=84")[0] == 200
        return bool(gunicorn.lines("has settled at"))

    until(stays_after_another_request, "the limit is raised")
    worker = gunicorn.serving(1).workers()
    for _ in range(20):
        assert gunicorn.get("/fill?mib=84")[0] == 200
    assert gunicorn.workers() == worker
    assert len(gunicorn.lines(" recycling: ")) == 3
    assert len(gunicorn.lines("has settled at")) == 1
    assert gunicorn.lines("is not used") == []


def test_reuse_port_is_warned_of(serve):
    """Connections queued at a listener of a worker's own are lost when it ends, unless the kernel hands them on."""
    gunicorn = serve("sync", soft_limit="1GiB", settings="reuse_port = True")

    until(lambda: gunicorn.lines("oomsafe guards"), "it has started")
    if migrates_requests():
        assert gunicorn.lines("reuse_port") == []
    else:
        gunicorn.wait_for("set sysctl net.ipv4.tcp_migrate_req=1")
