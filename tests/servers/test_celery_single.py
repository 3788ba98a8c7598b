"""Nodes of one process (solo, threads, gevent): measured, never ended by a task's MemoryError, and shut down warmly only if asked to."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from celerying import CeleryWorker, Start
from serving import until
from versions import runs_once

MIB = 1 << 20
POOLS = ("solo", "threads", "gevent")
SEND = "result = [proj.leak.delay(number, 1024).id for number in range({tasks})]"
GET = "result = [proj.app.AsyncResult(i).get(timeout=60) for i in {ids!r}]"


@pytest.mark.parametrize("pool", POOLS)
def test_it_is_measured_and_goes_on(celery: Start, pool: str) -> None:
    """Above its limit it says so, once, and serves: nothing would restart it."""
    node = celery(argv=("-P", pool), soft_limit="150MiB", min_lifetime=0).ready()

    ids = node.ask(SEND.format(tasks=150))
    assert node.ask(GET.format(ids=ids)) == list(range(150))

    (said,) = node.lines("if something restarts it, set OOMSAFE_SINGLE=exit")
    assert ": soft limit 150 MiB, budget " in said
    (line,) = until(lambda: node.lines(" should be recycled, and nothing here can: "), "it is said")
    assert "; proj.leak keeps about " in line or "proj.leak[" in line

    def counted() -> dict[str, Any]:
        (told,) = node.celery("inspect", "memory").values()
        return told["tasks"] == 150 and told  # it is published once a second

    (itself,) = until(counted, "every task is counted")["children"]
    assert itself["pid"] == node.pid
    assert itself["rss"] > 150 << 20
    (refused,) = node.celery("control", "memory_recycle").values()
    assert "one process" in refused["error"]
    assert node.process.poll() is None


@pytest.mark.parametrize("pool", POOLS)
def test_what_can_t_act_there_is_named(celery: Start, pool: str) -> None:
    """Once, with its value and the way out, by whatever way it was set; tasks with limits run, and run to their end."""
    # which a solo node's task is told of, and this one knows nothing of
    soft = {} if pool == "solo" else {"task_soft_memory_limit": "90MiB"}
    conf = {**soft, "task_memory_absolute": True}
    env = {"OOMSAFE_MAX_OOM_REDELIVERIES": "3", "ENOUGH_MIB": "250", "OOMSAFE_METRICS": "127.0.0.1:9400"}
    node = celery(argv=("-P", pool), conf=conf, env=env, soft_limit="1GiB", task_memory_limit="150MiB").ready()

    assert node.ask("result = proj.balloon.delay('python').get(timeout=60)") == "not stopped"

    (line,) = node.lines("can't act in a node of one process")
    own = "memory_limit=200MiB of task proj.b"
    if soft:
        assert "task_soft_memory_limit=90MiB, task_memory_absolute=True, task_memory_limit=150 MiB, max_oom_redeliveries=3" in line
    else:
        assert ": task_memory_limit=150 MiB, max_oom_redeliveries=3, " in line
        assert "soft_memory_limit" not in line
    assert own in line
    assert ", metrics=127.0.0.1:9400, " in line
    assert "more limits of tasks; use -P prefork, or soft_limit and OOMSAFE_SINGLE=exit" in line
    assert not node.lines("oomsafe failed in")


def test_a_node_of_children_lets_them_all_act(celery: Start) -> None:
    """So none is named."""
    node = celery(soft_limit="1GiB", task_memory_limit="150MiB").ready()

    assert not node.lines("can't act")


def test_a_solo_node_s_task_is_told_of_its_soft_limit(celery: Start) -> None:
    """It has the main thread: it may let go and go on, and one that does not fails; neither ends the node. A header lowers."""
    node = celery(argv=("-P", "solo"), soft_limit="1GiB").ready()

    held, name, used, limit = node.ask("result = proj.balloon_told.delay(True).get(timeout=60)")
    ask = "one = proj.balloon_told.delay(False); error = one.get(timeout=60, propagate=False); result = [one.state, type(error).__name__]"
    failed = node.ask(ask)
    lower = node.ask("result = proj.balloon_told.apply_async((True,), headers={'soft_memory_limit': '40MiB'}).get(timeout=60)")

    assert (name, limit) == ("proj.balloon_told", 100 * MIB)
    assert limit < used <= limit * 1.25
    assert held * MIB <= limit * 1.25
    assert failed == ["FAILURE", "SoftMemoryLimitExceeded"]
    assert lower[3] == 40 * MIB
    assert node.ask("result = proj.leak.delay(7, 1).get(timeout=30)") == 7
    assert not node.lines("oomsafe failed in")


def test_a_solo_node_s_task_that_holds_the_gil_is_told_when_it_lets_go(celery: Start) -> None:
    """The watcher's thread can't look before."""
    node = celery(argv=("-P", "solo"), env={"ENOUGH_MIB": "250"}, soft_limit="1GiB").ready()
    ask = "one = proj.balloon.apply_async(('c',), headers={'soft_memory_limit': '40MiB'})"

    state, kind, (_, used, limit) = node.ask(
        f"{ask}; error = one.get(timeout=50, propagate=False); result = [one.state, type(error).__name__, list(error.args)]"
    )

    assert (state, kind, limit) == ("FAILURE", "SoftMemoryLimitExceeded", 40 * MIB)
    assert used >= 240 * MIB


IN_A_THREAD = """
import sys, time
from celery import Celery
from celery.contrib.testing.worker import start_worker
import oomsafe.celery

app = Celery("proj", broker="memory://", backend="cache+memory://")
app.conf.broker_transport_options = {"polling_interval": 0.01}
oomsafe.celery.install(app, soft_limit="1GiB")

@app.task(soft_memory_limit="60MiB")
def balloon(mib, catches):
    kept = []
    try:
        for _ in range(mib // 4):
            kept.append(b"x" * (4 << 20))
            time.sleep(0.004)
    except oomsafe.celery.SoftMemoryLimitExceeded as error:
        if not catches:
            raise
        return ["caught", len(kept) * 4, *error.args]
    return len(kept) * 4

@app.task
def after():
    deadline = time.monotonic() + 0.3
    while time.monotonic() < deadline:
        pass
    return "after"

def outcome(sent):
    got = sent.get(timeout=60, propagate=False)
    return sent.state, type(got).__name__ if isinstance(got, Exception) else got

with start_worker(app, perform_ping_check=False):
    print(outcome(balloon.delay(40, False)))
    print(outcome(balloon.delay(300, False)))
    print(outcome(after.delay()))
    print(outcome(balloon.delay(300, True)))
    print(outcome(after.delay()))
    # right at its limit when it ends: told or not, it is the task's alone
    print({outcome(balloon.delay(mib, False))[0] for mib in range(60, 72, 4) for _ in range(2)} <= {"SUCCESS", "FAILURE"})
    print(outcome(after.delay()))
"""


def test_a_solo_node_in_a_thread_tells_its_own_task(tmp_path: Path) -> None:
    """As pytest's celery_worker has it: the one who waits for the result, in the main thread, is not disturbed, nor is the next task."""
    (tmp_path / "script.py").write_text(IN_A_THREAD)
    ended = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)

    assert ended.returncode == 0, ended.stderr
    first, second, after, caught, *rest = ended.stdout.splitlines()
    assert [first, second, after] == ["('SUCCESS', 40)", "('FAILURE', 'SoftMemoryLimitExceeded')", "('SUCCESS', 'after')"]
    assert re.fullmatch(r"\('SUCCESS', \['caught', \d+, 'proj.balloon', \d+, 62914560\]\)", caught)
    assert rest == ["('SUCCESS', 'after')", "True", "('SUCCESS', 'after')"]
    assert "oomsafe failed" not in ended.stderr


def test_a_solo_node_s_task_is_not_told_in_a_dry_run(celery: Start) -> None:
    """It says what it would."""
    node = celery(argv=("-P", "solo"), soft_limit="1GiB", dry_run=True, env={"ENOUGH_MIB": "150"}).ready()

    assert node.ask("result = proj.balloon_told.delay(False).get(timeout=60)") is None
    assert node.lines("a limit would be met (dry run): ")


def test_a_bad_limit_stops_a_solo_node(celery: Start) -> None:
    """One line that names it."""
    node = celery(argv=("-P", "solo"), soft_limit="1GiB", env={"BAD_TASK": "1"})

    assert node.process.wait(30) != 0

    assert node.lines("task proj.misspelt: memory_limit='lots'")


@pytest.mark.parametrize("pool", POOLS)
def test_asked_to_it_ends_and_nothing_is_lost(celery: Start, pool: str) -> None:
    """OOMSAFE_SINGLE=exit: what is in flight ends, the rest is the next one's, and each task runs once."""
    runs_once(pool)
    lives: list[CeleryWorker] = []

    def live() -> CeleryWorker:
        options = {"argv": ("-P", pool), "env": {"OOMSAFE_SINGLE": "exit"}, "queue": f"q-single-{pool}-{id(lives)}"}
        lives.append(celery(**options, soft_limit="100MiB", min_lifetime=0, jitter=0).ready())
        return lives[-1]

    def done() -> int:
        return sum(len(node.lines("succeeded in")) for node in lives)

    # a life does fifty of them, and those that it has received, or runs before it has measured itself
    ids = live().ask(SEND.format(tasks=200))
    while until(lambda: lives[-1].process.poll() is not None or done() == 200, "it has ended, or all is done") and done() < 200:
        assert lives[-1].process.returncode == 0
        live()

    assert len(lives) > 1
    assert lives[0].process.poll() == 0
    assert lives[-1].ask(GET.format(ids=ids)) == list(range(200))
    assert done() == 200


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("task", ["out_of_memory", "out_of_memory_late"])
def test_a_memory_error_is_the_task_s_own(celery: Start, pool: str, task: str) -> None:
    """Each way to run out is that task's failure, and the node serves the next one."""
    node = celery(argv=("-P", pool), soft_limit="1GiB").ready()

    ended = node.ask(f"""
result = []
for how in ("plain", "subclass", "chained", "real"):
    one = proj.{task}.delay(how)
    one.get(timeout=30, propagate=False)
    result.append([one.state, proj.leak.delay(7, 1).get(timeout=30)])
proj.out_of_memory_in_a_hook.delay("")
result.append(proj.leak.delay(8, 1).get(timeout=30))
result.append(proj.leak.delay(9, 1).get(timeout=30))
""")

    assert ended == [["FAILURE", 7]] * 4 + [8, 9]
    assert node.process.poll() is None
