"""Each level of what limits a pool: its cgroup, those above it, and the machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from kernel.trees import MIB, NO_LIMIT_V1, Tree, v1_mount, v2_mount
from needs import need

from oomsafe.kernel import cgroup
from oomsafe.kernel.capacity import read_capacity, read_levels
from oomsafe.kernel.sandbox import Sandbox
from oomsafe.policy.limits import MACHINE, Kind, Level, Source

Figures = tuple[str, int | None, int | None, int | None, int | None]

MEMINFO = f"MemTotal: {8000 * 1024} kB\nMemFree: {1000 * 1024} kB\nMemAvailable: {3000 * 1024} kB\n"
#: The last of every list.
HERE: Figures = ("this machine's memory", 8000, None, 5000, 3000)


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """A machine of 8 000 MiB."""
    tree = Tree(tmp_path)
    tree.write("proc/meminfo", MEMINFO)
    return tree


def nested(tree: Tree) -> list[Figures]:
    """v2: a service throttled by its slice's memory.high, in a slice without a limit, in one that is killed in."""
    tree.at("0::/top/middle/slice/app\n", v2_mount(point="{root}/cg"))
    tree.write("cg/memory.stat", "anon 1\n")  # the root has that one, and neither limit nor use
    tree.v2("cg/top", 900 * MIB, usage=400 * MIB)
    tree.v2("cg/top/middle", usage=350 * MIB)
    tree.v2("cg/top/middle/slice", 600 * MIB, high=500 * MIB, usage=330 * MIB)
    tree.v2("cg/top/middle/slice/app", 700 * MIB)
    return [
        ("/cg/top/middle/slice/app", 700, None, 70, 630),
        ("/cg/top/middle/slice", 600, 500, 300, 200),
        ("/cg/top/middle", None, None, 320, None),
        ("/cg/top", 900, None, 370, 530),
        HERE,
    ]


def above_its_high(tree: Tree) -> list[Figures]:
    """It has more than the kernel wants it to have: there is less than nothing left."""
    tree.at("0::/slice/app\n", v2_mount(point="{root}/cg"))
    tree.v2("cg/slice/app")
    tree.v2("cg/slice", high=50 * MIB)
    return [("/cg/slice/app", None, None, 70, None), ("/cg/slice", None, 50, 70, -20), HERE]


def hierarchy(tree: Tree) -> list[Figures]:
    """v1: the root counts everybody; nothing throttles."""
    tree.at("4:memory:/docker/app\n", v1_mount())
    tree.v1("cg/memory/docker/app", 300 * MIB, own=400 * MIB)
    tree.v1("cg/memory/docker", 300 * MIB, usage=250 * MIB)
    tree.v1("cg/memory", NO_LIMIT_V1, usage=2000 * MIB)
    return [
        ("/cg/memory/docker/app", 400, None, 70, 330),
        ("/cg/memory/docker", 300, None, 220, 80),
        ("/cg/memory", None, None, 1970, None),
        HERE,
    ]


def without_limits(tree: Tree) -> list[Figures]:
    """v1: each has memory files all the same."""
    tree.at("4:memory:/app\n", v1_mount())
    tree.v1("cg/memory/app")
    tree.v1("cg/memory", usage=2000 * MIB)
    return [("/cg/memory/app", None, None, 70, None), ("/cg/memory", None, None, 1970, None), HERE]


def hidden(tree: Tree) -> list[Figures]:
    """v1 tells the smallest limit of all, also of those that a container does not see; who uses what of it, nobody knows."""
    tree.at("4:memory:/docker/abc\n", v1_mount(root="/docker/abc"))
    tree.v1("cg/memory", 300 * MIB, own=500 * MIB)
    return [("/cg/memory", 500, None, 70, 430), ("a cgroup above /cg/memory that can't be seen", 300, None, None, None), HERE]


def not_its_childrens(tree: Tree) -> list[Figures]:
    """v1 before Linux 5.11 (memory.use_hierarchy): a limit that does not count what children use is none of theirs."""
    tree.at("4:memory:/a/b\n", v1_mount())
    tree.v1("cg/memory/a/b", 300 * MIB)
    tree.v1("cg/memory/a", 5 * MIB, usage=40 * MIB)
    tree.v1("cg/memory")
    return [("/cg/memory/a/b", 300, None, 70, 230), ("/cg/memory/a", None, None, 10, None), ("/cg/memory", None, None, 70, None), HERE]


def without_statistics(tree: Tree) -> list[Figures]:
    """v1: which limits hold is not told then, so all that can be seen do; and usage alone is no working set."""
    tree.at("4:memory:/app\n", v1_mount())
    tree.v1("cg/memory/app", 300 * MIB)
    tree.v1("cg/memory")
    (tree.root / "cg/memory/app/memory.stat").unlink()
    return [("/cg/memory/app", 300, None, None, None), ("/cg/memory", None, None, 70, None), HERE]


def no_cgroup(tree: Tree) -> list[Figures]:
    """The machine alone."""
    return [HERE]


def no_meminfo(tree: Tree) -> list[Figures]:
    """A machine that tells nothing (systemd's ProcSubset=pid) is a level all the same."""
    expected = nested(tree)
    (tree.root / "proc/meminfo").unlink()
    return [*expected[:-1], (HERE[0], None, None, None, None)]


SHAPES = [
    nested, above_its_high, hierarchy, without_limits, hidden, not_its_childrens, without_statistics, no_cgroup, no_meminfo,
]  # fmt: skip


def figures(tree: Tree, level: Level) -> Figures:
    """In MiB, and without the tree's root."""
    where = level.source.path if level.source.kind is Kind.CGROUP else str(level.source)
    numbers = (level.limit, level.high, level.used, level.headroom)
    return (where.replace(str(tree.root), ""), *(None if number is None else number // MIB for number in numbers))


@pytest.mark.parametrize("make", SHAPES, ids=lambda make: make.__name__)
def test_levels(tree: Tree, make: Callable[[Tree], list[Figures]]) -> None:
    """Path, limit, high, what is used and what is left, the nearest first; None for what is not there or not known."""
    expected = make(tree)

    levels = read_levels(proc=tree.proc)

    assert [figures(tree, level) for level in levels] == expected
    assert not any(level.unread for level in levels)


@pytest.mark.parametrize("make", SHAPES, ids=lambda make: make.__name__)
def test_a_capacity_has_them_too(tree: Tree, make: Callable[[Tree], list[Figures]]) -> None:
    """All but what is in use at an ancestor without a limit; and its own figures are those of one of them."""
    make(tree)
    whole = read_levels(proc=tree.proc)

    capacity = read_capacity(proc=tree.proc, held=lambda: 50 * MIB)

    unasked = {"used": None, "usage": None, "droppable": 0}
    own = [number == 0 or level.effective is not None or level.source == MACHINE for number, level in enumerate(whole)]
    assert capacity.levels == tuple(level if has else level._replace(**unasked) for level, has in zip(whole, own, strict=True))
    limits = [level.effective for level in whole if level.effective is not None]
    assert capacity.effective == min(limits, default=None)
    assert capacity.limit in (limits or [None])
    assert capacity.limit is None or capacity.source in [level.bound_by for level in whole if level.effective == capacity.limit]


def test_a_level_without_a_limit_costs_nothing(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second: what is in use is asked where it decides something, and for the cgroup itself."""
    asked: list[str] = []
    nested(tree)
    read = cgroup.read_int
    monkeypatch.setattr(cgroup, "read_int", lambda path: asked.append(path.removeprefix(str(tree.root))) or read(path))

    read_capacity(proc=tree.proc)
    assert asked == [f"/cg/{folder}/memory.current" for folder in ("top/middle/slice/app", "top/middle/slice", "top")]


def test_where_it_is_throttled_is_named(tree: Tree) -> None:
    """The file that has the smaller figure, and no other where nothing throttles."""
    nested(tree)

    named = [str(level.bound_by).replace(str(tree.root), "") for level in read_levels(proc=tree.proc)]

    assert named[:2] == ["cgroup v2 /cg/top/middle/slice/app", "memory.high of cgroup v2 /cg/top/middle/slice"]
    assert read_levels(proc=tree.proc)[1].source == Source(Kind.CGROUP, f"{tree.root}/cg/top/middle/slice", 2)


@pytest.mark.parametrize("name", ["memory.max", "memory.high", "memory.limit_in_bytes"])
@pytest.mark.parametrize("how", ["unreadable", "garbage"])
def test_a_limit_that_can_not_be_read(tree: Tree, name: str, how: str) -> None:
    """Not the same as none: it is named, also in the line at boot."""
    if name == "memory.limit_in_bytes":
        tree.at("4:memory:/a/app\n", v1_mount(point="{root}/cg"))
        tree.v1("cg/a/app", 300 * MIB)
        tree.v1("cg/a", 300 * MIB)
        tree.v1("cg")
    else:
        tree.at("0::/a/app\n", v2_mount(point="{root}/cg"))
        tree.v2("cg/a/app", 300 * MIB)
        tree.v2("cg/a", 400 * MIB, high=350 * MIB)
    file = tree.root / "cg/a" / name
    file.unlink()
    # root may read everything, but no folder
    file.mkdir() if how == "unreadable" else file.write_text("rubbish\n")

    level = read_levels(proc=tree.proc)[1]
    capacity = read_capacity(proc=tree.proc)

    assert level.unread == (name,)
    assert (level.high if name == "memory.high" else level.limit) is None
    assert level.used == 70 * MIB
    assert capacity.limit == 300 * MIB
    assert capacity.whence.endswith(f"; {tree.root}/cg/a/{name} can't be read")


@pytest.mark.parametrize("version", [1, 2])
def test_use_that_can_not_be_read(tree: Tree, version: int) -> None:
    """Its limit is known all the same; usage without its page cache is no working set."""
    if version == 1:
        tree.at("4:memory:/a/app\n", v1_mount(point="{root}/cg"))
        tree.v1("cg/a/app", 300 * MIB)
        tree.v1("cg/a", 300 * MIB)
        tree.v1("cg")
        (tree.root / "cg/a/memory.usage_in_bytes").unlink()
    else:
        tree.at("0::/a/app\n", v2_mount(point="{root}/cg"))
        tree.v2("cg/a/app", 300 * MIB)
        tree.v2("cg/a", 300 * MIB)
        (tree.root / "cg/a/memory.current").unlink()

    own, above, *_ = read_levels(proc=tree.proc)

    assert (own.usage, own.used) == (100 * MIB, 70 * MIB)
    assert (above.limit, above.usage, above.used, above.headroom) == (300 * MIB, None, None, None)


def test_usage_without_statistics(tree: Tree) -> None:
    """All that is charged is known, and no more: it may be page cache."""
    without_statistics(tree)

    (own, *_), capacity = read_levels(proc=tree.proc), read_capacity(proc=tree.proc)

    assert (own.usage, own.used, own.droppable) == (100 * MIB, None, 0)
    assert (capacity.limit, capacity.working_set) == (300 * MIB, None)


def test_use_moves_all_the_time(tree: Tree) -> None:
    """Two capacities that differ in nothing else are the same: workers reckon anew where they are not."""
    nested(tree)
    before = read_capacity(proc=tree.proc)
    tree.v2("cg/top", 900 * MIB, usage=450 * MIB)
    after = read_capacity(proc=tree.proc)

    assert before.levels != after.levels
    assert before == after
    assert replace(before, limit=1) != after


@pytest.fixture
def real() -> Iterator[tuple[Sandbox, Sandbox]]:
    """A cgroup of 400 MiB, and in it one of 300."""
    with ExitStack() as stack:
        try:
            outer = stack.enter_context(Sandbox(f"oomsafe-levels-{os.getpid()}", 400 * MIB))
            inner = stack.enter_context(Sandbox("oomsafe-inner", 300 * MIB, inside=outer))
        except OSError as error:
            need(False, f"no memory cgroup can be made: {error}")
        yield outer, inner


LOOK = """
import json, resource
from oomsafe.kernel.capacity import read_capacity, read_levels
kept = b"x" * (40 << 20)
print(json.dumps([[list(map(str, level.source[:2])), *level[1:6]] for level in read_levels()]))
capacity = read_capacity()
print(json.dumps([str(capacity.source), capacity.limit, len(capacity.levels)]))
"""


def test_a_real_cgroup(real: tuple[Sandbox, Sandbox]) -> None:
    """Of this kernel: the two that were made, those above them, and the machine; the figures are the files' own."""
    outer, inner = (sandbox.cgroup for sandbox in real)
    done = subprocess.run(real[1].command([sys.executable, "-c", LOOK]), capture_output=True, text=True, check=True)
    levels, (source, limit, count) = map(json.loads, done.stdout.splitlines())

    folders = [path for (kind, path), *_ in levels if kind == str(Kind.CGROUP)]
    name = "memory.limit_in_bytes" if inner.version == 1 else "memory.max"
    assert folders == [folder for folder in inner.ancestry() if os.path.exists(f"{folder}/{name}")]
    assert folders[:2] == [inner.path, outer.path]
    assert [row[1] for row in levels[:2]] == [300 * MIB, 400 * MIB]
    for _, _, high, used, _, usage in levels[:2]:
        assert high is None
        assert 40 * MIB <= used <= usage <= 300 * MIB
    assert levels[-1][0][0] == str(Kind.MACHINE)
    assert levels[-1][1] == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert (source, limit, count) == (f"cgroup v{inner.version} {inner.path}", 300 * MIB, len(levels))
