"""Celery's prefork pool: children are recycled between tasks, no result is lost, and MainProcess outlives every MemoryError."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from celerying import Start
from recycling_lines import recycling_line
from serving import until

MIB = 1 << 20
RECYCLING = recycling_line(r"[\d.]+ MiB", "tasks", r"proj\.leak", r"proj\.leak\[\S+\]")
#: Only one process of the tests starts a RabbitMQ.
RABBITMQ = pytest.param("rabbitmq", marks=pytest.mark.xdist_group("rabbitmq"))
BROKERS = ("redis", "filesystem", RABBITMQ)
LEAKING = """
results = [proj.leak.delay(number, {kib}) for number in range({tasks})]
result = [r.get(timeout=60) for r in results]
"""


@pytest.mark.parametrize("broker", BROKERS)
def test_leaking_children_are_recycled_between_tasks(celery: Start, broker: str) -> None:
    """Three recycles or more, each task's own result comes back, and the scoreboard tells the same as the log."""
    node = celery(broker, soft_limit="120MiB", min_lifetime=0).ready()

    results = node.ask(LEAKING.format(tasks=600, kib=1280), seconds=120)

    assert results == list(range(600))
    recycled = node.lines(" recycling: ")
    assert len(recycled) >= 3
    assert [line for line in recycled if not RECYCLING.search(line)] == []
    until(lambda: [worker.state for worker in node.pool().workers] == ["serving"] * 2, "two children serve again")
    # two children that meet at the list of names have one count its task under another, this once
    until(lambda: sum(sum(row[1:]) for row in node.pool().totals.routes.values()) == 600, "the scoreboard has counted every task")
    assert sum(node.pool().totals.routes["proj.leak"][1:]) > 590
    assert node.pool().totals.recycles[0] == len(node.lines(" recycling: "))
    assert node.process.poll() is None


@pytest.mark.parametrize("broker", ["redis", RABBITMQ])
def test_a_recycled_child_is_replaced_without_waiting_for_a_timer(celery: Start, broker: str) -> None:
    """The pipe by which Celery watches a child is closed before the child can be waited for. Here nothing but its end makes for another."""
    conf = {"imports": ["untimed"]}
    node = celery(broker, argv=("-c", "1"), conf=conf, soft_limit="120MiB", min_lifetime=0).ready()

    assert node.ask(LEAKING.format(tasks=80, kib=20 << 10), seconds=120) == list(range(80))

    assert len(node.lines(" recycling: ")) >= 10


@pytest.mark.parametrize("broker", ["redis", RABBITMQ])
def test_a_child_that_has_closed_its_pipes_is_replaced_at_its_end(celery: Start, broker: str) -> None:
    """As programs do that become daemons. The pipe's end says nothing of the child's, which goes on, and is replaced when it ends."""
    node = celery(broker, argv=("-c", "1"), conf={"imports": ["untimed"]}, soft_limit="1GiB").ready()

    before = node.ask("result = proj.lets_go.delay().get(timeout=30)")
    assert node.ask("result = proj.about.delay().get(timeout=30)[0]") == before
    os.kill(before, signal.SIGKILL)

    until(lambda: node.children() not in ([], [before]), "another is there")
    assert node.ask("result = proj.about.delay().get(timeout=30)[0]") != before


def test_a_child_s_last_task_is_counted(celery: Start) -> None:
    """With worker_max_tasks_per_child=1 each task is one, and what it grew its child by is counted, too."""
    node = celery(argv=("--max-tasks-per-child", "1"), soft_limit="1GiB").ready()

    assert node.ask(LEAKING.format(tasks=4, kib=2048)) == list(range(4))

    until(lambda: node.pool().totals.work == 4, "all are counted")
    routes = node.pool().totals.routes.values()  # two children that meet at the list of names count under another, this once
    assert sum(sum(row[1:]) for row in routes) == 4
    assert sum(row[0] for row in routes) > 6 * MIB


@pytest.mark.parametrize("broker", BROKERS)
def test_children_die_before_mainprocess(celery: Start, broker: str) -> None:
    """Each child's score is 300 above its parent's, and its name is one that the kernel's report can be matched by."""
    node = celery(broker, soft_limit="1GiB").ready()

    pid, score, comm = node.ask("result = proj.about.delay().get(timeout=30)")

    own = int(Path(f"/proc/{node.pid}/oom_score_adj").read_text())
    assert score == own + 300
    assert comm.startswith("oomsafe-w")
    assert pid in {worker.pid for worker in node.pool().workers}


@pytest.mark.parametrize("broker", ["redis", RABBITMQ])
@pytest.mark.parametrize("task", ["out_of_memory", "out_of_memory_late"])
def test_a_memory_error_is_the_task_s_own(celery: Start, broker: str, task: str) -> None:
    """Each way to run out is that task's failure, MainProcess lives, and the next task is served."""
    node = celery(broker, soft_limit="1GiB").ready()

    ended = node.ask(f"""
result = []
for how in ("plain", "subclass", "unpicklable", "chained", "real"):
    one = proj.{task}.delay(how)
    one.get(timeout=30, propagate=False)
    result.append([one.state, proj.leak.delay(7, 1).get(timeout=30)])
""")

    assert ended == [["FAILURE", 7]] * 5
    assert node.process.poll() is None


def test_a_memory_error_in_a_hook_of_a_task(celery: Start) -> None:
    """MainProcess lives, and the next task is served."""
    node = celery(soft_limit="1GiB").ready()

    node.ask("result = proj.out_of_memory_in_a_hook.delay('').id")

    assert node.ask("result = proj.leak.delay(7, 1).get(timeout=30)") == 7
    until(lambda: node.lines("in a hook"), "it has been said")
    assert node.ask("result = proj.leak.delay(8, 1).get(timeout=30)") == 8
    assert node.process.poll() is None


def test_a_limit_below_what_a_fork_starts_with_is_refused(celery: Start) -> None:
    """One line with both figures, and no endless recycling: children of a big parent start big."""
    node = celery(env={"BALLAST_MIB": "150"}, soft_limit="100MiB", min_lifetime=0).ready()

    assert node.ask(LEAKING.format(tasks=20, kib=64)) == list(range(20))

    assert len(node.lines("soft limit 100 MiB is not used: a worker needs ")) == 1
    assert node.lines(" recycling: ") == []


def test_auto_is_of_a_child_s_own_memory(celery: Start) -> None:
    """What a fork shares with its parent does not count: with the parent's ballast above the share, the limit still holds."""
    node = celery(env={"BALLAST_MIB": "150"}, budget="420MiB", min_lifetime=0).ready()

    assert node.ask(LEAKING.format(tasks=250, kib=1024)) == list(range(250))

    assert node.lines("is not used") == []
    assert any("private" in line for line in node.lines(" recycling: "))


def test_a_killed_child_gives_its_slot_back(celery: Start) -> None:
    """And another takes its place."""
    node = celery(soft_limit="1GiB").ready()
    until(lambda: len(node.pool().workers) == 2, "both are there")
    before = {worker.generation for worker in node.pool().workers}
    os.kill(node.pool().workers[0].pid, signal.SIGKILL)

    until(lambda: {w.generation for w in node.pool().workers} - before and len(node.pool().workers) == 2, "another is there")

    assert node.ask("result = proj.leak.delay(7, 1).get(timeout=30)") == 7


def test_a_bad_setting(celery: Start) -> None:
    """One line that names it, and the node does not start."""
    node = celery(soft_limit="300")

    assert node.process.wait(30) != 0

    assert node.lines("oomsafe: soft_limit='300'")
    assert node.lines('soft_limit="300MiB"')


def test_celery_s_own_setting_is_left_alone(celery: Start) -> None:
    """worker_max_memory_per_child goes on working, and is named in one line."""
    node = celery(soft_limit="1GiB", conf={"worker_max_memory_per_child": 500_000}).ready()

    assert len(node.lines("worker_max_memory_per_child=500000 is left alone")) == 1


@pytest.mark.parametrize("broker", ["redis", "filesystem"])
def test_connected_by_hand(celery: Start, broker: str) -> None:
    """Celery's own signal, without install(): each child's score is raised, it is recycled between two tasks, and no task is lost.

    What takes MainProcess is said once, whatever the number of children.
    """
    env = {"BY_HAND": "1", "OOMSAFE_SOFT_LIMIT": "90MiB", "OOMSAFE_MIN_LIFETIME": "0"}
    node = celery(broker, install=False, env=env).ready()
    _, score, _ = node.ask("result = proj.about.delay().get(timeout=30)")
    assert score >= int(Path(f"/proc/{node.pid}/oom_score_adj").read_text()) + 300

    # a life does about forty of them, or a hundred more while it waits for the other child's replacement
    assert node.ask(LEAKING.format(tasks=480, kib=1280), seconds=120) == list(range(480))

    recycled = node.lines(" recycling: ")
    assert len(recycled) >= 3
    assert [line for line in recycled if not RECYCLING.search(line)] == []
    assert len(node.lines("oomsafe guards each child by itself: soft limit 90.0 MiB")) == 1
    assert len(node.lines("] received")) == 481
    assert not node.lines("oomsafe failed")


def test_connected_by_hand_a_memory_error_is_the_task_s_own(celery: Start) -> None:
    """So it does not end MainProcess."""
    node = celery(install=False, env={"BY_HAND": "1"}).ready()

    asked = "one = proj.out_of_memory.delay('plain'); one.get(timeout=30, propagate=False); result = one.state"
    assert node.ask(asked) == "FAILURE"
    assert node.ask("result = proj.leak.delay(7, 1).get(timeout=30)") == 7
    assert node.process.poll() is None


def test_connected_by_hand_beside_install(celery: Start) -> None:
    """The signal changes nothing: the score is raised once."""
    node = celery(soft_limit="1GiB", env={"BY_HAND": "1"}).ready()

    _, score, comm = node.ask("result = proj.about.delay().get(timeout=30)")

    assert score == int(Path(f"/proc/{node.pid}/oom_score_adj").read_text()) + 300
    assert comm.startswith("oomsafe-w")
    assert not node.lines("by itself")


def test_connected_by_hand_where_there_is_no_child(celery: Start) -> None:
    """A solo node sends the signal, too: that nothing is measured there is said."""
    node = celery(install=False, argv=("-P", "solo"), env={"BY_HAND": "1"}).ready()

    assert node.lines("here nothing is measured: call oomsafe.celery.install(app)")


def test_other_pools_are_left_alone(celery: Start) -> None:
    """threads and solo serve as before."""
    node = celery(soft_limit="1GiB", argv=("-P", "threads")).ready()

    assert node.ask("result = proj.leak.delay(7, 1).get(timeout=30)") == 7


def test_a_node_tells_of_its_memory_and_recycles_when_asked(celery: Start) -> None:
    """`celery inspect memory` shows each child and the task that it runs; `celery control memory_recycle` ends the biggest one."""
    node = celery(soft_limit="1GiB").ready()
    assert node.ask(LEAKING.format(tasks=1, kib=50 << 10)) == [0]
    node.ask("result = proj.sleep.delay(9).id")

    def busy() -> list[dict[str, Any]]:
        (told,) = node.celery("inspect", "memory").values()
        return [child for child in told["children"] if child["in_flight"]] and told["children"]

    children = until(busy, "a task is in flight")
    assert sorted(child["pid"] for child in children) == sorted(worker.pid for worker in node.pool().workers)
    assert all(child["soft"] <= 1 << 30 and child["rss"] > MIB for child in children)
    assert any(work["task"].startswith("proj.sleep[") for child in children for work in child["in_flight"])

    biggest = max(node.pool().workers, key=lambda worker: worker.figures.anon or 0).pid
    (answer,) = node.celery("control", "memory_recycle").values()

    assert answer == {"ok": f"child {biggest} is recycled once its current task is done"}
    until(lambda: biggest not in node.children(), "it is gone")
    assert node.ask("result = proj.leak.delay(7, 1).get(timeout=30)") == 7


WATCHED = """
import time
client = proj.app.backend.client
client.config_set("slowlog-max-len", 100000)
client.config_set("slowlog-log-slower-than", 0)
{tasks}
end = time.monotonic() + 20
while client.keys("oomsafe-run-*") and time.monotonic() < end:
    time.sleep(0.05)
said = [entry["command"] for entry in client.slowlog_get(100000)]
result = [len(client.keys("oomsafe-run-*")), sorted(w.split()[0].decode() for w in said if b" oomsafe-run-" in w and b"KEYS" not in w)]
"""


def test_only_what_lasts_is_noted(celery: Start) -> None:
    """A task that may come again has a note in the backend while it runs, but two round trips are more than a short one takes."""
    node = celery("redis", soft_limit="1GiB").ready()
    short = "[one.get(timeout=20) for one in [proj.good.delay(number) for number in range(50)]]"

    assert node.ask(WATCHED.format(tasks=short)) == [0, []]

    assert node.ask(WATCHED.format(tasks="proj.slow.delay(1, 0.6).get(timeout=20)")) == [0, ["DEL", "SETEX"]]


@pytest.mark.parametrize("on", [True, False])
def test_what_main_process_has_loaded_stays_shared(celery: Start, on: bool) -> None:
    """MainProcess collects garbage before each fork (celery#2927): neither that nor a child's collection walks what is shared."""
    node = celery("filesystem", env={"BALLAST_MIB": "40"}, soft_limit="1GiB", freeze_preload=on).ready()

    frozen = node.ask("result = proj.frozen.delay().get(timeout=30)")

    assert (frozen > 10_000) is on
    assert bool(node.lines("stay shared with the workers")) is on
    assert bool(node.lines("freeze_preload is off")) is not on
