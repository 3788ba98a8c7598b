"""gunicorn's dirty workers: seen, scored, measured, and recycled between two actions. Real ones."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from clients import Load
from dirtying import dirty, dirty_arbiter, dirty_pool, dirty_workers
from serving import until
from versions import ends_dirty_workers


def score(pid: int) -> int:
    """A process's oom_score_adj."""
    return int(Path(f"/proc/{pid}/oom_score_adj").read_text())


def test_every_process_has_a_score_that_fits_what_it_is(serve):
    """Dirty workers above HTTP workers, those above the two arbiters; and `oomsafe status` shows both pools."""
    gunicorn = dirty(serve, 2)
    arbiter = dirty_arbiter(gunicorn)
    http = [pid for pid in gunicorn.workers() if pid != arbiter]

    assert score(arbiter) == score(gunicorn.pid)
    assert [score(pid) - score(gunicorn.pid) for pid in http] == [300, 300]
    assert [score(pid) - score(gunicorn.pid) for pid in dirty_workers(gunicorn)] == [400, 400]

    shown = subprocess.run([sys.executable, "-m", "oomsafe.cli", "status", "--json"], capture_output=True, text=True, check=True)
    pools = {pool["supervisor"]: pool for pool in json.loads(shown.stdout)["pools"]}
    assert pools[arbiter]["server"] == "gunicorn dirty"
    assert {worker["pid"] for worker in pools[arbiter]["workers"]} == set(dirty_workers(gunicorn))
    assert all(worker["figures"]["baseline"] > 60 << 20 for worker in pools[arbiter]["workers"])
    # neither pool counts the other's
    assert (pools[arbiter]["workers_wanted"], pools[gunicorn.pid]["workers_wanted"]) == (2, 2)
    assert {worker["pid"] for worker in pools[gunicorn.pid]["workers"]} == set(http)


def test_actions_are_counted_and_shown_in_flight(serve):
    """By the app and the action."""
    gunicorn = dirty(serve)
    asking = threading.Thread(target=gunicorn.get, args=("/dirty/act?seconds=1",))
    asking.start()
    until(lambda: [work.name for worker in dirty_pool(gunicorn).workers for work in worker.in_flight] == ["heavy:Heavy.act"], "it is seen")
    asking.join()
    until(lambda: dirty_pool(gunicorn).totals.work == 1, "it is counted")
    assert "heavy:Heavy.act" in dirty_pool(gunicorn).totals.routes


def test_any_worker_s_metrics_tell_of_the_dirty_pool_too(serve):
    """Under names of its own."""
    gunicorn = dirty(serve)
    gunicorn.get("/dirty/act")
    until(lambda: b'oomsafe_beside_work_total{pool="dirty"} 1.0' in gunicorn.get("/metrics")[2], "the action is counted")
    metrics = gunicorn.get("/metrics")[2].decode()
    (rss,) = re.findall(r'^oomsafe_worker_memory_bytes\{kind="rss",worker="dirty-0"\} (\S+)', metrics, re.MULTILINE)
    assert float(rss) > 60 << 20
    assert 'oomsafe_beside_recycles_total{pool="dirty",reason="soft_limit"} 0.0' in metrics
    assert 'oomsafe_workers{state="serving"} 2.0' in metrics


@pytest.mark.parametrize("surge", [True, False])
def test_it_is_recycled_under_load_without_losing_an_action(serve, surge):
    """Also where its replacement has to wait for its end: actions wait for it, too."""
    ends_dirty_workers()
    gunicorn = dirty(serve, 1, surge=surge)
    (first,) = dirty_workers(gunicorn)

    with Load(gunicorn, "/dirty/act?kib=1024&seconds=0.02") as load:
        gunicorn.wait_for(" recycling: ", times=2, seconds=60)
        until(lambda: first not in dirty_workers(gunicorn), "it has been replaced")

    assert load.failed == []
    assert load.served > 20
    until(lambda: [worker.state for worker in dirty_pool(gunicorn).workers] == ["serving"], "one serves")
    assert gunicorn.lines("oomsafe failed") == []
    assert gunicorn.serving(2).pool().totals.recycles[0] == 0


def test_a_long_action_is_not_cut_and_its_worker_serves_until_another_does(serve):
    """The one over its limit ends when its last action has ended; the new one has come to serve meanwhile."""
    ends_dirty_workers()
    gunicorn = dirty(serve)
    (old,) = dirty_workers(gunicorn)
    held = gunicorn.folder / "held"
    held.touch()
    assert gunicorn.get("/dirty/grow?mib=110")[2] == b"%d" % old
    gunicorn.wait_for("a dirty worker is held")
    assert gunicorn.get("/dirty/act")[2] == b"%d" % old
    answers: list[bytes] = []
    asking = threading.Thread(target=lambda: answers.append(gunicorn.get("/dirty/act?seconds=2")[2]))
    asking.start()
    until(lambda: any(worker.in_flight for worker in dirty_pool(gunicorn).workers), "it is in flight")

    held.unlink()

    until(lambda: gunicorn.get("/dirty/act")[2] != b"%d" % old, "another serves")
    asking.join()
    assert answers == [b"%d" % old]
    until(lambda: old not in dirty_workers(gunicorn), "the old one ends")
    assert len(dirty_workers(gunicorn)) == 1


def test_a_replacement_that_can_t_boot_leaves_the_old_one_serving(serve):
    """One try, a pause, and the number of workers as it was."""
    ends_dirty_workers()
    gunicorn = dirty(serve)
    (old,) = dirty_workers(gunicorn)
    broken = gunicorn.folder / "broken"
    broken.touch()
    gunicorn.get("/dirty/grow?mib=110")

    gunicorn.wait_for("a replacement died before it served")

    until(lambda: dirty_workers(gunicorn) == [old], "it is alone")
    assert gunicorn.get("/dirty/act")[2] == b"%d" % old
    broken.unlink()
    until(lambda: old not in dirty_workers(gunicorn), "the next try succeeds")
    assert int(gunicorn.get("/dirty/act")[2]) in dirty_workers(gunicorn)


def test_a_dirty_arbiter_that_is_killed_comes_back_guarded(serve):
    """The master brings up another; its pool has a scoreboard and scores of its own."""
    gunicorn = dirty(serve)
    first = dirty_arbiter(gunicorn)
    orphans = dirty_workers(gunicorn)
    os.kill(first, signal.SIGKILL)
    gunicorn.wait_for("Spawned dirty arbiter", times=2)
    until(lambda: [worker.state for worker in dirty_pool(gunicorn).workers] == ["serving"], "the new one serves")
    assert [score(pid) - score(gunicorn.pid) for pid in dirty_workers(gunicorn)] == [400]
    for pid in orphans:
        os.kill(pid, signal.SIGKILL)
