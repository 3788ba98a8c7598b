"""A prefork pool whose children are spawned: what they must be told goes to them pickled."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from celerying import Start
from serving import until
from versions import spawns

LEAKING = """
results = [proj.leak.delay(number, 1024) for number in range(250)]
result = [r.get(timeout=60) for r in results]
"""


@pytest.mark.parametrize("broker", ["redis", "filesystem"])
def test_spawned_children_are_guarded_and_recycled(celery: Start, broker: str) -> None:
    """Each has its seat and its score, is recycled between tasks, and every result comes back."""
    spawns()
    node = celery(broker, conf={"worker_pool_start_method": "spawn"}, soft_limit="90MiB", min_lifetime=0).ready()
    until(lambda: [worker.state for worker in node.pool().workers] == ["serving"] * 2, "two children serve")

    pid, score, comm = node.ask("result = proj.about.delay().get(timeout=30)")
    assert b"spawn" in Path(f"/proc/{pid}/cmdline").read_bytes()
    assert score == int(Path(f"/proc/{node.pid}/oom_score_adj").read_text()) + 300
    assert comm.startswith("oomsafe-w")
    assert pid in {worker.pid for worker in node.pool().workers}

    fresh = subprocess.run([sys.executable, "-c", "import gc; print(gc.get_freeze_count())"], capture_output=True, check=True).stdout
    assert node.ask("result = proj.frozen.delay().get(timeout=30)") == int(fresh)  # Python 3.12 begins with some
    assert not node.lines("preloaded")

    assert node.ask(LEAKING) == list(range(250))
    until(lambda: node.lines(" recycling: "), "one is recycled at least: which of them gets how many tasks, nobody says")
    until(lambda: [worker.state for worker in node.pool().workers] == ["serving"] * 2, "two children serve again")
    stock = [line.partition(" (slot ")[0] for line in node.lines(" held at its end ")]
    assert len(stock) == len({line.rpartition(" ")[2] for line in stock}), "each tells once"
    assert node.process.poll() is None
