"""Processors that a process may use: what it may run on, and quotas of cgroups v1 and v2."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from kernel.trees import Tree

from oomsafe.kernel.cpus import cpus_of

HERE = len(os.sched_getaffinity(0))


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """Of files that this test writes."""
    return Tree(tmp_path)


def test_a_quota_of_v2_or_of_any_ancestor(tree: Tree) -> None:
    """The smallest."""
    tree.at("0::/a.slice/b.service\n", f"30 1 0:26 / {tree.root}/cg rw - cgroup2 cgroup2 rw")
    tree.write("cg/a.slice/cpu.max", "50000 100000\n")
    tree.write("cg/a.slice/b.service/cpu.max", "75000 100000\n")

    assert cpus_of(proc=tree.proc) == 0.5


def test_a_quota_of_v1(tree: Tree) -> None:
    """In a hybrid tree the processors may be with v1."""
    mounts = ("30 1 0:26 / {root}/cg/cpu rw - cgroup cgroup rw,cpu,cpuacct", "31 1 0:27 / {root}/cg/unified rw - cgroup2 cgroup2 rw")
    tree.at("5:cpu,cpuacct:/pod/c\n0::/\n", *(mount.format(root=tree.root) for mount in mounts))
    tree.write("cg/cpu/pod/c/cpu.cfs_quota_us", "-1\n")
    tree.write("cg/cpu/pod/c/cpu.cfs_period_us", "100000\n")
    tree.write("cg/cpu/pod/cpu.cfs_quota_us", "25000\n")
    tree.write("cg/cpu/pod/cpu.cfs_period_us", "100000\n")

    assert cpus_of(proc=tree.proc) == 0.25


def test_in_a_container_with_its_own_part_mounted(tree: Tree) -> None:
    """The path begins with what is mounted."""
    tree.at("0::/docker/1234\n", f"30 1 0:26 /docker/1234 {tree.root}/cg ro - cgroup2 cgroup ro")
    tree.write("cg/cpu.max", "20000 100000\n")

    assert cpus_of(proc=tree.proc) == 0.2


@pytest.mark.parametrize("text", ["max 100000\n", "nonsense\n", "", "0 0\n", "-1 100000\n"])
def test_no_quota(tree: Tree, text: str) -> None:
    """Then all that it may run on, in whole processors."""
    tree.at("0::/a\n", f"30 1 0:26 / {tree.root}/cg rw - cgroup2 cgroup2 rw")
    tree.write("cg/a/cpu.max", text)

    assert cpus_of(proc=tree.proc) == HERE


def test_nothing_can_be_read(tmp_path: Path) -> None:
    """No /proc, or a path that leaves the mount."""
    assert cpus_of(proc=str(tmp_path / "none")) == HERE
    tree = Tree(tmp_path / "tree")
    tree.at("0::/../../x\n", f"30 1 0:26 / {tree.root}/cg rw - cgroup2 cgroup2 rw")
    assert cpus_of(proc=tree.proc) == HERE
    assert cpus_of(2**22 + 5, str(tmp_path / "none")) is None
