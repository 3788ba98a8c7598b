"""By how much workers rank above their supervisor, on captured trees."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from kernel.trees import MIB, Tree

from oomsafe.policy.state import State
from oomsafe.policy.victims import thousandth
from oomsafe.scoreboard.layout import SINGLE_PROCESS, Counters
from oomsafe.scoreboard.margin import margin_of
from oomsafe.scoreboard.slot import Figures
from oomsafe.scoreboard.view import PoolView, WorkerView

SUPERVISOR, WORKERS = 40, (41, 42)
MOUNT = "30 22 0:26 / {root}/sys/fs/cgroup rw - cgroup2 cgroup rw"


def process(tree: Tree, pid: int, held: int, score: int) -> None:
    """With that much resident, in bytes."""
    tree.write(f"proc/{pid}/status", f"Name:\tgunicorn\nRssAnon:\t{held // 1024} kB\nRssFile:\t0 kB\nRssShmem:\t0 kB\n")
    tree.write(f"proc/{pid}/oom_score_adj", f"{score}\n")
    tree.write(f"proc/{pid}/stat", f"{pid} (gunicorn) S " + " ".join(["1"] * 18) + f" {pid} 0\n")
    tree.write(f"proc/{pid}/cgroup", "0::/shop\n")


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """A supervisor of 200 MiB and two small workers with +300, in a cgroup of 400 MiB on a machine of 1 GiB."""
    tree = Tree(tmp_path)
    tree.at("0::/\n", MOUNT)
    tree.v2("sys/fs/cgroup/shop", 400 * MIB)
    tree.write("proc/meminfo", "MemTotal: 1048576 kB\nMemAvailable: 500000 kB\nMemFree: 100000 kB\nSwapTotal: 0 kB\n")
    tree.write("proc/2/comm", "kthreadd\n")
    process(tree, SUPERVISOR, 200 * MIB, 0)
    for pid, held in zip(WORKERS, (20 * MIB, 90 * MIB), strict=True):
        process(tree, pid, held, 300)
    return tree


def pool(supervisor: int = SUPERVISOR, server: str = "test") -> PoolView:
    workers = [
        WorkerView(
            slot=slot, pid=pid, started=pid, generation=slot, state=State.SERVING, figures=Figures(), published=None, measured=None,
            used=None, counters=Counters(), in_flight=[],
        )
        for slot, pid in enumerate(WORKERS)
    ]  # fmt: skip
    return PoolView(server, supervisor, supervisor, 0.0, 2, 1, None, None, workers)


def test_the_lowest_worker_counts_at_the_smallest_limit(tree: Tree) -> None:
    """A score counts least there: the supervisor has 180 MiB more than the small worker, and +300 is worth 120 MiB."""
    expected = 20 * MIB + 300 * thousandth(400 * MIB) - 200 * MIB

    assert expected < 0
    assert expected == margin_of(pool(), tree.proc)


def test_without_a_limit_of_its_own_the_machine_counts(tree: Tree) -> None:
    """Then +300 is worth 307 MiB."""
    tree.v2("sys/fs/cgroup/shop", "max")

    assert margin_of(pool(), tree.proc) == 20 * MIB + 300 * thousandth(1024 * MIB) - 200 * MIB


def test_where_workers_rank_below_the_biggest_limit_counts(tree: Tree) -> None:
    """Scores below the supervisor's weigh most on the whole machine."""
    for pid in WORKERS:
        process(tree, pid, 300 * MIB, -200)

    assert margin_of(pool(), tree.proc) == 100 * MIB - 200 * thousandth(1024 * MIB)


def test_a_supervisor_that_the_kernel_never_takes(tree: Tree) -> None:
    """By its score."""
    process(tree, SUPERVISOR, 200 * MIB, -1000)

    assert margin_of(pool(), tree.proc) == math.inf


def test_what_is_not_known(tree: Tree) -> None:
    """No supervisor, one whose pid is another's by now, one process, or hidden figures."""
    other = PoolView("test", SUPERVISOR, 5, 0.0, 2, 1, None, None, pool().workers)
    assert margin_of(pool(0), tree.proc) is None
    assert margin_of(other, tree.proc) is None
    assert margin_of(PoolView(SINGLE_PROCESS, 40, 40, 0.0, 1, 1, None, None), tree.proc) is None
    for pid in WORKERS:
        (tree.root / f"proc/{pid}/status").unlink()
    assert margin_of(pool(), tree.proc) is None
