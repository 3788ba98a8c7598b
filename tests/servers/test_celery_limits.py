"""Memory limits of one task: told, stopped, and nobody else disturbed. Real nodes, real balloons."""

from __future__ import annotations

import os
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from celerying import Start
from needs import need
from serving import until
from versions import spawns

MIB = 1 << 20
#: Only one process of the tests starts a RabbitMQ.
RABBITMQ = pytest.param("rabbitmq", marks=pytest.mark.xdist_group("rabbitmq"))
BROKERS = ("redis", "filesystem", RABBITMQ)

#: One balloon among good tasks; what the client sees of it.
BALLOON = """
good = [proj.sleep.delay(0.05) for _ in range(20)]
bad = proj.{task}.apply_async(({how!r},), **{options!r})
error = bad.get(timeout=60, propagate=False)
result = [bad.state, type(error).__name__, list(error.args), str(error), [one.get(timeout=60) for one in good]]
"""


def balloon(node: Any, task: str = "balloon", how: str = "python", **options: Any) -> list[Any]:
    """What became of it; asserts that the good ones beside it came to their end."""
    state, kind, args, text, good = node.ask(BALLOON.format(task=task, how=how, options=options))
    assert good == [0.05] * 20
    assert node.process.poll() is None
    return [state, kind, args, text]


@pytest.mark.parametrize("broker", BROKERS)
@pytest.mark.parametrize("task", ["balloon", "balloon_late"])
def test_a_balloon_is_stopped_at_its_limit(celery: Start, broker: str, task: str) -> None:
    """In shared memory, which the kernel refuses nobody: within a quarter of the limit, with its own error, and without a second run; its
    child is replaced."""
    node = celery(broker, soft_limit="1GiB").ready()
    until(lambda: len(node.pool().workers) == 2, "both are there")
    before = pids(node)

    state, kind, (name, used, limit), text = balloon(node, task, "c")

    assert (state, kind, name, limit) == ("FAILURE", "MemoryLimitExceeded", f"proj.{task}", 200 * MIB)
    assert limit < used <= limit * 1.25
    assert "> its memory limit 200.0 MiB" in text
    assert len(node.lines("> its memory limit 200.0 MiB")) >= 1
    until(lambda: len(pids(node)) == 2 and pids(node) != before, "it is replaced")
    assert len(pids(node) & before) == 1
    assert len([line for line in node.lines(f"Task proj.{task}[") if "received" in line]) == 1
    assert node.ask("result = proj.leak.delay(7, 1).get(timeout=30)") == 7


@pytest.mark.parametrize("pool", ["prefork", "processes"])
def test_installed_before_the_app_is_configured(celery: Start, pool: str) -> None:
    """As application factories do, and the pool asked for by either of its names: tasks are stopped at their limits all the same."""
    node = celery(env={"INSTALL_FIRST": "1"}, argv=("-P", pool), soft_limit="1GiB").ready()

    assert balloon(node)[:2] == ["FAILURE", "MemoryLimitExceeded"]


def test_what_a_task_s_programs_hold_is_the_task_s(celery: Start, tmp_path: Path) -> None:
    """It is stopped for a program of its, which is ended with it; not for one that stays below, nor for forks that share what it holds."""
    node = celery(soft_limit="1GiB").ready()

    ask = f"one = proj.program.delay(300, {str(tmp_path / 'big')!r}); error = one.get(timeout=60, propagate=False)"
    state, kind, used = node.ask(f"{ask}; result = [one.state, type(error).__name__, error.args[1]]")
    small = node.ask(f"result = proj.program.delay(100, {str(tmp_path / 'other')!r}, 0.5).get(timeout=30)")
    forks = node.ask("result = proj.forks.delay(100, 4).get(timeout=30)")

    assert (state, kind, small, forks) == ("FAILURE", "MemoryLimitExceeded", 0, [0] * 4)
    assert used > 200 * MIB
    (line,) = node.lines("were held by programs that it had started, and that are ended with it: 1, the biggest python")
    pid = int(re.findall(r"\((\d+)\)$", line)[0])
    until(lambda: not Path(f"/proc/{pid}").exists(), "the program is gone")


@pytest.mark.parametrize("broker", BROKERS)
def test_the_stopped_are_told_and_logged_with_task_and_child(celery: Start, broker: str) -> None:
    """How many, and the last eight, the latest first; an id that somebody chose is printable and short there."""
    node = celery(broker, soft_limit="1GiB").ready()
    began = time.time()
    ids = [f"{node.pid}-{number}\r\n\x1b[2J{'x' * 200}" for number in range(10)]

    sent = f"[proj.balloon.apply_async(('c',), task_id=i) for i in {ids!r}]"
    ended = node.ask(f"result = [type(one.get(timeout=60, propagate=False)).__name__ for one in {sent}]", 120)
    assert ended == ["MemoryLimitExceeded"] * 10
    (told,) = node.celery("inspect", "memory").values()

    exited = [re.findall(r"pid:(\d+) ", line)[0] for line in node.lines("exited with 'signal 9")]  # Celery's own words
    logged = re.findall(r"> its memory limit 200.0 MiB; raise the limit, .* \(task id (.*), child (\d+)\)$", node.log(), re.MULTILINE)
    short = [f"{node.pid}-{number}???[2J{'x' * 200}"[:93] + "..." for number in range(10)]
    assert (sorted(task for task, _ in logged), {pid for _, pid in logged}) == (sorted(short), set(exited))
    assert told["deaths"] == {"limit": 10}
    assert [str(death["pid"]) for death in told["last_deaths"]] == exited[:1:-1]
    assert {(death["id"], str(death["pid"])) for death in told["last_deaths"]} < set(logged)
    assert {(death["task"], death["verdict"]) for death in told["last_deaths"]} == {("proj.balloon", "limit")}
    assert all(200 * MIB < death["rss"] < 400 * MIB for death in told["last_deaths"])
    at = [death["at"] for death in told["last_deaths"]]
    assert began < at[-1]
    assert at == sorted(at, reverse=True)


def test_the_app_s_default(celery: Start) -> None:
    """From install(), for tasks without limits of their own."""
    node = celery(soft_limit="1GiB", task_memory_limit="150MiB").ready()

    state, kind, (_, used, limit), _ = balloon(node, "balloon_by_default")

    assert (state, kind, limit) == ("FAILURE", "MemoryLimitExceeded", 150 * MIB)
    assert used <= limit * 1.25


def test_the_app_s_conf(celery: Start) -> None:
    """The same from Celery's own configuration."""
    node = celery(soft_limit="1GiB", conf={"task_memory_limit": "150MiB"}).ready()

    assert balloon(node, "balloon_by_default")[2][2] == 150 * MIB


@pytest.mark.parametrize(("asked", "limit"), [("100MiB", 100 * MIB), ("400MiB", 200 * MIB), ("lots", 200 * MIB), ([1], 200 * MIB)])
def test_a_header_only_lowers(celery: Start, asked: object, limit: int) -> None:
    """More is not given, and nonsense is a warning."""
    node = celery(soft_limit="1GiB").ready()

    _, kind, (_, used, met), _ = balloon(node, headers={"memory_limit": asked})

    assert (kind, met) == ("MemoryLimitExceeded", limit)
    assert used <= limit * 1.25
    assert len(node.lines("ignoring a header: memory_limit=")) == (asked in ("lots", [1]))


@pytest.mark.parametrize("broker", BROKERS)
def test_a_soft_limit_is_told(celery: Start, broker: str) -> None:
    """Inside the task, which may let go and go on."""
    node = celery(broker, soft_limit="1GiB").ready()

    held, name, used, limit = node.ask("result = proj.balloon_told.delay(True).get(timeout=60)")

    assert (name, limit) == ("proj.balloon_told", 100 * MIB)
    assert limit < used <= limit * 1.25
    assert held * MIB <= limit * 1.25


def test_a_soft_limit_that_is_not_caught(celery: Start) -> None:
    """Is that task's failure, and its child lives."""
    node = celery(soft_limit="1GiB").ready()
    until(lambda: len(node.pool().workers) == 2, "both are there")
    before = pids(node)

    state, kind, *_ = balloon(node, "balloon_told", how="")

    assert (state, kind) == ("FAILURE", "SoftMemoryLimitExceeded")
    assert pids(node) == before


def test_the_whole_child_counts_where_asked(celery: Start) -> None:
    """What earlier tasks have left there too."""
    node = celery(soft_limit="1GiB", argv=("-c", "1")).ready()
    code = "one = proj.whole.delay(60); error = one.get(timeout=30, propagate=False); result = [one.state, str(error)]"

    assert node.ask(code) == ["SUCCESS", str(60 * MIB)]
    node.ask("result = proj.leak.delay(7, 120 << 10).get(timeout=30)")
    state, error = node.ask(code)

    assert state == "FAILURE"
    assert "> its memory limit 200.0 MiB" in error


@pytest.mark.parametrize("setting", ["conf", "task"])
def test_a_bad_limit_stops_the_node(celery: Start, setting: str) -> None:
    """One line that names it."""
    env = {"BAD_TASK": "1"} if setting == "task" else {}
    node = celery(soft_limit="1GiB", env=env, conf={"task_memory_limit": "300"} if setting == "conf" else {})

    assert node.process.wait(30) != 0

    assert node.lines("task_memory_limit='300'" if setting == "conf" else "task proj.misspelt: memory_limit='lots'")


def test_a_limit_that_will_never_be_met(celery: Start) -> None:
    """A warning with both figures."""
    node = celery(soft_limit="100MiB", hard_limit="190MiB", task_memory_limit="900GiB").ready()

    assert node.lines("task_memory_limit 900 GiB is above the effective limit ")
    assert node.lines("task proj.balloon: memory_limit 200 MiB is above the pool's hard_limit 190 MiB")


def test_dry_run_stops_nothing(celery: Start) -> None:
    """It says what it would."""
    node = celery(soft_limit="1GiB", dry_run=True, env={"ENOUGH_MIB": "300"}).ready()

    assert node.ask("result = proj.balloon.delay('python').get(timeout=60)") == "not stopped"
    assert node.lines("a limit would be met (dry run): ")
    (refused,) = node.celery("control", "memory_recycle").values()
    assert "dry run: child " in refused["error"]


def test_the_watcher_sleeps_when_there_is_nothing_to_watch(celery: Start) -> None:
    """It has no timer of its own then: the kernel counts no switch of its thread for ten times as long as it would look."""
    node = celery(soft_limit="1GiB").ready()
    balloon(node)
    threads = {path.parent.name: path for path in Path(f"/proc/{node.pid}/task").glob("*/status")}
    (watcher,) = (path for thread, path in threads.items() if thread != str(node.pid) and _name(path) == _name(threads[str(node.pid)]))

    until(lambda: _stands_still(watcher), "it sleeps")


@pytest.mark.parametrize("broker", BROKERS)
@pytest.mark.parametrize(
    ("mib", "kinds"), [(65, {"int", "SoftMemoryLimitExceeded"}), (75, {"int", "SoftMemoryLimitExceeded", "MemoryLimitExceeded"})]
)
def test_a_task_that_ends_as_it_is_stopped(celery: Start, broker: str, mib: int, kinds: set[str]) -> None:
    """Whichever is first, its own result is one or the other, and the task after it in the same child never pays."""
    node = celery(broker, soft_limit="1GiB").ready()

    ended = node.ask(
        f"""
sent = [(proj.brink.delay({mib}), proj.sleep.delay(0)) for _ in range(60)]
result = [(type(bad.get(timeout=60, propagate=False)).__name__, good.get(timeout=60)) for bad, good in sent]
""",
        120,
    )

    assert [good for _, good in ended] == [0] * 60
    assert {bad for bad, _ in ended} <= kinds
    assert len({bad for bad, _ in ended} - {"int"}) >= 1
    assert not node.lines("oomsafe failed in")
    assert node.process.poll() is None


@pytest.mark.parametrize("own", [None, 900_000])
def test_a_result_s_meta(celery: Start, own: int | None) -> None:
    """What the task took, where result_extended is on; the peak is not known where Celery's own setting needs it."""
    node = celery(soft_limit="1GiB", argv=("-c", "1"), conf={"result_extended": True, "worker_max_memory_per_child": own}).ready()
    code = "one = proj.whole.delay({}); one.get(timeout=30); result = one._get_task_meta()['memory']"

    big = node.ask(code.format(90))
    small = node.ask(code.format(1))

    assert set(big) == {"peak_growth", "rss_end"}
    assert all(20 * MIB < memory["rss_end"] < 400 * MIB for memory in (big, small))
    if own is None:
        assert 85 * MIB < big["peak_growth"] < 110 * MIB
        assert small["peak_growth"] < 10 * MIB
    else:
        assert big["peak_growth"] is None


#: A /dev/shm in which somebody else has made our folder first.
TAKEN = 'mount -t tmpfs tmpfs /dev/shm && mkdir "/dev/shm/oomsafe-$(id -u)" && chown 65534 "/dev/shm/oomsafe-$(id -u)"'


@pytest.fixture
def taken(tmp_path: Path) -> dict[str, Any]:
    """Options for celery(): on its machine another user was there first, wherever a scoreboard or a note could lie."""
    made = os.geteuid() == 0 and subprocess.run(["unshare", "-m", "sh", "-c", TAKEN], capture_output=True, check=False).returncode == 0
    need(made, "no mount namespace with a /dev/shm of its own can be made here")
    theirs = tmp_path / "tmp" / f"oomsafe-{os.geteuid()}"
    theirs.mkdir(parents=True)
    os.chown(theirs, 65534, 65534)
    env = {"TMPDIR": str(theirs.parent), "XDG_RUNTIME_DIR": "", "OOMSAFE_STATE": "", "ENOUGH_MIB": "500"}
    return {"env": env, "wrap": lambda command: ["unshare", "-m", "sh", "-c", f'{TAKEN} && exec "$@"', "sh", *command]}


@pytest.mark.parametrize("broker", ["redis", "filesystem"])
def test_another_user_can_t_lift_limits(celery: Start, taken: dict[str, Any], broker: str) -> None:
    """Who makes our folders first takes away `oomsafe status`, and nothing else: children inherit the memory itself."""
    node = celery(broker, soft_limit="1GiB", **taken).ready()

    assert balloon(node)[1] == "MemoryLimitExceeded"
    assert balloon(node, "balloon_told", how="")[1] == "SoftMemoryLimitExceeded"
    assert node.lines("the scoreboard is in memory only: `oomsafe status` can't see this pool")
    assert not node.lines("are off")
    (told,) = node.celery("inspect", "memory").values()
    assert {child["pid"] for child in told["children"]} == set(node.children())


def test_a_spawned_child_finds_the_memory_that_has_no_place(celery: Start, taken: dict[str, Any]) -> None:
    """It inherits nothing, and opens what its supervisor has: its tasks have their limits."""
    spawns()
    node = celery(soft_limit="1GiB", conf={"worker_pool_start_method": "spawn"}, argv=("-c", "1"), **taken).ready()

    assert node.ask("result = proj.about.delay().get(timeout=30)")[1] == int(Path(f"/proc/{node.pid}/oom_score_adj").read_text()) + 300
    assert balloon(node)[1] == "MemoryLimitExceeded"
    assert not node.lines("are off")


def pids(node: Any) -> set[int]:
    """Of the node's children, as they stand on its scoreboard."""
    return {worker.pid for worker in node.pool().workers}


def _name(status: Path) -> str:
    return status.read_text().splitlines()[0]


def _stands_still(status: Path) -> bool:
    def switches() -> str:
        return status.read_text().partition("voluntary_ctxt_switches:")[2].split()[0]

    before = switches()
    time.sleep(2.5)
    return switches() == before
