"""Ends that are no deaths for memory: time limits, shutdowns, lost connections, each while the kernel really kills something else."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from brokers import Redis
from celerying import CeleryWorker, Start
from hogs import LIMIT, MIB, kill_elsewhere, noted, runs
from relay import Relay
from serving import until

RABBITMQ = pytest.param("rabbitmq", marks=pytest.mark.xdist_group("rabbitmq"))
BROKERS = ("redis", RABBITMQ)
#: No death for memory is forgiven: one that is counted ends the task.
SHARP = {"conf": {"imports": ["holding"]}, "soft_limit": "1GiB", "max_oom_redeliveries": 0}


@pytest.fixture
def kill(cgroup: Any) -> Any:
    """kill(): the kernel kills a process somewhere else on the machine."""
    sandbox = cgroup(64 * MIB)
    return lambda: kill_elsewhere(sandbox)


@pytest.fixture
def relays(redis: Redis, request: pytest.FixtureRequest) -> Iterator[Any]:
    """relays(broker): a relay to it, and the broker's address through the relay."""
    made: list[Relay] = []

    def make(broker: str) -> tuple[Relay, str]:
        server = redis if broker == "redis" else request.getfixturevalue("rabbitmq")
        url = redis.url(0) if broker == "redis" else server.url
        made.append(Relay(server.port))
        return made[-1], url.replace(str(server.port), str(made[-1].port))

    yield make
    for relay in made:
        relay.close()


def contained(command: list[str]) -> list[str]:
    """In a namespace where pids mean something else."""
    return ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", *command]


def send(node: CeleryWorker, task: str, *args: object, **options: object) -> str:
    """Its id."""
    sent: str = node.ask(f"import holding; result = holding.{task}.apply_async({args!r}, **{options!r}).id")
    return sent


def ended(node: CeleryWorker, task_id: str) -> list[str]:
    """Its state, and the kind and the text of what it has made."""
    got: list[str] = node.ask(f"""
one = proj.app.AsyncResult({task_id!r})
made = one.get(timeout=40, propagate=False)
result = [one.state, type(made).__name__, str(made)]
""")
    return got


def replaced(node: CeleryWorker) -> bool:
    """Whether MainProcess has seen the end of all children that have noted a run, and has others."""
    serving = {worker.pid for worker in node.pool().workers}
    return len(serving) == 2 and serving.isdisjoint({pid for _, pid in noted(node)})


@pytest.mark.parametrize("task", ["late", "stubborn"])
def test_a_time_limit_is_none_of_the_kernel_s(cgroup: Any, celery: Start, task: str) -> None:
    """Celery's own TimeLimitExceeded, whichever signal it takes, and nothing of memory is said."""
    node = celery(**{**SHARP, "soft_limit": "290MiB"}, wrap=cgroup(LIMIT).command).ready()
    one = send(node, task, 1, "/never", time_limit=1)

    assert ended(node, one)[:2] == ["FAILURE", "TimeLimitExceeded"]
    until(lambda: replaced(node), "its child is replaced")

    assert ended(node, one)[:2] == ["FAILURE", "TimeLimitExceeded"]
    assert runs(node) == {"1": 1}
    assert not node.lines("OOM killer")
    assert not node.lines("is given up")
    assert not node.lines("oomsafe failed in")


def test_a_time_limit_while_the_kernel_kills_another_child(cgroup: Any, celery: Start, tmp_path: Path) -> None:
    """Both children are gone at once by SIGKILL: one is the time limit's, so the counter covers the other for sure."""
    go, here = tmp_path / "go", tmp_path / "here"
    here.touch()
    sandbox = cgroup(LIMIT)
    node = celery(**{**SHARP, "soft_limit": "290MiB"}, wrap=sandbox.command).ready()
    # a client is a process, which takes seconds to start on a busy machine, and all three are to come before the time is up
    slow = send(node, "stubborn", 1, "/never", time_limit=15)
    until(lambda: runs(node) == {"1": 1}, "it runs")
    ended(node, send(node, "keep", 150, str(here)))  # in the only other child
    big = send(node, "hold", str(go), 150, "/never")

    until(lambda: node.lines("Hard time limit (15s) exceeded"), "its time is up")
    go.touch()

    state, kind, text = ended(node, big)
    until(lambda: replaced(node), "they are replaced")
    assert (state, kind) == ("FAILURE", "WorkerOutOfMemory")
    assert "(confirmed)" in text
    assert sandbox.cgroup.oom_kills() == 1
    assert ended(node, slow)[:2] == ["FAILURE", "TimeLimitExceeded"]
    assert not [line for line in node.lines("OOM killer") if "holding.stubborn" in line]
    assert not node.lines("is given up")


def test_a_time_limit_does_not_count(celery: Start, kill: Any, tmp_path: Path) -> None:
    """A task that comes again after its time limit comes again each time."""
    end = tmp_path / "end"
    conf = {**SHARP["conf"], "task_acks_on_failure_or_timeout": False}
    node = celery(**{**SHARP, "conf": conf}, argv=("-c", "1")).ready()
    one = send(node, "stubborn", 1, str(end), time_limit=3)
    for run in (1, 2, 3):
        until(lambda run=run: runs(node)["1"] == run, "it runs")
        kill()
    end.touch()

    until(lambda: [line for line in node.lines("holding.stubborn[") if "succeeded" in line], "it has come to its end")
    assert ended(node, one) == ["SUCCESS", "int", "1"]
    assert not node.lines("is given up")


@pytest.mark.parametrize("broker", BROKERS)
@pytest.mark.parametrize("task", ["late", "curt"])
def test_a_cold_shutdown_does_not_count(celery: Start, kill: Any, tmp_path: Path, broker: str, task: str) -> None:
    """Three of them, each while the task runs: it comes again each time, and succeeds."""
    end, queue, one = tmp_path / "end", f"q-cold-{tmp_path.name}", ""
    for life in (1, 2, 3):
        node = celery(broker, **SHARP, queue=queue, argv=("-c", "1")).ready()
        one = one or send(node, task, 1, str(end))
        until(lambda life=life, node=node: runs(node)["1"] == life, "it runs")
        kill()
        node.process.send_signal(signal.SIGQUIT)
        node.process.wait(30)
        assert node.lines("Cold shutdown (MainProcess)")
        assert not node.lines("oomsafe failed in")
    end.touch()
    node = celery(broker, **SHARP, queue=queue, argv=("-c", "1")).ready()

    assert ended(node, one) == ["SUCCESS", "int", "1"]
    assert runs(node) == {"1": 4}
    assert not node.lines("is given up")


@pytest.mark.parametrize("broker", BROKERS)
def test_a_warm_shutdown_does_not_count(celery: Start, kill: Any, tmp_path: Path, broker: str) -> None:
    """What runs comes to its end; what was prefetched comes again, three times, and succeeds as well."""
    queue, sent = f"q-warm-{tmp_path.name}", []
    for life in (1, 2, 3):
        node = celery(broker, **SHARP, queue=queue, argv=("-c", "1")).ready()
        sent = sent or [send(node, "late", number, str(tmp_path / f"end-{number}")) for number in (1, 2, 3, 4)]
        until(lambda life=life, node=node: sum(runs(node).values()) == life, "one runs")
        until(lambda life=life, node=node: len(node.lines("Task holding.late[")) == 5 - life, "the rest is prefetched")
        kill()
        node.process.terminate()
        until(lambda node=node: node.lines("Warm shutdown (MainProcess)"), "it ends")
        (tmp_path / f"end-{noted(node)[-1][0]}").touch()
        node.process.wait(30)
    for number in (1, 2, 3, 4):
        (tmp_path / f"end-{number}").touch()
    node = celery(broker, **SHARP, queue=queue, argv=("-c", "1")).ready()

    assert [ended(node, one) for one in sent] == [["SUCCESS", "int", str(number)] for number in (1, 2, 3, 4)]
    assert runs(node) == dict.fromkeys("1234", 1)
    assert not node.lines("is given up")


@pytest.mark.xdist_group("rabbitmq")
@pytest.mark.parametrize(
    ("how", "task", "says"),
    [(signal.SIGTERM, "late", "Warm shutdown (MainProcess)"), (signal.SIGQUIT, "stubborn", "again will terminate all running tasks")],
    ids=["warm", "cold"],
)
def test_a_shutdown_that_is_cut_short_does_not_count(
    celery: Start, kill: Any, tmp_path: Path, how: signal.Signals, task: str, says: str
) -> None:
    """Who asked for it kills the whole node when its patience is at its end: for the task that is no death for memory."""
    end, queue, one = tmp_path / "end", f"q-short-{tmp_path.name}", ""
    for life in (1, 2):
        node = celery("rabbitmq", **SHARP, queue=queue, argv=("-c", "1")).ready()
        one = one or send(node, task, 1, str(end))
        until(lambda life=life, node=node: runs(node)["1"] == life, "it runs")
        noted_run = f"result = proj.app.backend.client.exists('oomsafe-run-{one}')"
        until(lambda node=node, noted_run=noted_run: node.ask(noted_run), "it is noted")
        kill()
        node.process.send_signal(how)
        until(lambda node=node: node.lines(says), "it ends")
        until(lambda node=node, noted_run=noted_run: not node.ask(noted_run), "it is noted no more")
        node.process.kill()
        node.process.wait(30)
    end.touch()
    node = celery("rabbitmq", **SHARP, queue=queue, argv=("-c", "1")).ready()

    assert ended(node, one) == ["SUCCESS", "int", "1"]
    assert not node.lines("is given up")


@pytest.mark.parametrize("broker", BROKERS)
def test_a_lost_connection_does_not_count(celery: Start, kill: Any, relays: Any, tmp_path: Path, broker: str) -> None:
    """Lost three times while the task runs: it runs again beside itself each time, and succeeds."""
    end = tmp_path / "end"
    relay, url = relays(broker)
    node = celery(broker, **SHARP, env={"BROKER": url}, argv=("-c", "4")).ready()
    one = send(node, "late", 1, str(end))
    for run in (1, 2, 3):
        until(lambda run=run: runs(node)["1"] == run, "it runs")
        kill()
        relay.cut()
    until(lambda: runs(node)["1"] == 4, "it runs")
    end.touch()

    assert ended(node, one) == ["SUCCESS", "int", "1"]
    assert len(node.lines("Connection to broker lost")) == 3
    assert not node.lines("is given up")
    assert not node.lines("oomsafe failed in")


@pytest.mark.xdist_group("rabbitmq")
def test_a_lost_connection_does_not_count_elsewhere(celery: Start, kill: Any, relays: Any, tmp_path: Path) -> None:
    """A node that can't see whether the first one lives, as from another container, is handed its task."""
    end, queue = tmp_path / "end", f"q-lost-{tmp_path.name}"
    relay, url = relays("rabbitmq")
    first = celery("rabbitmq", **SHARP, env={"BROKER": url}, queue=queue, argv=("-c", "1"), wrap=contained).ready()
    one = send(first, "late", 1, str(end))
    until(lambda: runs(first)["1"] == 1, "it runs")
    kill()
    relay.cut(for_good=True)
    until(lambda: first.lines("Cannot connect to amqp"), "it has noticed")

    other = celery("rabbitmq", **SHARP, queue=queue, argv=("-c", "1", "-n", "other@%h")).ready()
    until(lambda: runs(other)["1"] == 2 or other.lines("is given up"), "it is handed to the other one")
    end.touch()

    assert ended(other, one) == ["SUCCESS", "int", "1"]
    assert not other.lines("is given up")
    first.process.kill()
