"""Tasks that the kernel kills among good ones, for the tests with real OOM kills in a memory cgroup."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

from celerying import CeleryWorker

from oomsafe.kernel.oom_kills import machine_kills
from oomsafe.kernel.sandbox import Sandbox

MIB = 1 << 20
LIMIT = 300 * MIB
#: Were a cgroup's limit to fail, a hog ends by itself here.
ENOUGH = {"ENOUGH_MIB": "500"}

MIXED = """
import random
bad = [proj.hog.si(number) for number in range({bad})]
every = bad + [proj.good.si(number) for number in range({good})]
random.Random(1).shuffle(every)
sent = [(one, one.apply_async()) for one in every]
ended = [(one.task, one.args[0], result.get(timeout={seconds}, propagate=False), result.state, result.id) for one, result in sent]
result = [
    sorted(value for task, number, value, state, task_id in ended if task == "proj.good"),
    [[number, state, type(value).__name__, str(value), task_id] for task, number, value, state, task_id in ended if task == "proj.hog"],
]
"""


def noted(node: CeleryWorker) -> list[tuple[str, int]]:
    """The runs that tasks have noted: each one's number, and its child's pid."""
    path = Path(node.env["RUNS"])
    words = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
    return [(number, int(pid)) for number, pid in words]


def runs(node: CeleryWorker) -> Counter[str]:
    """How often each task that notes its runs has begun, by its number."""
    return Counter(number for number, _ in noted(node))


def come_to_an_end(node: CeleryWorker, sandbox: Sandbox, bad: int, good: int, allowed: int) -> list[str]:
    """Send hogs among good tasks to a node inside of `sandbox`. Returns the hogs' ids.

    Asserts that each good one came to its end, and that each hog was run as often as it may and once more, and failed with its reason.
    """
    fine, ended = node.ask(MIXED.format(bad=bad, good=good, seconds=400), 400)

    assert fine == list(range(good))
    assert node.process.poll() is None
    assert [(state, kind) for _, state, kind, *_ in ended] == [("FAILURE", "WorkerOutOfMemory")] * bad
    assert all(f"killed for memory {allowed + 1} times" in text and "limit 300 MiB" in text for *_, text, _ in ended)
    assert runs(node) == {str(number): allowed + 1 for number in range(bad)}
    assert sandbox.cgroup.oom_kills() >= bad * (allowed + 1)
    assert len(node.lines("is given up")) == bad
    assert not node.lines("oomsafe failed in")
    return [task_id for *_, task_id in ended]


def kill_elsewhere(sandbox: Sandbox) -> None:
    """The kernel kills a process that is none of a node's, inside of `sandbox`: the machine's counter rises."""
    before = machine_kills() or 0
    ended = subprocess.run(sandbox.command([sys.executable, "-c", "b'x' * (200 << 20)"]), check=False)
    assert ended.returncode == -9
    assert (machine_kills() or 0) > before
