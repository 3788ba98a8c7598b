"""examples/celery_redis, run as its README says, and `oomsafe demo --server celery`."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from brokers import Redis
from needs import a_cgroup_can_be_made, need
from versions import takes_commands_of_others

from oomsafe.demo.server_process import ENDING_WITH_US, ServerProcess

EXAMPLE = Path(__file__).parents[2] / "examples" / "celery_redis"
KEYS = {
    "server", "worker_class", "seconds", "requests", "failed", "recycles", "soft_limit_bytes", "peak_worker_rss_bytes",
    "supervisor_survived", "ballooned", "poison", "given_up",
}  # fmt: skip


def test_the_example_does_what_its_readme_says(redis: Redis, tmp_path: Path) -> None:
    """All of its commands, in their order: every result comes, children are recycled, and the node outlives a MemoryError."""
    takes_commands_of_others()
    worker, *asked = re.findall(r"^    ((?:celery|python) .*)$", (EXAMPLE / "README.md").read_text(), re.M)
    server = redis.url(0).rpartition("/")[0]
    env = {**os.environ, "REDIS_URL": server, "PATH": os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])}
    with ServerProcess([*ENDING_WITH_US, *shlex.split(worker)], EXAMPLE, env, log=str(tmp_path / "log")) as node:
        node.until(lambda: " ready." in node.log(), "it is ready", 30)

        def ask(command: str) -> str:
            ended = subprocess.run(shlex.split(command), cwd=EXAMPLE, env=env, capture_output=True, text=True, timeout=60, check=False)
            assert ended.returncode == 0, ended.stderr + node.log()
            return ended.stdout

        leaked, ballooned, told, recycled = map(ask, asked)
        assert 0 < int(leaked) < 400
        assert ballooned == "MemoryError()\n"
        assert "'rss': " in told or '"rss": ' in told
        assert "is recycled once its current task is done" in recycled
        assert len(node.lines(" recycling: ")) >= 2
        assert node.alive


@pytest.mark.xdist_group("demo")
def test_the_demo_finishes_every_good_task() -> None:
    """Beside leaks, balloons and poison, which is given up; MainProcess is alive at the end."""
    ended = demo("--json", "--seconds", "15")

    assert ended.returncode == 0, ended.stdout + ended.stderr
    result = json.loads(ended.stdout)
    assert set(result) == KEYS
    assert (result["worker_class"], result["failed"], result["supervisor_survived"]) == ("prefork", 0, True)
    assert result["requests"] > 300
    assert result["ballooned"] >= 15
    if a_cgroup_can_be_made():
        assert result["given_up"] == result["poison"] >= 1
    else:
        assert (result["given_up"], result["poison"]) == (0, None)
    assert result["recycles"] >= 2
    assert result["peak_worker_rss_bytes"] <= 1.25 * result["soft_limit_bytes"]


@pytest.mark.xdist_group("demo")
def test_the_demo_poisons_nobody_s_machine() -> None:
    """Without a memory cgroup no poison task is sent, and the demo says so; in one each is given up after two deaths."""
    need(os.geteuid() == 0 and a_cgroup_can_be_made(), "only root makes memory cgroups, and hides them from a process")
    hidden = ["unshare", "--mount", "sh", "-c", 'umount --recursive --lazy /sys/fs/cgroup && exec "$0" "$@"']
    with_one, without = demo("--seconds", "12"), demo("--seconds", "12", wrap=hidden)

    assert (with_one.returncode, without.returncode) == (0, 0), with_one.stdout + without.stdout
    (poison,) = re.findall(r"^  poison +(.*)", with_one.stdout, re.MULTILINE)
    assert re.fullmatch(r"(\d) sent; given up: \1 after 2 deaths", poison)
    assert "no poison task is sent" not in with_one.stdout
    assert "so the kernel will not step in and no poison task is sent" in without.stdout
    assert not re.search("^  poison", without.stdout, re.MULTILINE)
    assert re.search("^  killed by SIGKILL +0$", without.stdout, re.MULTILINE)


def demo(*argv: str, wrap: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """`oomsafe demo --server celery`, as a process."""
    environ = {key: value for key, value in os.environ.items() if not key.startswith("OOMSAFE_")}
    command = [*wrap, sys.executable, "-m", "oomsafe.cli", "demo", "--server", "celery", *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=150, env={**environ, "COLUMNS": "300"}, check=False)
