"""A node above its budget starts no new task: other nodes get them, and it goes on when it has given memory back."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from brokers import Redis
from celerying import CeleryWorker, Start
from needs import need
from serving import until

from oomsafe.kernel.sandbox import Sandbox

RABBITMQ = pytest.param("rabbitmq", marks=pytest.mark.xdist_group("rabbitmq"))
BROKERS = ("redis", "filesystem", RABBITMQ)
MIB = 1 << 20
CONF = {"imports": ["holding"]}
PAUSED = "the node starts no new task: it holds "
RESUMED = "the node starts tasks again: it holds "
LISTENING = """
from celery.events.state import State
state, seen = State(), []
def on(event):
    if event["type"] != "worker-memory":
        return
    state.event(dict(event))
    seen.append(event)
    receiver.should_stop = True
with proj.app.connection() as connection:
    receiver = proj.app.events.Receiver(connection, handlers={"*": on})
    receiver.capture(limit=None, timeout=15, wakeup=True)
result = seen[0], next(iter(state.workers))
"""


def send(node: CeleryWorker, task: str) -> str:
    """Its id."""
    sent: str = node.ask(f"import holding; result = {task}.id")
    return sent


def results(node: CeleryWorker, ids: list[str]) -> list[object]:
    """What they have returned; waits for it."""
    got: list[object] = node.ask(f"result = [proj.app.AsyncResult(i).get(timeout=30) for i in {ids!r}]")
    return got


class Paused(NamedTuple):
    """A node that has paused, both children busy: one holds 1 MiB until the file `small` is there, the other 400 until `big` is."""

    node: CeleryWorker
    small: Path
    big: Path
    busy: list[str]
    """The ids of these two, in this order."""
    prefetched: list[str]
    """The ids of four `holding.pid` besides, which it holds back."""


@pytest.fixture
def paused(celery: Start, tmp_path: Path) -> Callable[..., Paused]:
    """paused(broker, queue=...)"""

    def start(broker: str, **options: Any) -> Paused:
        go, small, big = (tmp_path / name for name in ("go", "small", "big"))
        node = celery(broker, conf=CONF, budget="400MiB", soft_limit="1GiB", **options).ready()
        busy = [send(node, f"holding.hold.delay({str(go)!r}, {mib}, {str(end)!r})") for mib, end in ((1, small), (400, big))]
        sent = node.ask("import holding; result = [holding.pid.delay().id for _ in range(4)]")
        until(lambda: len(node.lines("Task holding.pid[")) == 4, "they are prefetched")
        go.touch()
        until(lambda: node.lines(PAUSED), "it pauses", 12)
        return Paused(node, small, big, busy, sent)

    return start


@pytest.mark.parametrize("broker", BROKERS)
def test_tasks_stay_in_the_broker_for_other_nodes(celery: Start, tmp_path: Path, broker: str) -> None:
    """Above its budget it consumes nothing, another node does all the work; when its memory is given back, it consumes again."""
    end = tmp_path / "end"
    node = celery(broker, conf=CONF, queue=f"q-{tmp_path.name}-{broker}", budget="400MiB", soft_limit="1GiB").ready()
    held = send(node, f"holding.hold.delay('/', 400, {str(end)!r})")
    until(lambda: node.lines(PAUSED), "it pauses", 12)

    other = celery(broker, conf=CONF, queue=f"q-{tmp_path.name}-{broker}", argv=("-n", "other@%h"), soft_limit="1GiB").ready()
    sent = node.ask("import holding; result = [holding.pid.delay().id for _ in range(20)]")
    assert results(node, sent) == [other.pid] * 20
    other.end()

    waiting = node.ask("import holding; result = [holding.pid.delay().id for _ in range(20)]")
    # it answers, and has heard of nothing
    assert not any(task["name"] == "holding.pid" for tasks in node.celery("inspect", "reserved").values() for task in tasks)
    assert not node.lines("holding.pid[")
    end.touch()

    assert results(node, [held, *waiting]) == [400, *[node.pid] * 20]
    assert len(node.lines(PAUSED)) == len(node.lines(RESUMED)) == 1


@pytest.mark.parametrize("broker", ["redis", RABBITMQ])
def test_what_it_has_prefetched_is_held_back(paused: Callable[..., Paused], broker: str) -> None:
    """A child that is free starts none of it until there is memory again; nothing of it is lost."""
    node, small, big, busy, sent = paused(broker)

    small.touch()
    assert results(node, busy[:1]) == [1]
    reserved = [task["id"] for tasks in node.celery("inspect", "reserved").values() for task in tasks]
    assert set(sent) <= set(reserved)
    assert node.lines("holding.pid[") == node.lines("received")[2:]

    big.touch()
    assert results(node, [*busy[1:], *sent]) == [400, *[node.pid] * 4]


@pytest.mark.parametrize("broker", ["redis", RABBITMQ])
def test_what_it_holds_back_when_it_ends_is_the_next_node_s(
    celery: Start, paused: Callable[..., Paused], tmp_path: Path, broker: str
) -> None:
    """A warm shutdown while it has paused: what runs ends, the rest goes back to the broker, and runs once."""
    queue = f"q-ends-{tmp_path.name}-{broker}"
    node, small, big, busy, sent = paused(broker, queue=queue)

    node.process.terminate()
    until(lambda: node.lines("Warm shutdown"), "it ends")
    small.touch()
    big.touch()
    assert node.process.wait(30) == 0
    following = celery(broker, conf=CONF, queue=queue, soft_limit="1GiB").ready()

    assert results(following, [*busy, *sent]) == [1, 400, *[following.pid] * 4]
    assert len(following.lines("holding.pid[")) == 2 * 4


def test_it_stays_paused_when_its_connection_is_lost(paused: Callable[..., Paused], redis: Redis) -> None:
    """What it had held back comes again with the new connection, is held again, and runs once."""
    node, small, big, busy, sent = paused("redis")
    small.touch()
    assert results(node, busy[:1]) == [1]

    node.ask(f"import redis; result = redis.Redis(port={redis.port}).execute_command('CLIENT KILL TYPE normal')")
    until(lambda: len(node.lines("Connected to redis")) == 2, "it is connected again")
    assert node.celery("inspect", "ping")
    assert [line for line in node.lines("holding.pid[") if "succeeded" in line] == []

    big.touch()
    assert results(node, [*busy[1:], *sent]) == [400, *[node.pid] * 4]
    assert len([line for line in node.lines("holding.pid[") if "succeeded" in line]) == 4


@pytest.mark.parametrize("broker", ["redis", "filesystem"])
def test_the_biggest_idle_child_is_recycled_first(celery: Start, tmp_path: Path, broker: str) -> None:
    """It has what the node must give back; the other one stays."""
    end = tmp_path / "end"
    node = celery(broker, conf=CONF, budget="400MiB", soft_limit="1GiB").ready()
    sent = [send(node, f"holding.keep.delay({mib}, {str(end)!r})") for mib in (120, 300)]
    until(lambda: node.lines(PAUSED), "it pauses", 12)
    end.touch()
    smaller, bigger = results(node, sent)

    until(lambda: node.lines(RESUMED), "it goes on")
    assert re.findall(r"its biggest idle child, (\d+) ", node.log()) == [str(bigger)]
    until(lambda: len(node.pool().workers) == 2, "another is there")
    assert smaller in node.children()
    assert results(node, [send(node, "holding.pid.delay()")]) == [node.pid]


def test_a_child_that_has_grown_before_the_first_look_at_it(celery: Start, tmp_path: Path) -> None:
    """It has memory to give back all the same: what it held right after boot is known from itself."""
    end, queue = tmp_path / "end", f"q-early-{tmp_path.name}"
    first = celery("redis", conf=CONF, queue=queue).ready()
    assert first.celery("control", "cancel_consumer", queue)
    sent = [send(first, f"holding.keep.delay({mib}, {str(end)!r})") for mib in (120, 300)]
    first.process.terminate()
    assert first.process.wait(30) == 0
    end.touch()

    node = celery("redis", conf=CONF, queue=queue, budget="400MiB", soft_limit="1GiB").ready()
    results(node, sent)

    until(lambda: node.lines(PAUSED), "it pauses", 12)
    until(lambda: node.lines(RESUMED), "it goes on")
    assert len(node.lines("its biggest idle child, ")) == 1


def test_a_budget_that_can_t_be_kept(celery: Start) -> None:
    """A node that is above it with nothing to do says so once, and goes on: it would wait for ever."""
    node = celery(conf=CONF, budget="20MiB", soft_limit="1GiB").ready()
    until(lambda: node.lines(PAUSED), "it pauses", 12)

    assert results(node, [send(node, "holding.pid.delay()")]) == [node.pid]

    assert len(node.lines("no child has any of it to give back: it goes on; raise budget, or start fewer children")) == 1


def test_a_node_tells_of_the_task_in_flight_and_its_growth(celery: Start, tmp_path: Path) -> None:
    """To `celery inspect memory` while the task runs, and to monitors while events are on."""
    end = tmp_path / "end"
    node = celery(conf=CONF, argv=("-E",), soft_limit="1GiB").ready()
    held = send(node, f"holding.hold.delay('/', 100, {str(end)!r})")

    def busy() -> list[dict[str, Any]]:
        (told,) = node.celery("inspect", "memory").values()
        assert (told["paused"], told["children_left_out"]) == (False, 0)
        return [work for child in told["children"] for work in child["in_flight"] if (work["growth"] or 0) > 90 * MIB]

    (work,) = until(busy, "it is told")
    assert work["task"].startswith("holding.hold[")
    assert work["growth"] < 130 * MIB

    event, worker = node.ask(LISTENING)
    (grown,) = [work["growth"] for child in event["children"] for work in child["in_flight"]]
    assert 90 * MIB < grown < 130 * MIB
    assert {child["pid"] for child in event["children"]} == set(node.children())
    assert event["working_set"] > 100 * MIB
    assert not event["paused"]
    assert worker == event["hostname"]
    end.touch()
    assert results(node, [held]) == [100]


def test_what_its_processes_share_counts_once(celery: Start) -> None:
    """Three processes of 200 MiB that share 150 of them are not 600."""
    node = celery(env={"BALLAST_MIB": "150"}, budget="400MiB", soft_limit="1GiB").ready()
    assert node.ask("result = [proj.leak.delay(n, 1).get(timeout=30) for n in range(4)]") == [0, 1, 2, 3]

    def looked() -> dict[str, Any]:
        (told,) = node.celery("inspect", "memory").values()
        return told["working_set"] and told

    told = until(looked, "it has looked")
    assert sum(child["rss"] for child in told["children"]) > 300 * MIB
    assert 150 * MIB < told["working_set"] < 350 * MIB
    assert not told["paused"]
    assert node.lines(PAUSED) == []


def test_in_a_cgroup_its_working_set_counts(celery: Start, tmp_path: Path) -> None:
    """The kernel kills by that, so a share of its limit is what the node keeps to."""
    end = tmp_path / "end"
    with ExitStack() as stack:
        try:
            box = stack.enter_context(Sandbox(f"oomsafe-test-{os.getpid()}-node", 600 * MIB))
        except OSError as error:
            need(False, f"a memory cgroup can't be made: {error}")
        node = celery(conf=CONF, budget="50%", soft_limit="500MiB").ready()
        stack.callback(node.end)
        for pid in (node.pid, *node.children()):
            (Path(box.cgroup.path) / "cgroup.procs").write_text(str(pid))
        held = send(node, f"holding.hold.delay('/', 400, {str(end)!r})")

        (line,) = until(lambda: node.lines(PAUSED), "it pauses", 12)
        end.touch()

        assert "its budget is 300 MiB; it goes on below 285 MiB" in line
        until(lambda: node.lines(RESUMED), "it goes on")
        assert results(node, [held]) == [400]


def test_a_pool_that_grows(celery: Start) -> None:
    """Beyond the slots that its scoreboard had: all are seen, share what there is, and have their tasks stopped; when it shrinks, too."""
    node = celery(argv=("-c", "2"), metric="rss").ready()
    two = until(lambda: softs(node, 2), "two children share the budget")

    node.celery("control", "pool_grow", "31")
    more = until(lambda: softs(node, 33), "all 33 are on the scoreboard, and share it", 40)
    node.celery("control", "pool_shrink", "30")  # those that were there first
    three = until(lambda: softs(node, 3), "three are left, and have more again")
    over = "proj.whole.apply_async((0, 20), headers={'memory_limit': '20MiB'})"  # which each child has already
    ended = node.ask(f"result = [type(one.get(timeout=60, propagate=False)).__name__ for one in [{over} for _ in range(3)]]")

    assert max(more) < min(two) / 10
    assert min(three) > max(more) * 5
    assert ended == ["MemoryLimitExceeded"] * 3
    assert not node.lines("not seen by the pool")


def softs(node: CeleryWorker, workers: int) -> list[int]:
    """The soft limits of all children, once so many serve and have been told how many they are; else nothing."""
    view = node.pool()
    found = [worker.figures.soft for worker in view.workers if worker.state == "serving"]
    share = (view.budget or 0) / workers
    told = [soft for soft in found if soft is not None and soft < share and soft > share / 2]
    return told if len(found) == len(told) == workers == view.workers_wanted else []
