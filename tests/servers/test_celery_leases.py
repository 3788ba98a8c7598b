"""Nodes on machines that can't see each other: a task that runs is not dead, however often its message comes again."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from celerying import CeleryWorker, Start
from hogs import runs
from needs import need
from serving import until

#: Its own pids, and another boot id.
ELSEWHERE = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c"]
BOOT = 'mount --bind "$0" /proc/sys/kernel/random/boot_id && exec "$@"'
#: Seconds; it is the broker's patience that is too short, so all of it comes again while it runs.
LEASE, VISIBLE = 4, 5


@pytest.fixture
def machine(tmp_path: Path, celery: Start) -> Iterator[Callable[..., CeleryWorker]]:
    """machine("a"): a node on a machine of its own; no death for memory is forgiven: one that is counted ends the task."""
    probe = tmp_path / "probe"
    probe.write_text("probe\n")
    made = os.geteuid() == 0 and subprocess.run([*ELSEWHERE, BOOT, str(probe), "true"], capture_output=True, check=False).returncode == 0
    need(made, "no namespaces can be made here")

    nodes: list[CeleryWorker] = []

    def start(name: str, **more: Any) -> CeleryWorker:
        boot = tmp_path / f"boot-{name}"
        boot.write_text(f"{name * 8}\n")
        conf = {
            "imports": ["holding", "impatient"], "worker_prefetch_multiplier": 1,
            "broker_transport_options": {"visibility_timeout": VISIBLE, "unacked_restore_interval": 1},
        }  # fmt: skip

        def elsewhere(argv: list[str]) -> list[str]:
            return [*ELSEWHERE, BOOT, str(boot), *argv]

        node = celery(
            conf=conf, queue=f"q-{tmp_path.name}", argv=("-c", "1", "-n", f"{name}@%h"), wrap=elsewhere,
            env={"LEASE": str(LEASE), "OOMSAFE_STATE": str(tmp_path / f"state-{name}")},
            soft_limit="1GiB", max_oom_redeliveries=0, **more,
        )  # fmt: skip
        nodes.append(node)
        return node.ready()

    yield start
    for node in nodes:
        node.process.kill()  # unshare itself hears nothing else


def send(node: CeleryWorker, end: Path) -> str:
    """A task that runs until `end` is there: its id."""
    sent: str = node.ask(f"import holding; result = holding.late.delay(1, {str(end)!r}).id")
    until(lambda: runs(node) == {"1": 1}, "it runs")
    until(lambda: node.ask(f"result = proj.app.backend.client.exists('oomsafe-run-{sent}')"), "it is noted")
    return sent


def ended(node: CeleryWorker, task_id: str) -> list[str]:
    """Its state, and the kind and the text of what it has made."""
    got: list[str] = node.ask(f"""
one = proj.app.AsyncResult({task_id!r})
made = one.get(timeout=40, propagate=False)
result = [one.state, type(made).__name__, str(made)]
""")
    return got


def test_a_task_that_outlives_the_broker_s_patience(machine: Callable[..., CeleryWorker], tmp_path: Path) -> None:
    """Redis hands it out again after visibility_timeout: it runs twice, as it would without us, and neither is a death."""
    end = tmp_path / "end"
    first = machine("a")
    one = send(first, end)
    second = machine("b")
    until(lambda: runs(second)["1"] == 2 or second.lines("is given up"), "it runs there as well", 60)
    end.touch()

    assert ended(second, one)[:2] == ["SUCCESS", "int"]
    assert not [node for node in (first, second) if node.lines("is given up") or node.lines("oomsafe failed in")]


def test_a_machine_that_is_gone_counts_when_its_lease_has_expired(machine: Callable[..., CeleryWorker], tmp_path: Path) -> None:
    """Nothing else can be known of it; until then its task waits, for it may be the one that ends it."""
    first = machine("a")
    one = send(first, tmp_path / "never")
    first.process.kill()
    first.process.wait(10)
    second = machine("b")

    state, kind, text = ended(second, one)

    assert (state, kind) == ("FAILURE", "WorkerOutOfMemory")
    assert "killed for memory 1 times, max_oom_redeliveries=0; last: its whole node, while it ran" in text
    assert runs(second) == {"1": 1}
    assert second.ask("result = proj.good.delay(7).get(timeout=30)") == 7
    assert not second.lines("oomsafe failed in")
