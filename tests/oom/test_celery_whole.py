"""A container that dies whole takes innocent tasks with it: they get their result, and the one that did it comes to its end."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from celerying import CeleryWorker, Start
from hogs import ENOUGH, LIMIT, runs
from serving import until

from oomsafe.kernel.sandbox import Sandbox

CONF = {"imports": ["holding"]}


def kill_whole(sandbox: Sandbox) -> None:
    """What the kernel does to all others where memory.oom.group is set."""
    for pid in Path(sandbox.cgroup.path, "cgroup.procs").read_text().split():
        with suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


def lives(sandbox: Sandbox, node: CeleryWorker, ends: Callable[[], object], what: str) -> bool:
    """Wait until the kernel has killed in there, which is the end of all of it, or until `ends`: then it lives."""
    until(lambda: sandbox.cgroup.oom_kills() or ends(), what, 60)
    if ends():
        return True
    kill_whole(sandbox)
    node.process.wait(10)
    return False


def over(node: CeleryWorker, end: Path) -> list[str]:
    """Whether a task is given up. What waits for `end` comes to its end when one that is suspected waits to run alone."""
    if node.lines("it waits until all else here has ended, to run alone"):
        end.touch()
    return node.lines("is given up")


@pytest.mark.xdist_group("rabbitmq")
@pytest.mark.parametrize("first", [0, 100], ids=["nobody-had-grown", "one-had-grown"])
def test_only_the_one_that_did_it_is_given_up(cgroup: Any, celery: Start, tmp_path: Path, first: int) -> None:
    """Four tasks die with their container, and come again; the small ones come to their end, the other is run twice."""
    go, end, sent = tmp_path / "go", tmp_path / "end", []
    for life in (1, 2, 3):
        sandbox = cgroup(LIMIT)
        node = celery(
            "rabbitmq", soft_limit="290MiB", conf=CONF, queue=f"q-{tmp_path.name}", env=ENOUGH, argv=("-c", "4"), wrap=sandbox.command
        ).ready()
        if not sent:
            sent = node.ask(f"""
import holding
result = [holding.late.delay(number, {str(end)!r}).id for number in range(3)] + [holding.ruin.delay(3, {first}, {str(go)!r}).id]
""")
            all_noted = f"client = proj.app.backend.client; result = client.exists(*[f'oomsafe-run-{{one}}' for one in {sent!r}])"
            until(lambda node=node, all_noted=all_noted: node.ask(all_noted) == 4, "all are noted", 30)
            grown = "client = proj.app.backend.client; result = [client.get(key).decode() for key in client.keys('oomsafe-node-*')]"
            until(
                lambda node=node, grown=grown: not first or any("}]" in note and '": ' in note for note in node.ask(grown)), "it is noted"
            )
            go.touch()
        if lives(sandbox, node, lambda node=node: over(node, end), "its end"):
            break
        if life == 2:  # their second death, were they not kept apart
            end.touch()
    else:
        pytest.fail("three nodes have died")

    ended = node.ask(f"""
got = [(one, one.get(timeout=40, propagate=False)) for one in map(proj.app.AsyncResult, {sent!r})]
result = [[one.state, type(made).__name__, str(made)] for one, made in got]
""")
    assert ended[:3] == [["SUCCESS", "int", str(number)] for number in range(3)]
    assert ended[3][:2] == ["FAILURE", "WorkerOutOfMemory"]
    assert "killed for memory 2 times, max_oom_redeliveries=1; last: its whole node, while it ran" in ended[3][2]
    assert runs(node)["3"] == 2
    assert node.ask("result = [proj.good.delay(n).get(timeout=30) for n in range(5)]") == list(range(5))
    assert not node.lines("oomsafe failed in")


@pytest.mark.xdist_group("oom")
@pytest.mark.parametrize(
    ("broker", "task", "kills"), [("redis", "once_poison", 1), ("filesystem", "once_poison", 1), ("redis", "retries", 2)]
)
def test_deaths_end_with_an_end_of_its_own(cgroup: Any, celery: Start, tmp_path: Path, broker: str, task: str, kills: int) -> None:
    """An id that is used again, by the sender or by retry(), begins without the deaths of the runs that came to an end."""
    flag = tmp_path / "flag"
    node = celery(broker, soft_limit="290MiB", conf=CONF, env=ENOUGH, wrap=cgroup(LIMIT).command).ready()
    sending = f"""
import holding
result = holding.{task}.apply_async((1, {str(flag)!r}), task_id="one", countdown=0).get(timeout=60)
"""
    for _ in range(2):
        flag.touch()
        assert node.ask(f"{sending}\nproj.app.AsyncResult('one').forget()") == 1

    assert len(node.lines("exited with 'signal 9")) == 2 * kills
    assert not node.lines("is given up")
    assert not node.lines("oomsafe failed in")
