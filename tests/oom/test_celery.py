"""The kernel kills children of Celery's pool: the result says so, and no task kills for ever. Real kills in a real memory cgroup."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from brokers import Redis
from celerying import Start
from hogs import ENOUGH, LIMIT, MIB, come_to_an_end, noted, runs
from needs import need
from redis import Redis as Backend
from serving import until

pytestmark = pytest.mark.xdist_group("oom")


@pytest.mark.parametrize(("broker", "bad", "good", "allowed"), [("redis", 50, 500, 1), ("filesystem", 5, 50, 1), ("redis", 5, 50, 0)])
def test_a_poison_task_comes_to_an_end(cgroup: Any, celery: Start, broker: str, bad: int, good: int, allowed: int) -> None:
    """Each hog is run as often as it may and once more, and fails with its reason; all good ones come to their end."""
    sandbox = cgroup(LIMIT)
    node = celery(broker, soft_limit="290MiB", max_oom_redeliveries=allowed, env=ENOUGH, wrap=sandbox.command).ready()

    come_to_an_end(node, sandbox, bad, good, allowed)


@pytest.mark.parametrize("broker", ["redis", "filesystem"])
def test_the_result_says_that_it_was_the_kernel(cgroup: Any, celery: Start, broker: str) -> None:
    """With the task, what it held, the limit and how sure that is; without acks_late it runs once."""
    node = celery(broker, soft_limit="290MiB", env=ENOUGH, wrap=cgroup(LIMIT).command).ready()

    state, kind, text = node.ask("""
one = proj.hog_early.delay(1)
error = one.get(timeout=60, propagate=False)
result = [one.state, type(error).__name__, str(error)]
""")

    assert (state, kind) == ("FAILURE", "WorkerOutOfMemory")
    assert text.startswith("task proj.hog_early[")
    assert "the kernel's OOM killer took its child" in text
    assert "(confirmed): rss " in text
    assert "limit 300 MiB (cgroup v" in text
    assert "when last seen" in text
    assert "rss unknown" not in text
    assert runs(node) == {"1": 1}
    (told,) = node.celery("inspect", "memory").values()
    assert told["deaths"] == {"oom_confirmed": 1}
    (death,) = told["last_deaths"]
    assert (death["task"], death["verdict"], death["pid"]) == ("proj.hog_early", "oom_confirmed", noted(node)[-1][1])
    assert f"task proj.hog_early[{death['id']}]" in text
    assert 10 * MIB < death["rss"] <= LIMIT


def test_a_program_of_a_task_that_the_kernel_kills_is_told_of(cgroup: Any, celery: Start, tmp_path: Path) -> None:
    """It is no child of the node's: the task goes on, nobody else is blamed, and a line says what ran."""
    node = celery(soft_limit="290MiB", env=ENOUGH, wrap=cgroup(LIMIT).command).ready()

    ended = node.ask(f"result = proj.program_without_limits.delay(400, {str(tmp_path / 'pid')!r}).get(timeout=60)")

    assert ended == -signal.SIGKILL
    (line,) = until(lambda: node.lines("that were no child of this node"), "it is told")
    assert "the kernel's OOM killer took 1 of this cgroup's processes" in line
    assert line.endswith("; then ran proj.program_without_limits")
    assert not node.lines("took its child")


def test_an_operator_s_kill_is_none_of_the_kernel_s(celery: Start) -> None:
    """Celery's own WorkerLostError; and a late task that is killed so again and again comes again each time."""
    node = celery(soft_limit="1GiB", argv=("-c", "1")).ready()
    node.ask("result = proj.slow.delay(1, 4).id")
    for kill in range(1, 4):
        pid = until(lambda kill=kill: runs(node)["1"] == kill and noted(node)[-1][1], "it runs")
        os.kill(pid, signal.SIGKILL)
    until(
        lambda: node.lines("proj.slow[") and any("succeeded" in line for line in node.lines("Task proj.slow[")),
        "it has come to its end",
        40,
    )

    assert runs(node) == {"1": 4}
    assert not node.lines("is given up")
    assert not node.lines("OOM killer")


def test_a_revoke_is_none_of_the_kernel_s(celery: Start) -> None:
    """Though it kills with the same signal."""
    node = celery(soft_limit="1GiB").ready()

    kind = node.ask("""
import pathlib, os, time
one = proj.slow.delay(1, 60)
while not pathlib.Path(os.environ["RUNS"]).exists():
    time.sleep(0.05)
one.revoke(terminate=True, signal="SIGKILL")
try:
    one.get(timeout=30)
except Exception as error:
    result = type(error).__name__
""")

    assert kind == "TaskRevokedError"
    assert not node.lines("OOM killer")


def test_the_count_outlives_the_node(cgroup: Any, celery: Start, tmp_path: Path) -> None:
    """The kernel kills while MainProcess can't say so, and then that is killed as well: twice, and the third node refuses the task."""
    conf = {"task_default_queue": f"whole-{os.getpid()}", "broker_transport_options": {"visibility_timeout": 2}}
    first = None
    for death in (1, 2):
        sandbox = cgroup(LIMIT)
        # each is a container of its own: nothing but the result backend is there for all of them
        state = {"OOMSAFE_STATE": str(tmp_path / f"state-{death}")}
        node = celery(soft_limit="290MiB", env={**ENOUGH, **state}, conf=conf, wrap=sandbox.command, argv=("-c", "1")).ready()
        first = first or node.ask("result = proj.hog.delay(1, 40).id")
        until(lambda node=node, death=death: runs(node)["1"] == death, "it runs", 60)
        # not by a process of its own: before that has started, the kernel may have killed
        backend = Backend.from_url(node.env["BACKEND"])
        until(lambda backend=backend, first=first: backend.exists(f"oomsafe-run-{first}"), "it is noted")
        os.kill(node.pid, signal.SIGSTOP)
        until(lambda sandbox=sandbox: sandbox.cgroup.oom_kills(), "the kernel has killed its child", 60)
        os.kill(node.pid, signal.SIGKILL)
        node.process.wait(10)
    node = celery(soft_limit="290MiB", env=ENOUGH, conf=conf, argv=("-c", "1")).ready()

    kind, text = node.ask(
        f"""
from celery.result import AsyncResult
error = AsyncResult({first!r}, app=proj.app).get(timeout=60, propagate=False)
result = [type(error).__name__, str(error)]
""",
        90,
    )

    assert kind == "WorkerOutOfMemory"
    assert "killed for memory 2 times, max_oom_redeliveries=1; last: its whole node, while it ran" in text
    assert runs(node) == {"1": 2}
    assert node.ask("result = proj.good.delay(7).get(timeout=30)") == 7


def test_a_backend_that_is_down(cgroup: Any, celery: Start, tmp_path: Path) -> None:
    """The count goes on in a local file, and nothing is lost."""
    need(os.path.exists("/usr/bin/redis-server"), "redis-server is not installed")
    (tmp_path / "backend").mkdir()
    backend = Redis(tmp_path / "backend")
    env = {**ENOUGH, "BACKEND": backend.url(0)}
    conf = {"result_backend_transport_options": {"retry_policy": {"max_retries": 0}}}
    node = celery(soft_limit="290MiB", env=env, conf=conf, wrap=cgroup(LIMIT).command).ready()
    assert node.ask("result = proj.good.delay(7).get(timeout=30)") == 7

    backend.end()
    node.ask("result = [proj.hog.apply_async((number,), ignore_result=True).id for number in range(3)] and 0")

    until(lambda: len(node.lines("is given up")) == 3, "all are given up", 120)
    assert runs(node) == {"0": 2, "1": 2, "2": 2}
    assert node.lines("the result backend can't keep how often a task was killed")
    assert node.process.poll() is None
