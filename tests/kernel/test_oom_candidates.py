"""Among whom the OOM killer chooses: captured trees, and this machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from kernel.trees import MIB, Tree

from oomsafe.kernel.oom_candidates import candidate_of, field_of, total_of
from oomsafe.kernel.process import rss_of
from oomsafe.policy.limits import MACHINE, Kind, Level, Source
from oomsafe.policy.victims import Candidate

STATUS = """Name:\t{name}
Umask:\t0022
VmRSS:\t   30000 kB
RssAnon:\t   20000 kB
RssFile:\t    9000 kB
RssShmem:\t    1000 kB
VmPTE:\t     100 kB
VmSwap:\t     500 kB
"""


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """A machine whose first process is systemd."""
    tree = Tree(tmp_path)
    tree.write("proc/2/comm", "kthreadd\n")
    tree.write("proc/2/status", "Name:\tkthreadd\n")
    tree.write("proc/2/oom_score_adj", "0\n")
    for pid, name, score in ((1, "systemd", 0), (40, "gunicorn", 0), (41, "oomsafe-w0-a1b2", 300)):
        tree.write(f"proc/{pid}/status", STATUS.format(name=name))
        tree.write(f"proc/{pid}/oom_score_adj", f"{score}\n")
    tree.write("proc/meminfo", "MemTotal: 1024000 kB\nSwapTotal: 2048 kB\n")
    return tree


def test_what_the_kernel_counts(tree: Tree) -> None:
    """Resident memory, swap and page tables."""
    expected = Candidate(
        pid=41, name="oomsafe-w0-a1b2", held=(20000 + 9000 + 1000 + 100 + 500) * 1024, oom_score_adj=300, swapped=500 * 1024
    )

    assert expected == candidate_of(41, tree.proc)


def test_before_linux_4_5(tree: Tree) -> None:
    """status gave one figure only."""
    tree.write("proc/40/status", "Name:\tx\nVmRSS:\t   30000 kB\nVmPTE:\t     100 kB\nVmSwap:\t     500 kB\n")
    found = candidate_of(40, tree.proc)

    assert found is not None and found.held == 30600 * 1024


def test_a_kernel_thread_is_none(tree: Tree) -> None:
    """It has no memory of its own; nor has one that is gone."""
    assert candidate_of(2, tree.proc) is None
    assert candidate_of(99, tree.proc) is None


def test_a_hostile_name(tree: Tree) -> None:
    """The kernel escapes a line break in it; control characters are made printable."""
    tree.write("proc/40/status", STATUS.format(name="\x1b[2J\\nVmSwap: 1 kB"))
    found = candidate_of(40, tree.proc)

    assert found is not None and found.name.isprintable() and found.held == 30600 * 1024


def test_the_machines_first_process_is_never_taken(tree: Tree) -> None:
    """A container's first process may be."""
    first = candidate_of(1, tree.proc)
    assert first is not None and first.protected

    tree.write("proc/2/comm", "sh\n")
    first = candidate_of(1, tree.proc)
    assert first is not None and not first.protected


def test_a_cgroup_and_those_below_it(tree: Tree) -> None:
    """A process of another PID namespace is listed as 0: it is one that can't be seen."""
    tree.write("cg/a/cgroup.procs", "40\n")
    tree.write("cg/a/b/cgroup.procs", "41\n")
    level = Level(Source(Kind.CGROUP, f"{tree.root}/cg/a", 2), 100 * MIB)

    field = field_of(level, tree.proc)
    assert field is not None and [one.pid for one in field.candidates] == [40, 41] and not field.unseen

    tree.write("cg/a/c/cgroup.procs", "0\n0\n")
    field = field_of(level, tree.proc)
    assert field is not None and [one.pid for one in field.candidates] == [40, 41] and field.unseen


def test_the_machine(tree: Tree) -> None:
    """Whoever is in /proc; without kthreadd there are others that can't be seen."""
    level = Level(MACHINE, 1000 * MIB)

    field = field_of(level, tree.proc)
    assert field is not None and sorted(one.pid for one in field.candidates) == [1, 40, 41] and not field.unseen

    tree.write("proc/2/comm", "sh\n")
    field = field_of(level, tree.proc)
    assert field is not None and field.unseen


def test_what_can_t_be_known_is_none(tree: Tree) -> None:
    """A hidden cgroup, one that is gone, one without a limit."""
    assert field_of(Level(Source(Kind.HIDDEN, "/sys/fs/cgroup"), MIB), tree.proc) is None
    assert field_of(Level(Source(Kind.CGROUP, f"{tree.root}/gone", 2), MIB), tree.proc) is None
    assert total_of(Level(Source(Kind.CGROUP, f"{tree.root}/cg", 2), None), tree.proc) is None
    assert total_of(Level(Source(Kind.HIDDEN, "/sys/fs/cgroup"), MIB), tree.proc) is None


@pytest.mark.parametrize(
    ("files", "version", "expected"),
    [
        pytest.param({"memory.swap.max": "max"}, 2, 102 * MIB, id="v2-any-swap"),
        pytest.param({"memory.swap.max": f"{MIB}"}, 2, 101 * MIB, id="v2-some-swap"),
        pytest.param({"memory.swap.max": "0"}, 2, 100 * MIB, id="v2-no-swap"),
        pytest.param({}, 2, 100 * MIB, id="v2-not-accounted"),
        pytest.param({"memory.swappiness": "60"}, 1, 100 * MIB, id="v1-not-accounted"),
        pytest.param({"memory.swappiness": "60", "memory.memsw.limit_in_bytes": f"{101 * MIB}"}, 1, 101 * MIB, id="v1-some-swap"),
        pytest.param({"memory.swappiness": "60", "memory.memsw.limit_in_bytes": "9223372036854771712"}, 1, 102 * MIB, id="v1-any-swap"),
        pytest.param({"memory.swappiness": "0", "memory.memsw.limit_in_bytes": "9223372036854771712"}, 1, 100 * MIB, id="v1-no-swap"),
    ],
)
def test_the_total_includes_the_swap_that_may_be_used(tree: Tree, files: dict[str, str], version: int, expected: int) -> None:
    """mem_cgroup_get_max(): the limit, and the swap beside it, at most what the machine has (here 2 MiB)."""
    for name, text in files.items():
        tree.write(f"cg/a/{name}", f"{text}\n")

    assert expected == total_of(Level(Source(Kind.CGROUP, f"{tree.root}/cg/a", version), 100 * MIB), tree.proc)


def test_this_process() -> None:
    """Against its resident size."""
    found = candidate_of(os.getpid())

    assert found is not None and 0.8 < found.held / (rss_of(os.getpid()) or 1) < 1.3
