"""Processes: their memory, their start, their name, their score; captured, real, and against psutil as an oracle."""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from needs import need
from unit.children import Child, Line, in_child

from oomsafe import log
from oomsafe.errors import ScoreRefused
from oomsafe.kernel import malloc, oom_score, process
from oomsafe.kernel.oom_score import raise_score, read_score, write_score
from oomsafe.kernel.process import (
    COMM_LENGTH,
    PAGE,
    TRIES,
    OwnMemory,
    Shares,
    anonymous_of,
    children_of,
    file_dirty_of,
    held_of,
    is_alive,
    may_become_another_user,
    peak_rss_of,
    rss_of,
    set_comm,
    shared_out,
    shared_with_parent,
    sizes_of,
    start_of_child,
    start_time,
)

MIB = 1 << 20
CAP_SYS_RESOURCE = 24


@pytest.fixture(autouse=True)
def _proc() -> None:
    need(os.path.exists("/proc/self/statm"), "no /proc here")


def stat_of(comm: str, state: str = "S", started: int = 4711) -> str:
    """/proc/PID/stat as the kernel writes it (proc(5))."""
    return f"42 ({comm}) {state} 1 42 42 0 -1 4194560 9 0 0 0 1 2 0 0 20 0 1 0 {started} 10 20 18446744073709551615 1 1 0 0\n"


def captured(root: Path, pid: int | str, **files: str) -> str:
    """A proc with one process."""
    folder = root / "proc" / str(pid)
    folder.mkdir(parents=True, exist_ok=True)
    (root / "proc/self").mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    return str(root / "proc")


def resident(own: OwnMemory) -> int | None:
    """What a process has resident by its own word."""
    sizes = own.sizes()
    return None if sizes is None else sizes[0]


@pytest.mark.parametrize("comm", ["python3", "my app", ") (", "a) S 1 (b", ":-) ) 9", ""])
def test_any_name_in_stat(tmp_path: Path, comm: str) -> None:
    """A name may hold spaces and parentheses: the start time is found all the same."""
    proc = captured(tmp_path, 42, stat=stat_of(comm))

    assert start_time(42, proc) == 4711
    assert is_alive(42, 4711, proc)
    assert is_alive(42, 0, proc)
    assert not is_alive(42, 4712, proc)


@pytest.mark.parametrize(("state", "expected"), [("R", True), ("S", True), ("D", True), ("T", True), ("Z", False), ("X", False)])
def test_alive_by_state(tmp_path: Path, state: str, expected: bool) -> None:
    """A zombie does not run any more."""
    proc = captured(tmp_path, 42, stat=stat_of("x", state))

    assert expected is is_alive(42, 4711, proc)


@pytest.mark.parametrize("text", ["", "garbage", "42 (x", "42 (x) S", "42 (x) S 1 2 3"])
def test_no_stat(tmp_path: Path, text: str) -> None:
    """What can't be read is None, and not alive."""
    proc = captured(tmp_path, 42, stat=text, statm=text)

    assert (start_time(42, proc), rss_of(42, proc), is_alive(42, 4711, proc)) == (None, None, False)
    assert (start_time(43, proc), rss_of(43, proc), is_alive(43, 4711, proc)) == (None, None, False)


@given(st.binary(max_size=120))
def test_any_stat(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    """Law: whatever the file holds, an answer comes."""
    root = tmp_path_factory.mktemp("stat")
    proc = captured(root, 42)
    (root / "proc/42/stat").write_bytes(raw)
    (root / "proc/42/statm").write_bytes(raw)

    start_time(42, proc)
    rss_of(42, proc)
    assert is_alive(42, 1 << 70, proc) is False


def test_captured_figures(tmp_path: Path) -> None:
    """statm counts pages, status and smaps_rollup kB."""
    files = {
        "statm": "5000 2500 900 1 0 700 0\n",
        "status": "Name:\tx\nVmHWM:\t   9999 kB\nVmRSS:\t 5 kB\n",
        "smaps_rollup": "55d0-7ffd ---p 00 00:00 0 [rollup]\nRss: 9000 kB\nPss: 5000 kB\nShared_Dirty: 700 kB\n"
        "Private_Clean: 100 kB\nPrivate_Dirty: 4000 kB\n",
    }
    proc = captured(tmp_path, 42, **files)

    expected = Shares(pss=5000 * 1024, uss=4100 * 1024, private=4000 * 1024, held=5000 * 1024)
    assert (rss_of(42, proc), peak_rss_of(42, proc), shared_out(42, proc)) == (2500 * PAGE, 9999 * 1024, expected)
    assert (sizes_of(42, proc), held_of(42, proc)) == ((2500 * PAGE, 2500 * PAGE), 2500 * PAGE)
    assert (sizes_of(43, proc), held_of(43, proc)) == (None, None)
    assert (peak_rss_of(43, proc), shared_out(43, proc)) == (None, None)
    assert (anonymous_of(42, proc), shared_with_parent(42, proc)) == (1600 * PAGE, 700 * 1024)
    assert (anonymous_of(43, proc), shared_with_parent(43, proc)) == (None, None)


def test_captured_file_pages(tmp_path: Path) -> None:
    """Linux 5.4 tells apart what file pages there are, and status since 4.5; what of them is dirty is a writer's, not who reads them."""
    files = {
        "statm": "5000 2500 1500 1 0 700 0\n",
        "status": "Name:\tx\nVmRSS:\t   10000 kB\nRssAnon:\t    4000 kB\nRssFile:\t    5000 kB\nRssShmem:\t    1000 kB\n",
        "smaps_rollup": "55d0-7ffd ---p 00 00:00 0 [rollup]\nRss: 10000 kB\nPss: 7000 kB\nPss_Anon: 3000 kB\nPss_File: 3500 kB\n"
        "Pss_Shmem: 500 kB\nShared_Dirty: 1800 kB\nPrivate_Clean: 2000 kB\nPrivate_Dirty: 3500 kB\n",
        "smaps": "1-2 rw-p 00 00:00 0 [heap]\nPrivate_Dirty: 2000 kB\nVmFlags: rd wr\n"
        "2-3 r--s 00 fd:01 42 /srv/fresh index\nShared_Dirty: 300 kB\nPrivate_Dirty: 500 kB\nVmFlags: rd sh\n"
        "3-4 rw-s 00 fd:01 43 /srv/a rw-s: file\nShared_Dirty: 100 kB\nPrivate_Dirty: 40 kB\nVmFlags: rd wr sh\n"
        "4-5 rw-s 00 00:01 44 /dev/zero (deleted)\nShared_Dirty: 1000 kB\nPrivate_Dirty: 0 kB\nVmFlags: rd wr sh\n",
    }
    proc = captured(tmp_path, 42, **files)

    assert (sizes_of(42, proc), held_of(42, proc)) == ((10000 * 1024, 5000 * 1024), 5000 * 1024)
    # dirty: 5300, of which 5000 are anonymous or shared memory
    expected = Shares(pss=7000 * 1024, uss=5500 * 1024, private=3200 * 1024, held=3500 * 1024)
    assert shared_out(42, proc) == expected
    assert (file_dirty_of(42, proc), file_dirty_of(43, proc)) == (140 * 1024, None)


@pytest.mark.parametrize(("kind", "held", "dirty"), [("read", False, False), ("written", False, True), ("shared", True, False)])
def test_what_is_mapped(kind: str, held: bool, dirty: bool) -> None:
    """A file that is read or written is resident, and not held; shared memory is. Only who has written to a file has made it dirty."""
    need(file_dirty_of() is not None, "smaps can't be read here")
    size = 64 * MIB
    with tempfile.TemporaryFile(dir="/var/tmp") as file:
        file.write(bytes(size))
        need(not in_memory(file.fileno()), "/var/tmp is in memory: pages of its files are shared memory")
        prot = mmap.PROT_READ if kind == "read" else mmap.PROT_READ | mmap.PROT_WRITE
        before, dirty_before = sizes_of() or (0, 0), file_dirty_of() or 0
        with mmap.mmap(-1 if kind == "shared" else file.fileno(), size, prot=prot) as pages:
            for at in range(0, size, PAGE):
                if kind == "read":
                    _ = pages[at]
                else:
                    pages[at] = 1
            # before the kernel has written any of it
            dirty_after, after = file_dirty_of() or 0, sizes_of() or (0, 0)

    assert after[0] - before[0] == pytest.approx(size, abs=8 * MIB)
    assert after[1] - before[1] == pytest.approx(size if held else 0, abs=8 * MIB)
    assert (dirty_after - dirty_before > 16 * MIB) is dirty


def in_memory(fd: int) -> bool:
    """Whether the file lies on a tmpfs, as the mount of its device says."""
    device = os.fstat(fd).st_dev
    mounts = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    kinds = {fields[2]: fields[fields.index("-") + 1] for fields in mounts}
    return kinds.get(f"{os.major(device)}:{os.minor(device)}") in ("tmpfs", "ramfs")


@pytest.mark.parametrize(("right_at", "believed"), [(1, True), (2, True), (TRIES, True), (TRIES + 1, False)])
def test_a_rollup_that_is_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, right_at: int, believed: bool) -> None:
    """Linux 6.1 leaves mappings out while a thread maps memory: it is held against statm and read again, so many times."""

    def rollup(rss: int) -> str:
        return f"55d0-7ffd ---p 00 00:00 0 [rollup]\nRss: {rss} kB\nPss: {rss} kB\nShared_Dirty: 4 kB\nPrivate_Dirty: {rss} kB\n"

    proc = captured(tmp_path, 42, statm="90000 75000 900 1 0 700 0\n", smaps_rollup=rollup(9000))
    reads: list[str] = []
    plain = process.read_keyed

    def reading(path: str, factor: int = 1) -> dict[str, int]:
        reads.append(path)
        if len(reads) == right_at:
            captured(tmp_path, 42, smaps_rollup=rollup(299_000))
        return plain(path, factor)

    monkeypatch.setattr(process, "read_keyed", reading)
    shares = shared_out(42, proc)

    assert len(reads) == min(right_at, TRIES)
    assert (shares.uss if shares else None) == (299_000 * 1024 if believed else None)


def test_what_a_fork_shares() -> None:
    """A child shares what its parent has, until it writes to it."""
    need(shared_with_parent() is not None, "smaps_rollup can't be read here")
    block = bytearray(64 * MIB)
    block[::PAGE] = b"x" * len(block[::PAGE])
    assert (anonymous_of(os.getpid()) or 0) > 64 * MIB

    def write() -> tuple[int, int]:
        before = shared_with_parent() or 0
        block[::PAGE] = b"y" * len(block[::PAGE])
        return before, shared_with_parent() or 0

    before, after = in_child(write)

    assert before >= 64 * MIB
    assert before - after >= 63 * MIB


def test_against_psutil() -> None:
    """The same process, asked by somebody else."""
    other = psutil.Process()
    own = OwnMemory()

    rss, theirs = resident(own), other.memory_info().rss

    assert rss is not None
    assert abs(rss - theirs) < 4 * MIB
    assert abs((rss_of(os.getpid()) or 0) - theirs) < 4 * MIB
    assert abs((start_time() or 0) / os.sysconf("SC_CLK_TCK") - (other.create_time() - psutil.boot_time())) < 2
    own.close()


def test_pss_and_uss_against_psutil() -> None:
    """Where smaps_rollup may be read."""
    ours = shared_out()
    need(ours is not None, "smaps_rollup can't be read here")
    assert ours is not None

    theirs = psutil.Process().memory_full_info()

    assert abs(ours[0] - theirs.pss) < 4 * MIB
    assert abs(ours[1] - theirs.uss) < 4 * MIB
    assert ours[1] <= ours[0] <= theirs.rss + MIB


def test_a_fork_tells_of_itself() -> None:
    """The kept descriptor is the parent's: a child that grew reports its own memory, and the parent its own."""
    own = OwnMemory()
    before = resident(own)

    def grow() -> tuple[int, int]:
        kept = bytearray(b"x") * (64 * MIB)
        return resident(own) or 0, len(kept)

    childs, _ = in_child(grow)

    after = resident(own)
    assert before is not None
    assert after is not None
    assert childs > after + 48 * MIB
    assert abs(after - before) < 16 * MIB
    own.close()


def test_a_closed_one_opens_again() -> None:
    """And keeps one descriptor, however often it is asked."""
    own = OwnMemory()
    resident(own)
    count = len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        resident(own)
    assert count == len(os.listdir("/proc/self/fd"))

    own.close()
    own.close()

    assert count - 1 == len(os.listdir("/proc/self/fd"))
    assert resident(own) is not None
    own.close()


def test_without_proc(tmp_path: Path) -> None:
    """macOS: psutil answers."""
    own = OwnMemory(proc=str(tmp_path))

    assert abs((resident(own) or 0) - psutil.Process().memory_info().rss) < 4 * MIB
    assert in_child(lambda: resident(own)) > MIB


def test_alive_without_proc(tmp_path: Path) -> None:
    """The best that can be asked: whether the pid is taken."""
    with Child(lambda line: line.hear()) as child:
        assert is_alive(child.pid, 4711, str(tmp_path))
        child.kill()
        assert not is_alive(child.pid, 4711, str(tmp_path))


def test_a_zombie_is_not_alive() -> None:
    """A real one: dead, not yet reaped."""
    with Child(lambda line: line.say(start_time())) as child:
        started = child.hear()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)

        assert not is_alive(child.pid, started)
        assert start_time(child.pid) == started


@pytest.mark.parametrize(("name", "expected"), [("oomsafe-w3-a1b2", "oomsafe-w3-a1b2"), ("x" * 20, "x" * 15), ("caf\u00e9", "caf?")])
def test_a_name_for_real(name: str, expected: str) -> None:
    """The kernel keeps fifteen bytes; the parent's own name stays."""
    before = Path("/proc/self/comm").read_text()

    def call_it() -> tuple[bool, str]:
        return set_comm(name), Path("/proc/self/comm").read_text()

    assert (True, expected + "\n") == in_child(call_it)
    assert before == Path("/proc/self/comm").read_text()
    assert len(expected) <= COMM_LENGTH


def test_no_name_without_proc(tmp_path: Path) -> None:
    """It is a bonus."""
    assert set_comm("x", str(tmp_path)) is False


def privileged() -> bool:
    """Whether this process has CAP_SYS_RESOURCE."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("CapEff:")]
    return bool(int(line.split()[1], 16) >> CAP_SYS_RESOURCE & 1)


def unprivileged(function: Callable[[], object]) -> object:
    """What `function` returns in a child that lacks CAP_SYS_RESOURCE."""

    def without() -> object:
        if os.geteuid() == 0 and privileged():
            _drop_capability()
        return function()

    return in_child(without)


def _drop_capability() -> None:
    # capset(2): version 3 has two sets of three 32-bit words
    libc = ctypes.CDLL(None, use_errno=True)
    header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, data) == 0
    for word in (0, 1, 2):
        data[word] &= ~(1 << CAP_SYS_RESOURCE)
    assert libc.capset(header, data) == 0


def test_a_score_is_raised() -> None:
    """For real, of the process itself and from its parent, and read back."""
    with Child(lambda line: (line.hear(), line.say(read_score()), line.hear())) as child:  # type: ignore[func-returns-value]
        present = read_score(child.pid)
        assert present is not None
        wanted = min(1000, present + 123)

        written = write_score(wanted, child.pid)
        child.say("go")

        assert [wanted] * 3 == [written, child.hear(), read_score(child.pid)]


@pytest.mark.parametrize(("step", "expected"), [(0, 100), (200, 300), (5000, 1000)])
def test_raising_by_a_step(step: int, expected: int) -> None:
    """To 1000 at most."""
    present = read_score()
    need(present is not None and present <= 100, "this process's oom_score_adj is high already")

    def by_step() -> int | None:
        write_score(100)
        raise_score(step)
        return read_score()

    assert expected == in_child(by_step)


def test_lowering_is_refused() -> None:
    """Without CAP_SYS_RESOURCE nobody gets below where the last one who had it has put it."""

    def lower() -> str:
        present = read_score()
        assert present is not None
        try:
            write_score(present - 1)
        except ScoreRefused as error:
            return str(error)
        return "taken"

    refusal = str(unprivileged(lower))

    present = read_score()
    assert present is not None
    assert f"oom_score_adj of this process stays {present}: {present - 1} was refused, lowering it needs CAP_SYS_RESOURCE" == refusal


def test_after_a_change_of_user() -> None:
    """A process that changed its user without an exec can't write its own: the reason says so."""
    need(os.geteuid() == 0, "only root can change its user")

    def change() -> str:
        os.setuid(12345)
        try:
            write_score(1000)
        except ScoreRefused as error:
            return str(error)
        return "taken"

    assert "it changed its user without an exec" in in_child(change)


@pytest.mark.parametrize("score", [1001, -1001, 10**9])
def test_a_score_that_is_none(score: int) -> None:
    """The kernel's own reason is passed on."""
    with pytest.raises(ScoreRefused, match=r"Invalid argument|Numerical result"):
        write_score(score)


def test_a_process_that_is_gone(tmp_path: Path) -> None:
    """None to read; a reason to write."""
    assert read_score(1, str(tmp_path)) is None
    with pytest.raises(ScoreRefused, match="process 1 stays None: 5 was refused, No such file"):
        write_score(5, 1, str(tmp_path))
    assert oom_score.raise_score(5, str(tmp_path)) is None  # type: ignore[func-returns-value]


def test_trimming_gives_memory_back() -> None:
    """Freed blocks that the C heap keeps go back to the kernel: tens of MiB."""
    need(platform.libc_ver()[0] == "glibc", "malloc_trim is glibc's")

    def trimmed() -> tuple[int, int, bool]:
        own = OwnMemory()
        blocks = [bytes(1000) for _ in range(60_000)]
        del blocks[::2], blocks[:-1]
        # the last block is above all the others: without a trim the heap can't shrink
        before = resident(own) or 0
        done = malloc.trim()
        assert blocks
        return before, resident(own) or 0, done

    before, after, done = in_child(trimmed)

    assert done
    assert before - after > 30 * MIB


def test_no_malloc_trim(monkeypatch: pytest.MonkeyPatch) -> None:
    """musl, macOS: False, and it is not looked for again."""
    asked: list[str | None] = []

    def no_library(name: str | None) -> object:
        asked.append(name)
        return object()

    monkeypatch.setattr(ctypes, "CDLL", no_library)
    monkeypatch.setattr(malloc, "_searched", False)
    monkeypatch.setattr(malloc, "_trim", None)

    assert [malloc.trim(), malloc.trim(), asked] == [False, False, [None]]


def test_descriptors_stay_in_their_process() -> None:
    """None is inherited over an exec."""

    def look(line: Line) -> None:
        own = OwnMemory()
        resident(own)
        line.say(os.get_inheritable(own._fd))

    with Child(look) as child:
        assert child.hear() is False


def test_children_of_every_thread(tmp_path: Path) -> None:
    """A pool's maintainer thread forks workers too, and the kernel lists each thread's by themselves; none is told twice."""

    def forking(line: Line) -> None:
        def quiet(line: Line) -> None:
            line.hear()

        with Child(quiet) as first:
            others: list[Child] = []
            forked, end = threading.Event(), threading.Event()
            # the thread stays: the children of one that ends are given to another
            thread = threading.Thread(target=lambda: (others.append(Child(quiet)), forked.set(), end.wait()))
            thread.start()
            forked.wait()
            with others[0]:
                line.say({first.pid, others[0].pid})
                line.hear()
            end.set()
            thread.join()

    with Child(forking) as parent:
        forks = parent.hear()
        assert set(children_of(parent.pid)) == forks == {child.pid for child in psutil.Process(parent.pid).children()}
        parent.say("end")
        parent.reap()

    for thread, listed in (("42", "7 8 "), ("43", "9 "), ("44", "8 ")):
        folder = tmp_path / "proc/42/task" / thread
        folder.mkdir(parents=True)
        (folder / "children").write_text(listed)
    assert sorted(children_of(42, str(tmp_path / "proc"))) == [7, 8, 9]
    assert children_of(parent.pid) == []


def kept(own: OwnMemory) -> int:
    """The number of its descriptor, which it has opened by now."""
    resident(own)
    return own._fd


@pytest.fixture
def reused(tmp_path: Path) -> Iterator[Callable[[int, str | None], None]]:
    """Closes a descriptor and gives its number to another file; None: to none."""
    opened: list[int] = []

    def reuse(fd: int, path: str | None) -> None:
        os.close(fd)
        if path is not None:
            other = os.open(path, os.O_RDONLY)
            if other != fd:
                os.dup2(other, fd)
                os.close(other)
            opened.append(fd)

    yield reuse
    for fd in opened:
        os.close(fd)


@pytest.mark.parametrize("content", [None, "a host's name\n", "max 100000\n", "", "1 2 3 4 5 6\n"])
def test_a_descriptor_that_others_close(
    tmp_path: Path, reused: Callable[[int, str | None], None], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
    content: str | None,
) -> None:  # fmt: skip
    """Also where its number is another file's by then: it is noticed at once, and said once."""
    monkeypatch.setattr(log, "_said", set())
    (tmp_path / "file").write_text(content or "")
    own = OwnMemory()
    figures = []
    for _ in range(3):
        fd = kept(own)
        reused(fd, None if content is None else str(tmp_path / "file"))
        figures.append(resident(own))
        if content is None:
            continue
        assert own._fd != fd
        os.fstat(fd)  # the other's is left open

    assert all(figure is not None and abs(figure - rss_of(os.getpid())) < 8 * MIB for figure in figures)  # type: ignore[operator]
    assert [record.getMessage() for record in caplog.records if "opens it again" in record.getMessage()] == [caplog.messages[0]]


def test_a_descriptor_of_another_process(reused: Callable[[int, str | None], None]) -> None:
    """Its statm reads like ours: check() finds out, and close() leaves it alone."""
    own = OwnMemory()
    fd = kept(own)
    reused(fd, "/proc/1/statm")

    assert own.check() is True
    assert own.check() is False
    assert abs((resident(own) or 0) - (rss_of(os.getpid()) or 0)) < 8 * MIB

    again = kept(own)
    reused(again, "/proc/1/statm")
    own.close()
    os.fstat(again)


def test_no_descriptor_is_to_be_had_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """What could not be opened is tried again by check()."""
    own = OwnMemory()
    with monkeypatch.context() as full:
        full.setattr(os, "open", lambda *_: (_ for _ in ()).throw(OSError(24, "Too many open files")))
        resident(own)
        before = own._fd

    assert (before, own.check(), own._fd >= 0) == (-1, True, True)
    own.close()


def test_only_its_own_children() -> None:
    """Whoever this process has not forked is none of them, nor is a pid that is free; a zombie is one until it is reaped."""
    with Child(lambda line: line.hear()) as child:
        started = start_time(child.pid)
        assert start_of_child(child.pid) == started
        child.say("end")
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert start_of_child(child.pid) == started
        child.reap()

    assert [start_of_child(pid) for pid in (child.pid, os.getpid(), os.getppid(), 1 << 64)] == [None] * 4


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [("0000000000000000", False), ("0000000000000400", False), ("0000000000000080", True), ("garbage", False)],
    ids=["none", "net-bind", "setuid", "garbage"],
)
def test_who_may_become_another_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capabilities: str, expected: bool) -> None:
    """Root, and who has CAP_SETUID."""
    proc = captured(tmp_path, "self", status=f"Name:\tx\nCapPrm:\tffffffffffffffff\nCapEff:\t{capabilities}\nCapBnd:\t00\n")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    as_user = may_become_another_user(proc)
    monkeypatch.setattr(os, "geteuid", lambda: 0)

    assert as_user is expected
    assert may_become_another_user(proc)
