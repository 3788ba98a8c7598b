"""Processes that are measured again and again through descriptors: the same figures as by path, and never another process's."""

from __future__ import annotations

import mmap
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path

import pytest
from needs import need
from unit.children import Child, Line, in_child

from oomsafe.kernel import kept_sizes, process
from oomsafe.kernel.kept_sizes import KeptSizes
from oomsafe.kernel.process import PAGE, sizes_of, start_time, stat_of

MIB = 1 << 20
LAST_PID = "/proc/sys/kernel/ns_last_pid"


@pytest.fixture(autouse=True)
def _needs_proc() -> None:
    need(os.path.exists("/proc/self/statm"), "no /proc here")


@pytest.fixture
def kept() -> Iterator[KeptSizes]:
    kept = KeptSizes()
    yield kept
    kept.close()


def descriptors(pid: int) -> list[int]:
    """This process's descriptors of the statm of `pid`."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}") == f"/proc/{pid}/statm":
                found.append(int(name))
        except OSError:
            pass  # the descriptor of the listing itself
    return found


def heard(child: Child) -> object:
    """What the child says, once it has nothing more to do: until it sleeps, it may still touch pages."""
    said = child.hear()
    while stat_of(child.pid)[0] != b"S":
        time.sleep(0.001)
    return said


def known(child: Child) -> tuple[int, int]:
    """(pid, start time) of a child that says the latter."""
    return child.pid, int(str(heard(child)))


def idle(line: Line) -> None:
    """Says when it has started, and waits."""
    line.say(start_time())
    line.hear()


def grows(line: Line) -> None:
    """Takes more memory of the kind that it is told."""
    held: list[object] = [start_time()]
    line.say(held[0])
    while True:
        kind = line.hear()
        if kind == "anonymous":
            held.append(bytearray(b"x") * (8 * MIB))
        elif kind == "shared":
            held.append(mmap.mmap(-1, 8 * MIB))
            held[-1].write(b"x" * 8 * MIB)  # type: ignore[attr-defined]
        elif kind == "file":
            with tempfile.TemporaryFile(dir=".") as file:
                file.write(b"x" * 8 * MIB)
                file.flush()
                mapped = mmap.mmap(file.fileno(), 8 * MIB, prot=mmap.PROT_READ)
            held.append((mapped, sum(mapped[at] for at in range(0, 8 * MIB, PAGE))))
        else:
            held.pop()
        line.say("done")


def test_the_same_figures_as_by_path(kept: KeptSizes) -> None:
    """Whatever kind of memory a process takes or gives back, all of it counts, and file pages are told from shared memory."""
    with Child(grows) as child:
        kept.follow([known(child)])
        for kind in ("anonymous", "shared", "file", "anonymous", "none", "none", "none", "shared"):
            child.say(kind)
            heard(child)

            assert kept.sizes(child.pid) == sizes_of(child.pid), kind
            with open(f"/proc/{child.pid}/statm") as statm:
                data = int(statm.read().split()[5]) * PAGE
            started = start_time(child.pid) or 0
            assert kept.mapped_if(child.pid, started) == (data, *(sizes_of(child.pid) or ())), kind
            assert kept.mapped_if(child.pid, started + 1) is None
            assert len(descriptors(child.pid)) == 1


def test_status_is_read_only_where_shared_memory_has_changed(kept: KeptSizes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that takes memory of its own costs one read; now and then status is read all the same."""
    read: list[str] = []
    plain = process.read_record
    for module in (process, kept_sizes):
        monkeypatch.setattr(module, "read_record", lambda path: (read.append(path), plain(path))[1])
    with Child(grows) as child:
        who = known(child)
        kept.follow([who])
        kept.sizes(child.pid)
        shared, reads = [_shared(child.pid)], [0]
        for kind in ("anonymous", "none", "anonymous", "shared", "anonymous", "none", "none"):
            child.say(kind)
            heard(child)
            read.clear()
            kept.sizes(child.pid)
            shared.append(_shared(child.pid))
            reads.append(len(read))
        kept.follow([who])
        read.clear()
        kept.sizes(child.pid)

    assert reads[1:] == [int(before != after) for before, after in pairwise(shared)]
    assert 0 in reads[1:]
    assert read == [f"/proc/{child.pid}/status"]


def _shared(pid: int) -> bytes:
    return Path(f"/proc/{pid}/statm").read_bytes().split()[2]


def test_in_a_round_each_process_is_read_once(kept: KeptSizes, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its descriptor or, where it has none, by its path; outside of rounds each time."""
    monkeypatch.setattr(kept_sizes, "MOST_KEPT", 1)
    read: list[int] = []
    pread = os.pread
    monkeypatch.setattr(kept_sizes.os, "pread", lambda fd, size, at: (read.append(fd), pread(fd, size, at))[1])
    with Child(idle) as one, Child(idle) as other:
        kept.follow([known(one), known(other)])
        for child in (one, other):
            kept.sizes(child.pid)
            kept.begin()
            first = kept.sizes(child.pid)
            read.clear()
            again = kept.sizes(child.pid)
            in_round = len(read)
            kept.end()
            kept.sizes(child.pid)

            assert (in_round, bool(read), first) == (0, True, again)


def test_a_process_that_has_ended(kept: KeptSizes) -> None:
    """A zombie has no figures, and who is gone has none."""
    with Child(idle) as child:
        _, started = known(child)
        kept.follow([(child.pid, started)])
        alive = kept.sizes_if(child.pid, started)
        os.kill(child.pid, signal.SIGKILL)
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        zombie = kept.sizes(child.pid), kept.sizes_if(child.pid, started)
        child.reap()
        gone = kept.sizes(child.pid), kept.sizes_if(child.pid, started)
        before = len(descriptors(child.pid))
        kept.follow([])

        assert alive is not None
        assert zombie == gone == (None, None)
        assert (before, descriptors(child.pid)) == (1, [])


def test_a_pid_that_another_process_has_by_now(kept: KeptSizes) -> None:
    """A real one: it is not taken for the process that had the pid before, though it is a child of the same parent."""
    need(os.access(LAST_PID, os.W_OK), "no right to choose a pid")
    with Child(idle) as first:
        _, started = known(first)
        kept.follow([(first.pid, started)])
        kept.sizes(first.pid)
        first.kill()
        with _child_with(first.pid, started) as second:
            as_before = kept.sizes(first.pid), kept.sizes_if(first.pid, started), kept.sizes_if(first.pid, started - 1)
            kept.follow([(first.pid, started)])
            followed_still = kept.sizes_if(first.pid, started)
            kept.follow([(second.pid, start_time(second.pid) or 0)])

            assert as_before == (None, None, None)
            assert followed_still is None
            assert kept.sizes_if(second.pid, start_time(second.pid) or 0) == kept.sizes(second.pid) == sizes_of(second.pid)
            assert len(descriptors(second.pid)) == 1


def _child_with(pid: int, started: int) -> Child:
    """A child with this pid that has started later than `started`."""
    for _ in range(500):
        Path(LAST_PID).write_text(str(pid - 1))
        child = Child(idle)
        if child.pid == pid and known(child) != (pid, started):
            return child
        child.__exit__()
    raise AssertionError("other processes take the pid")


def test_only_the_process_with_that_start_time(kept: KeptSizes) -> None:
    """Of a pid with another start time nothing is kept, and its figures are not those of the process that is meant."""
    with Child(idle) as child:
        _, started = known(child)
        kept.follow([(child.pid, started + 1)])

        assert descriptors(child.pid) == []
        assert kept.sizes_if(child.pid, started + 1) is None
        assert kept.sizes_if(child.pid, started) == kept.sizes(child.pid) == sizes_of(child.pid)
        kept.follow([(child.pid, started)])
        assert kept.sizes_if(child.pid, started + 1) is None


def _reopened(number: int, path: str) -> None:
    fd = os.open(path, os.O_RDONLY)
    if fd != number:
        os.dup2(fd, number)
        os.close(fd)


@pytest.mark.parametrize(
    "then",
    [lambda number: None, lambda number: _reopened(number, "/etc/passwd"), lambda number: os.dup2(os.open("/dev/null", 0), number)],
    ids=["closed", "another file", "an empty one"],
)
def test_other_code_closes_the_descriptor(kept: KeptSizes, then: Callable[[int], object]) -> None:
    """The figures stay right, the descriptor is opened again, and the number that another file has by now is not closed."""
    with Child(idle) as child:
        _, started = known(child)
        kept.follow([(child.pid, started)])
        (number,) = descriptors(child.pid)
        os.close(number)
        then(number)
        meanwhile = kept.sizes_if(child.pid, started)
        kept.follow([(child.pid, started)])
        (again,) = descriptors(child.pid)
        kept.close()

        assert meanwhile == sizes_of(child.pid)
        assert descriptors(child.pid) == []
        if again != number:
            os.close(number)  # still open


def test_what_has_the_number_by_now_is_not_closed(kept: KeptSizes) -> None:
    """When the process is not followed any more, either; its turn to be checked is not yet."""
    with Child(idle) as checked, Child(idle) as child:
        kept.follow([known(checked), known(child)])
        (number,) = descriptors(child.pid)
        os.close(number)
        _reopened(number, "/etc/passwd")
        kept.follow([])

    assert os.readlink(f"/proc/self/fd/{number}") == "/etc/passwd"
    os.close(number)


def test_the_number_becomes_another_process_s_statm(kept: KeptSizes) -> None:
    """It can't be told from its content: follow() finds it in its turn."""
    with Child(idle) as child:
        _, started = known(child)
        kept.follow([(child.pid, started)])
        (number,) = descriptors(child.pid)
        os.close(number)
        _reopened(number, "/proc/self/statm")
        kept.follow([(child.pid, started)])

        assert kept.sizes_if(child.pid, started) == sizes_of(child.pid)
        assert len(descriptors(child.pid)) == 1
        os.close(number)


def test_all_descriptors_are_closed_and_the_numbers_are_used_for_others(kept: KeptSizes) -> None:
    """Such as os.closerange() before the next worker is opened: no worker gets another's figures."""
    with Child(grows) as big, Child(idle) as small:
        big_is, small_is = known(big), known(small)
        big.say("anonymous")
        heard(big)
        kept.follow([small_is])
        kept.follow([small_is, big_is])
        for child in (big, small):
            os.close(*descriptors(child.pid))
        with Child(idle) as third:
            third_is = known(third)
            kept.follow([third_is, big_is, small_is])

            three = (big_is, small_is, third_is)
            assert [kept.sizes_if(*who) for who in three] == [sizes_of(pid) for pid, _ in three]
            assert [len(descriptors(child.pid)) for child in (big, small, third)] == [1, 1, 1]


def test_no_more_descriptors_than_the_server_can_spare(kept: KeptSizes, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other processes are measured by path."""
    monkeypatch.setattr(kept_sizes, "MOST_KEPT", 1)
    with Child(idle) as one, Child(idle) as other:
        both = [known(one), known(other)]
        kept.follow(both)

        assert len(descriptors(one.pid) + descriptors(other.pid)) == 1
        assert [kept.sizes_if(*who) for who in both] == [sizes_of(pid) for pid, _ in both]
        kept.follow(both[1:])
        assert (descriptors(one.pid), len(descriptors(other.pid))) == ([], 1)
        other.kill()
        assert kept.sizes_if(*both[1]) is None


@pytest.mark.parametrize("another_thread_is_inside", [False, True])
def test_a_fork_leaves_them(kept: KeptSizes, another_thread_is_inside: bool) -> None:
    """It has none of them open, measures by path, and the parent's stay."""
    with Child(idle) as child:
        who = known(child)
        kept.follow([who])

        def leaves() -> tuple[list[int], object]:
            kept.leave()
            return descriptors(who[0]), kept.sizes_if(*who)

        with kept._lock if another_thread_is_inside else nullcontext():
            open_there, sizes = in_child(leaves)

        assert (open_there, sizes) == ([], sizes_of(who[0]))
        assert len(descriptors(who[0])) == 1
        assert kept.sizes_if(*who) == sizes


def test_while_another_thread_is_inside(kept: KeptSizes) -> None:
    """Nobody waits: it is read by path, with the start time checked."""
    with Child(idle) as child:
        pid, started = known(child)
        kept.follow([(pid, started)])
        with kept._lock:
            kept.follow([])
            inside = kept.sizes(pid), kept.sizes_if(pid, started), kept.sizes_if(pid, started + 1)

        assert inside == (sizes_of(pid), sizes_of(pid), None)
        assert len(descriptors(pid)) == 1


def test_a_worker_of_another_user(kept: KeptSizes) -> None:
    """Its files in /proc are root's once it has changed its user, and any user may read statm and status."""
    need(os.geteuid() == 0, "only root may become another user")

    def drops(line: Line) -> None:
        started = start_time()
        os.setgid(65534)
        os.setuid(65534)
        line.say(started)
        line.hear()

    with Child(drops) as child:
        pid, started = known(child)

        def measures() -> tuple[int, object]:
            os.setgid(65533)
            os.setuid(65533)
            mine = KeptSizes()
            mine.follow([(pid, started)])
            return len(descriptors(pid)), mine.sizes_if(pid, started)

        assert in_child(measures) == (1, sizes_of(pid))


@pytest.mark.parametrize("reaped", [False, True])
def test_it_ends_before_its_status_is_read(kept: KeptSizes, monkeypatch: pytest.MonkeyPatch, reaped: bool) -> None:
    """What status says then is not its own, whoever has its pid."""
    plain = process.read_record
    with Child(idle) as child:
        who = known(child)
        kept.follow([who])

        def late(path: str) -> bytes | None:
            os.kill(child.pid, signal.SIGKILL)
            os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
            if reaped:
                child.reap()
            return plain("/proc/self/status")

        monkeypatch.setattr(kept_sizes, "read_record", late)
        found = kept.sizes(child.pid)

    assert found is None


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        ("Name:\tx\nRssAnon:\t 40 kB\nRssFile:\t 20 kB\nRssShmem:\t 20 kB\n", (20 * PAGE, 20 * PAGE - 20 * 1024)),
        ("Name:\tx\nVmRSS:\t 80 kB\n", (20 * PAGE, 20 * PAGE)),
        (None, None),
    ],
    ids=["told", "before Linux 4.5", "unreadable"],
)
def test_what_status_does_not_tell(tmp_path: Path, status: str | None, expected: tuple[int, int] | None) -> None:
    """Without the kinds all is held; a status that can't be read is no figure."""
    folder = tmp_path / "42"
    folder.mkdir()
    (folder / "statm").write_text("100 20 10 1 0 50 0\n")
    (folder / "stat").write_text(f"42 (x) S 1{' 0' * 17} 4711 0 0\n")
    if status is not None:
        (folder / "status").write_text(status)
    kept = KeptSizes(str(tmp_path))
    kept.follow([(42, 4711)])

    assert kept.sizes_if(42, 4711) == kept.sizes(42) == expected
    (folder / "status").write_text("Name:\tx\n")
    assert kept.sizes(42) == (expected or (20 * PAGE, 20 * PAGE))
    kept.close()


def test_a_zombie_that_shared_nothing(tmp_path: Path) -> None:
    """Zeros are no figures, also where status need not be read again."""
    folder = tmp_path / "42"
    folder.mkdir()
    (folder / "statm").write_text("100 20 0 1 0 50 0\n")
    (folder / "stat").write_text(f"42 (x) S 1{' 0' * 17} 4711 0 0\n")
    (folder / "status").write_text("Name:\tx\nRssAnon:\t 80 kB\nRssFile:\t 0 kB\nRssShmem:\t 0 kB\n")
    kept = KeptSizes(str(tmp_path))
    kept.follow([(42, 4711)])
    running = kept.sizes(42)
    (folder / "statm").write_text("0 0 0 0 0 0 0\n")

    assert (running, kept.sizes(42)) == ((20 * PAGE, 20 * PAGE), None)
    kept.close()


def test_where_proc_is_another_pid_namespace_s(tmp_path: Path) -> None:
    """This process has another number there: it is found as itself, and what has its number is not taken for it."""
    kept = KeptSizes(str(tmp_path))
    for name, resident, started in (("self", 20, 4711), (str(os.getpid()), 7, 9)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "statm").write_text(f"100 {resident} 0 1 0 50 0\n")
        (tmp_path / name / "stat").write_text(f"1 (x) S 1{' 0' * 17} {started} 0 0\n")
        (tmp_path / name / "status").write_text("Name:\tx\n")
    by_path = kept.sizes(os.getpid())
    kept.follow([(os.getpid(), 4711)])

    assert by_path == kept.sizes(os.getpid()) == kept.sizes_if(os.getpid(), 4711) == (20 * PAGE, 20 * PAGE)
    kept.close()


def test_without_proc(tmp_path: Path) -> None:
    """macOS: nothing is known of another process, and nothing is open."""
    before = len(os.listdir("/proc/self/fd"))
    kept = KeptSizes(str(tmp_path))
    kept.follow([(42, 4711)])

    assert (kept.sizes(42), kept.sizes_if(42, 4711)) == (None, None)
    assert len(os.listdir("/proc/self/fd")) == before
