"""The memory cgroup and its limit, read from captured trees."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kernel.trees import MIB, NO_LIMIT_V1, Tree, v1_mount, v2_mount
from needs import need

from oomsafe.kernel.capacity import read_capacity
from oomsafe.kernel.cgroup import Cgroup, find_cgroup
from oomsafe.kernel.files import read_int, read_keyed
from oomsafe.policy.limits import Kind, Level, Source, tightest

Said = Callable[[], list[str]]


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """An empty one: no cgroups, no meminfo."""
    return Tree(tmp_path)


def found(tree: Tree) -> Cgroup:
    """The cgroup of the tree's process."""
    cgroup = find_cgroup(proc=tree.proc)
    assert cgroup is not None
    return cgroup


def smallest(cgroup: Cgroup) -> int | None:
    """The smallest of its own and its ancestors'."""
    return min((level.effective for level in cgroup.levels() if level.effective is not None), default=None)


def v2(tree: Tree) -> None:
    """A service under systemd."""
    tree.at("0::/system.slice/app.service\n", v2_mount(point="{root}/cg"))
    tree.v2("cg/system.slice/app.service", 300 * MIB, kills=2)


def v1(tree: Tree) -> None:
    """A v1 machine."""
    tree.at("9:pids:/x\n4:memory:/app\n1:name=systemd:/init\n", v1_mount("cpu", point="{root}/cg/cpu"), v1_mount())
    tree.v1("cg/memory/app", 300 * MIB, kills=2)


def joined(tree: Tree) -> None:
    """Controllers that are mounted together."""
    tree.at("2:cpu,cpuacct,memory:/app\n", v1_mount("cpu,cpuacct,memory", point="{root}/cg/cpu,cpuacct,memory"))
    tree.v1("cg/cpu,cpuacct,memory/app", 300 * MIB, kills=2)


def hybrid(tree: Tree) -> None:
    """cgroup2 is mounted beside v1, without memory: also when its line comes first."""
    tree.at("0::/app\n4:memory:/app\n", v2_mount(), v1_mount())
    tree.v1("cg/memory/app", 300 * MIB, kills=2)
    (tree.root / "cg/unified/app").mkdir(parents=True)


def container_v1(tree: Tree) -> None:
    """The mount's root is the container's own cgroup."""
    tree.at("4:memory:/docker/abc\n", v1_mount(root="/docker/abc"))
    tree.v1("cg/memory", 300 * MIB, kills=2)


def container_v2(tree: Tree) -> None:
    """With a cgroup namespace it is the root of everything seen."""
    tree.at("0::/\n", v2_mount(point="{root}/cg"))
    tree.v2("cg", 300 * MIB, kills=2)


def inside_a_container(tree: Tree) -> None:
    """A service below the container's cgroup."""
    tree.at("4:memory:/docker/abc/app\n", v1_mount(root="/docker/abc"))
    tree.v1("cg/memory", NO_LIMIT_V1)
    tree.v1("cg/memory/app", 300 * MIB, kills=2)


def spaces(tree: Tree) -> None:
    """mountinfo writes them as octal."""
    tree.at("0::/my app\n", v2_mount(point=r"{root}/my\040cg\011\134x"))
    tree.v2("my cg\t\\x/my app", 300 * MIB, kills=2)


def colons(tree: Tree) -> None:
    """A path may hold colons."""
    tree.at("0::/a:b:c\n", v2_mount(point="{root}/cg"))
    tree.v2("cg/a:b:c", 300 * MIB, kills=2)


def without_the_controller(tree: Tree) -> None:
    """It is charged to the nearest ancestor that has it."""
    tree.at("0::/app/worker/deep\n", v2_mount(point="{root}/cg"))
    tree.v2("cg/app", 300 * MIB, kills=2)
    (tree.root / "cg/app/worker/deep").mkdir(parents=True)


def of_the_host(tree: Tree) -> None:
    """In a namespace of its own the names on the way down to it are not told: its folder is the one that names this process."""
    tree.at("0::/\n", v2_mount(root="/../..", point="{root}/cg"))
    tree.v2("cg/system/app", 300 * MIB, kills=2)
    tree.v2("cg/system/other", 5 * MIB)
    tree.write("cg/system/other/cgroup.procs", "1\n0\n")
    tree.write("cg/system/app/cgroup.procs", f"0\n{os.getpid()}\n")


def of_the_host_v1(tree: Tree) -> None:
    """The same in v1, and the process is further below."""
    tree.at("4:memory:/inner\n", v1_mount(root="/.."))
    tree.v1("cg/memory/docker/inner", 300 * MIB, kills=2)
    tree.write("cg/memory/docker/inner/cgroup.procs", f"{os.getpid()}\n")


def moved_out(tree: Tree) -> None:
    """Into a sibling of its namespace's root, and the mount shows both."""
    tree.at("0::/../app\n", v2_mount(root="/..", point="{root}/cg"))
    tree.v2("cg/app", 300 * MIB, kills=2)


def ancestor(tree: Tree) -> None:
    """The smallest limit on the way up counts."""
    tree.at("0::/a/b/c\n", v2_mount(point="{root}/cg"))
    tree.v2("cg/a/b/c", 900 * MIB, kills=2)
    tree.v2("cg/a/b", "max")
    tree.v2("cg/a", 300 * MIB)


def throttled(tree: Tree) -> None:
    """memory.high is a limit, wherever it is the smaller one."""
    tree.at("0::/a/b\n", v2_mount(point="{root}/cg"))
    tree.v2("cg/a/b", 400 * MIB, kills=2)
    tree.v2("cg/a", 350 * MIB, high=300 * MIB)


SEEN = [
    v2, v1, joined, hybrid, container_v1, container_v2, inside_a_container, spaces, colons, ancestor, throttled,
    without_the_controller, of_the_host, of_the_host_v1, moved_out,
]  # fmt: skip


@pytest.mark.parametrize("make", SEEN, ids=lambda make: make.__name__)
def test_seen(tree: Tree, make: Callable[[Tree], None], said: Said) -> None:
    """Wherever it is: limit, usage, working set and kills, and nothing to warn of."""
    make(tree)

    cgroup = found(tree)

    assert (smallest(cgroup), cgroup.use().usage, cgroup.use().working_set, cgroup.oom_kills()) == (300 * MIB, 100 * MIB, 70 * MIB, 2)
    assert said() == []


@pytest.mark.parametrize("path", ["/../../outside", "/..", "/gone"])
def test_above_what_is_mounted(tree: Tree, path: str, said: Said) -> None:
    """A cgroup that can't be seen: the mount point's figures, and one warning that says so."""
    tree.at(f"0::{path}\n", v2_mount(point="{root}/cg"))
    tree.v2("cg", 300 * MIB)
    tree.v2("outside", 5 * MIB)

    cgroups = [found(tree), found(tree)]

    assert [smallest(cgroup) for cgroup in cgroups] == [300 * MIB] * 2
    (line,) = said()
    assert f"the cgroup {path} can't be seen" in line


def test_what_begins_above_its_namespace_and_is_not_found(tree: Tree, said: Said) -> None:
    """The root's figures are everybody's: it has none, and one line says so."""
    tree.at("0::/\n", v2_mount(root="/../..", point="{root}/cg"))
    tree.v2("cg/system/other", 5 * MIB)

    assert [find_cgroup(proc=tree.proc), find_cgroup(proc=tree.proc)] == [None, None]
    (line,) = said()
    assert "the cgroup / can't be seen below" in line
    assert line.endswith("its limits and what it uses are not known")


@pytest.mark.parametrize("line", ["0::/app\n", "4:memory:/app\n"])
def test_no_cgroups_are_mounted(tree: Tree, said: Said, line: str) -> None:
    """Somebody else may have limited it: one line says that it can't be seen."""
    tree.at(line)

    assert [find_cgroup(proc=tree.proc), find_cgroup(proc=tree.proc)] == [None, None]
    assert said() == ["no memory cgroups are mounted here, and this process is in one: its limit can't be seen"]


def level(limit: int | None, used: int | None, high: int | None = None) -> Level:
    """One of no matter where."""
    return Level(Source(Kind.CGROUP, f"{limit} of which {used}", 2), limit, high, used)


@pytest.mark.parametrize(
    ("levels", "which"),
    [
        pytest.param([level(300, 100)], 0, id="one"),
        pytest.param([level(300, 100), level(400, 250)], 1, id="what others leave of an ancestor's"),
        pytest.param([level(300, 100), level(400, 150)], 0, id="they leave more"),
        pytest.param([level(300, 100), level(300, 100)], 0, id="the nearest of equals"),
        pytest.param([level(3000, 1000), level(3000, 1010)], 0, id="which are read one after the other"),
        pytest.param([level(300, 100), level(290, None)], 1, id="where nobody knows, the pool's own is used"),
        pytest.param([level(None, 999), level(300, 100)], 1, id="what has no limit limits nobody"),
        pytest.param([level(300, 100), level(900, 100, high=250)], 1, id="the kernel throttles before it kills"),
    ],
)
def test_the_tightest_level(levels: list[Level], which: int) -> None:
    """The one with the smallest headroom, whose limit need not be the smallest."""
    assert tightest(levels, 100) == levels[which]


def test_none_of_no_levels() -> None:
    """Nothing limits it."""
    assert tightest([], 0) is None
    assert tightest([level(None, 100)], 0) is None


@pytest.mark.parametrize("version", [1, 2])
def test_an_ancestors_limit_goes_with_its_use(tree: Tree, version: int) -> None:
    """A parent of 400 MiB, of which a sibling uses 290, leaves less than the cgroup's own 300: both figures are the parent's."""
    if version == 1:
        tree.at("4:memory:/a/b\n", v1_mount())
        tree.v1("cg/memory/a/b", 300 * MIB)
        tree.v1("cg/memory/a", 400 * MIB, usage=390 * MIB)
        tree.v1("cg/memory", NO_LIMIT_V1, usage=1000 * MIB)
    else:
        tree.at("0::/a/b\n", v2_mount(point="{root}/cg/memory"))
        tree.v2("cg/memory/a/b", 300 * MIB)
        tree.v2("cg/memory/a", 400 * MIB, usage=390 * MIB)
    tree.write("proc/meminfo", "MemTotal: 8388608 kB\nMemAvailable: 4194304 kB\n")

    capacity = read_capacity(proc=tree.proc)

    assert str(capacity.source) == f"cgroup v{version} {tree.root}/cg/memory/a"
    assert (capacity.limit, capacity.working_set) == (400 * MIB, 360 * MIB)
    assert (capacity.others, capacity.room, capacity.held) == (290 * MIB, 110 * MIB, 70 * MIB)
    assert capacity.effective == 300 * MIB
    assert capacity.whence == f"{capacity.source}, others use 290 MiB"


@pytest.mark.parametrize("version", [1, 2])
def test_what_the_kernel_drops_before_it_kills(tree: Tree, version: int) -> None:
    """Page cache that was used lately is in use, and yet no reason to kill."""
    if version == 1:
        tree.at("4:memory:/a\n", v1_mount())
        tree.v1("cg/memory/a", 300 * MIB)
        stat = tree.root / "cg/memory/a/memory.stat"
        stat.write_text(f"{stat.read_text()}total_active_file {50 * MIB}\nactive_file 1\n")
    else:
        tree.at("0::/a\n", v2_mount(point="{root}/cg/memory"))
        tree.v2("cg/memory/a", 300 * MIB)
        stat = tree.root / "cg/memory/a/memory.stat"
        stat.write_text(f"{stat.read_text()}active_file {50 * MIB}\n")
    tree.write("proc/meminfo", "MemTotal: 8388608 kB\nMemAvailable: 4194304 kB\n")

    capacity = read_capacity(proc=tree.proc)

    assert (capacity.working_set, capacity.undroppable) == (70 * MIB, 20 * MIB)


def test_memory_high_is_named(tree: Tree) -> None:
    """Who reads the line looks for the file that has the figure."""
    throttled(tree)

    assert str(read_capacity(proc=tree.proc).source) == f"memory.high of cgroup v2 {tree.root}/cg/a"


@pytest.mark.parametrize(
    ("groups", "expected"),
    [({}, None), ({"a": 0, "a/b": 0}, None), ({"a/b": 1}, "a/b"), ({"a": 1}, "a"), ({"a": 1, "a/b": 1}, "a/b")],
    ids=str,
)
def test_who_dies_whole(tree: Tree, groups: dict[str, int], expected: str | None) -> None:
    """The nearest level with memory.oom.group; the root has no such file, nor has a kernel before 4.19."""
    tree.at("0::/a/b\n", v2_mount(point="{root}/cg"))
    tree.v2("cg/a")
    tree.v2("cg/a/b", 300 * MIB)
    for folder, group in groups.items():
        tree.write(f"cg/{folder}/memory.oom.group", f"{group}\n")

    assert found(tree).dies_whole() == (expected and f"{tree.root}/cg/{expected}")


def test_what_a_container_does_not_see(tree: Tree) -> None:
    """Its own cgroup is the root of all that it sees, and only the real root has no limit: there may be others above."""
    container_v2(tree)
    tree.write("proc/meminfo", "MemTotal: 8388608 kB\nMemAvailable: 4194304 kB\n")

    assert read_capacity(proc=tree.proc).whence == f"cgroup v2 {tree.root}/cg; limits above {tree.root}/cg can't be seen"


def test_a_limit_above_what_is_mounted(tree: Tree) -> None:
    """v1 tells the smallest limit of all ancestors, also of those that a container does not see; who else is below it, it does not."""
    tree.at("4:memory:/docker/abc\n", v1_mount(root="/docker/abc"))
    tree.v1("cg/memory", 300 * MIB, own=NO_LIMIT_V1)

    capacity = read_capacity(proc=tree.proc)

    assert (capacity.limit, capacity.held, capacity.others) == (300 * MIB, 70 * MIB, None)
    assert capacity.whence == (f"a cgroup above {tree.root}/cg/memory that can't be seen; what others use below that limit can't be seen")


def test_an_ancestor_that_does_not_count_its_children(tree: Tree) -> None:
    """Before Linux 5.11 (memory.use_hierarchy): a limit below the smallest that holds does not hold."""
    tree.at("4:memory:/a/b\n", v1_mount())
    tree.v1("cg/memory/a/b", 300 * MIB)
    tree.v1("cg/memory/a", 5 * MIB)

    assert smallest(found(tree)) == 300 * MIB


def test_others_use_the_machine(tree: Tree) -> None:
    """What is available and what the pool holds is its room, also for a pool whose cgroup would allow more."""
    tree.at("0::/app\n", v2_mount(point="{root}/cg"))
    tree.v2("cg/app", 900 * MIB)
    tree.write("proc/meminfo", f"MemTotal: {1000 * 1024} kB\nMemAvailable: {200 * 1024} kB\n")

    capacity = read_capacity(proc=tree.proc, held=lambda: 60 * MIB)

    assert (capacity.limit, str(capacity.source), capacity.others) == (1000 * MIB, "this machine's memory", 740 * MIB)
    assert (capacity.room, capacity.held, capacity.effective) == (260 * MIB, 60 * MIB, 900 * MIB)


def test_a_pool_that_shares_much_has_no_more_than_the_machine(tree: Tree) -> None:
    """What its processes share may be counted for each: then nothing is left for others, and no less."""
    tree.write("proc/meminfo", f"MemTotal: {1000 * 1024} kB\nMemAvailable: {200 * 1024} kB\n")

    capacity = read_capacity(proc=tree.proc, held=lambda: 5000 * MIB)

    assert (capacity.room, capacity.held) == (1000 * MIB, 800 * MIB)


def test_the_cgroup_is_found_again(tree: Tree) -> None:
    """When the process has been moved to another, and when its own is gone."""
    v2(tree)
    assert found(tree).path.endswith("app.service")
    tree.v2("cg/elsewhere")
    tree.write("proc/self/cgroup", "0::/elsewhere\n")
    assert found(tree).path.endswith("elsewhere")
    shutil.rmtree(tree.root / "cg/elsewhere")
    assert find_cgroup(proc=tree.proc) is None


def nothing(tree: Tree) -> None:
    """No /proc/self/cgroup at all."""


def no_memory(tree: Tree) -> None:
    """Controllers, but not this one."""
    tree.at("3:cpu:/\n0::/\n", v1_mount("cpu"), v2_mount())
    (tree.root / "cg/unified").mkdir(parents=True)


def not_mounted(tree: Tree) -> None:
    """A memory line, and no mount."""
    tree.at("4:memory:/\n")


def garbage(tree: Tree) -> None:
    """Lines of no known form."""
    tree.at("hello\n\n:::\n4:memory\n0::\n", "1 2 3", "- -", "35 31 0:32 / - cgroup")


@pytest.mark.parametrize("make", [nothing, no_memory, not_mounted, garbage], ids=lambda make: make.__name__)
def test_no_memory_controller(tree: Tree, make: Callable[[Tree], None]) -> None:
    """None, and the machine's memory is the limit."""
    make(tree)
    tree.write("proc/meminfo", "MemTotal:       8388608 kB\nMemFree: 1 kB\nMemAvailable:    2097152 kB\n")

    capacity = read_capacity(proc=tree.proc, workers=3)

    assert find_cgroup(proc=tree.proc) is None
    assert (capacity.limit, str(capacity.source), capacity.working_set, capacity.workers) == (
        8192 * MIB,
        "this machine's memory",
        6144 * MIB,
        3,
    )


@pytest.mark.parametrize(
    ("limit", "total", "expected"),
    [(300 * MIB, 1024, 300 * MIB), (2048 * MIB, 1024, 1024 * MIB), ("max", 1024, 1024 * MIB), (300 * MIB, None, 300 * MIB)],
    ids=["cgroup", "bigger-than-the-machine", "no-limit", "no-meminfo"],
)
def test_capacity(tree: Tree, limit: int | str, total: int | None, expected: int) -> None:
    """The smaller of the cgroup's limit and the machine's memory, and it says which."""
    tree.at("0::/app\n", v2_mount(point="{root}/cg"))
    tree.v2("cg/app", limit)
    if total is not None:
        tree.write("proc/meminfo", f"MemTotal: {total * 1024} kB\n")

    capacity = read_capacity(proc=tree.proc, held=lambda: 50 * MIB)

    assert expected == capacity.limit
    own = expected == limit
    assert (f"cgroup v2 {tree.root}/cg/app" if own else "this machine's memory") == str(capacity.source)
    assert (70 * MIB if own else 50 * MIB) == capacity.held
    assert (0 if own else None) == capacity.others


def test_nothing_is_known(tree: Tree) -> None:
    """None, never 0."""
    capacity = read_capacity(proc=tree.proc)

    assert (capacity.limit, capacity.working_set) == (None, None)


@pytest.mark.parametrize(("limit", "expected"), [(NO_LIMIT_V1, None), ((1 << 63) - 1, None), (300 * MIB, 300 * MIB)])
def test_v1_without_a_limit(tree: Tree, limit: int, expected: int | None) -> None:
    """The sentinel is no number of bytes."""
    tree.at("4:memory:/\n", v1_mount())
    tree.v1("cg/memory", limit)

    assert expected == smallest(found(tree))


@pytest.mark.parametrize("version", [1, 2])
def test_the_working_set_is_not_negative(tree: Tree, version: int) -> None:
    """The two figures are read one after the other, and statistics lag."""
    tree.at("4:memory:/\n" if version == 1 else "0::/\n", v1_mount(), v2_mount())
    (tree.v1 if version == 1 else tree.v2)("cg/memory" if version == 1 else "cg/unified", usage=10, inactive=11)

    assert (version, 0) == (found(tree).version, found(tree).use().working_set)


def test_garbage_is_no_figure(tree: Tree, said: Said) -> None:
    """None, and one warning for each file, however often it is read."""
    v2(tree)
    for name in ("memory.max", "memory.current"):
        tree.write(f"cg/system.slice/app.service/{name}", "rubbish\n")

    for _ in range(3):
        cgroup = found(tree)
        assert (smallest(cgroup), cgroup.use().usage, cgroup.use().working_set) == (None, None, None)

    assert len(said()) == 2
    assert all("'rubbish\\n'" in line for line in said())


def test_files_that_vanish(tree: Tree, said: Said) -> None:
    """A cgroup whose files are gone has no figures, and that is said once."""
    v2(tree)
    cgroup = found(tree)
    for path in Path(cgroup.path).iterdir():
        path.unlink()

    assert (smallest(cgroup), cgroup.use().usage, cgroup.use().working_set, cgroup.oom_kills()) == (None, None, None, None)
    assert said() == [f"{cgroup.path}/memory.current can't be read: what is in use there is unknown"]


def test_statistics_that_vanish(tree: Tree) -> None:
    """Usage alone is no working set: with page cache it is far above."""
    v2(tree)
    cgroup = found(tree)
    Path(cgroup.path, "memory.stat").unlink()

    assert cgroup.use().working_set is None


@given(st.text(max_size=200), st.text(max_size=200))
def test_any_text_is_read(tmp_path_factory: pytest.TempPathFactory, cgroup: str, mountinfo: str) -> None:
    """Law: whatever these files hold, an answer comes, and no exception."""
    tree = Tree(tmp_path_factory.mktemp("tree"))
    (tree.root / "proc/self/cgroup").write_bytes(cgroup.encode("utf-8", "replace"))
    (tree.root / "proc/self/mountinfo").write_bytes(mountinfo.encode("utf-8", "replace"))

    assert find_cgroup(proc=tree.proc) is None


@given(st.dictionaries(st.from_regex("[a-z_()]{1,12}", fullmatch=True), st.integers(0, 1 << 63), max_size=6), st.sampled_from([1, 1024]))
def test_keyed_files_round_trip(tmp_path_factory: pytest.TempPathFactory, table: dict[str, int], factor: int) -> None:
    """Law: both forms of ``key value``, and nothing of lines that are neither."""
    path = tmp_path_factory.mktemp("keyed") / "file"
    form = "{}: {} kB\n" if factor == 1024 else "{} {}\n"
    path.write_text("".join(form.format(key, value) for key, value in table.items()) + "odd line here\nalone\n\n")

    assert {key: value * factor for key, value in table.items()} == read_keyed(str(path), factor)


@pytest.mark.parametrize("text", ["12\n", " 12 ", "12"])
def test_one_number(tmp_path: Path, text: str) -> None:
    """As kernel files hold it."""
    (tmp_path / "file").write_text(text)

    assert read_int(str(tmp_path / "file")) == 12
    assert read_int(str(tmp_path / "missing")) is None


def test_this_machine() -> None:
    """The real thing: figures of a sensible size, and the working set no more than what is used."""
    need(os.path.exists("/proc/meminfo"), "no /proc here")

    capacity = read_capacity()

    assert capacity.limit is not None
    assert capacity.limit > 32 * MIB
    assert capacity.working_set is None or 0 <= capacity.working_set <= 2 * capacity.limit
