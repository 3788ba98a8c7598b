"""examples/celery_redis, run as its README says, and `oomsafe demo --server celery`."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from celerying import Redis
from serving import ENDING_WITH_US, until

EXAMPLE = Path(__file__).parents[2] / "examples" / "celery_redis"
KEYS = {
    "server", "worker_class", "seconds", "requests", "failed", "recycles", "soft_limit_bytes", "peak_worker_rss_bytes",
    "supervisor_survived", "ballooned",
}  # fmt: skip


def test_the_example_does_what_its_readme_says(redis: Redis, tmp_path: Path) -> None:
    """All of its commands, in their order: every result comes, children are recycled, and the node outlives a MemoryError."""
    worker, *asked = re.findall(r"^    ((?:celery|python) .*)$", (EXAMPLE / "README.md").read_text(), re.M)
    server = redis.url(0).rpartition("/")[0]
    env = {**os.environ, "REDIS_URL": server, "PATH": os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])}
    log = tmp_path / "log"
    with log.open("wb") as output:
        node = subprocess.Popen([*ENDING_WITH_US, *shlex.split(worker)], cwd=EXAMPLE, env=env, stdout=output, stderr=output)
    try:
        until(lambda: " ready." in log.read_text() or node.poll() is not None, "it is ready", 30)

        def ask(command: str) -> str:
            ended = subprocess.run(shlex.split(command), cwd=EXAMPLE, env=env, capture_output=True, text=True, timeout=60, check=False)
            assert ended.returncode == 0, ended.stderr + log.read_text()
            return ended.stdout

        leaked, ballooned, told, recycled = map(ask, asked)
        assert 0 < int(leaked) < 400
        assert ballooned == "MemoryError()\n"
        assert "'rss': " in told or '"rss": ' in told
        assert "is recycled once its current task is done" in recycled
        assert len([line for line in log.read_text().splitlines() if " recycling: " in line]) >= 2
        assert node.poll() is None
    finally:
        node.terminate()
        node.wait(30)


@pytest.mark.xdist_group("demo")
def test_the_demo_finishes_every_good_task() -> None:
    """Beside leaks and balloons; MainProcess is alive at the end."""
    environ = {key: value for key, value in os.environ.items() if not key.startswith("OOMSAFE_")}
    command = [sys.executable, "-m", "oomsafe.cli", "demo", "--json", "--server", "celery", "--seconds", "10"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environ, check=False)

    assert ended.returncode == 0, ended.stdout + ended.stderr
    result = json.loads(ended.stdout)
    assert set(result) == KEYS
    assert (result["worker_class"], result["failed"], result["supervisor_survived"]) == ("prefork", 0, True)
    assert result["requests"] > 300
    assert result["ballooned"] >= 15
    assert result["recycles"] >= 2
    assert result["peak_worker_rss_bytes"] <= 1.25 * result["soft_limit_bytes"]
