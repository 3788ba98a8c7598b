"""The hard limit that the kernel enforces: real processes that ask for more than they may have, under a real RLIMIT_DATA."""

from __future__ import annotations

import gc
import json
import mmap
import os
import resource
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from needs import need
from starting import until_refused
from unit.children import Child, in_child

from oomsafe.kernel import rlimit
from oomsafe.kernel.allocators import ask_malloc
from oomsafe.kernel.malloc import trim
from oomsafe.kernel.process import PAGE, forget_peak, peak_rss_of
from oomsafe.kernel.rlimit import (
    BEYOND,
    LONGEST,
    MINIMUM,
    REFUSED,
    RESERVE,
    SLACK,
    THREAD,
    TRIAL,
    UNLIMITED,
    DataLimit,
    Enforcement,
    Reading,
    enforcement,
    thread_size,
)

MIB = 1 << 20

#: What balloons are held to.
HARD = 300 * MIB

#: What the application in a test has set itself.
OWN = 4 << 30


@pytest.fixture(autouse=True)
def _linux() -> None:
    need(sys.platform.startswith("linux"), "only Linux enforces RLIMIT_DATA")


def statm() -> list[int]:
    """This process's, in bytes."""
    return [int(word) * PAGE for word in Path("/proc/self/statm").read_text().split()]


def measure(hard: int = HARD) -> Reading:
    """What is mapped, and what `hard` leaves."""
    words = statm()
    return Reading(words[5], words[1] - words[2], hard - words[1])


def reading(data: int, room: int) -> Reading:
    """One that changes what is mapped and nothing else."""
    return Reading(data, 0, room)


def soft() -> int:
    """The soft value in force."""
    return resource.getrlimit(resource.RLIMIT_DATA)[0]


def set_soft(value: int) -> None:
    """What an application may do."""
    resource.setrlimit(resource.RLIMIT_DATA, (value, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def limited(room: int = 64 * MIB) -> DataLimit:
    """A limit in force, which leaves `room` whenever it is measured."""
    limit = DataLimit(lambda: reading(statm()[5], room))
    limit.follow(reading(statm()[5], room))
    return limit


def bytearrays() -> object:
    """Blocks of 1 MiB, until there is no more memory."""
    blocks = []
    while True:
        blocks.append(bytearray(MIB))


def numpy_arrays() -> object:
    """Arrays of 10 MiB."""
    numpy = pytest.importorskip("numpy")
    arrays = []
    while True:
        arrays.append(numpy.ones(10 * MIB // 8))


def one_block() -> object:
    """2 GiB at once."""
    return bytearray(2 << 30)


def dicts() -> object:
    """Small objects."""
    table = []
    while True:
        table.append({"number": len(table), "text": str(len(table))})


def huge_json() -> object:
    """A text whose objects take several times its size."""
    return json.loads("[" + ",".join(["[1000, 2000, {}]"] * 1_600_000) + "]")


def joined() -> object:
    """Many small strings, and one of all of them."""
    return ",".join("x" * 100 + str(number) for number in range(20_000_000))


def one_list() -> object:
    """A list that is moved each time it grows (realloc, mremap)."""
    grown: list[None] = []
    while True:
        grown.append(None)


def anonymous_map() -> object:
    """Private memory without the allocator."""
    return mmap.mmap(-1, 1 << 30, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def zeros() -> object:
    """An endless file, read at once."""
    with open("/dev/zero", "rb") as file:
        return file.read()


BALLOONS: list[Callable[[], object]] = [
    bytearrays, numpy_arrays, one_block, dicts, huge_json, joined, one_list, anonymous_map, zeros,
]  # fmt: skip


def mapped_files() -> int:
    """Bytes of files that this process has mapped, which its limit does not count."""
    return 1024 * int(Path("/proc/self/status").read_text().partition("RssFile:")[2].split()[0])


def burst(balloon: Callable[[], object]) -> dict[str, Any]:
    """What comes of it, in a process that is held to HARD, or more if it is large itself."""
    hard = max(HARD, statm()[1] + 150 * MIB)
    if balloon is numpy_arrays:
        import numpy  # noqa: F401  its threads' stacks are mapped when it is imported, as in an application
    limit = DataLimit(lambda: measure(hard))
    limit.follow(measure(hard))
    forget_peak()
    told: dict[str, Any] = {}
    try:
        balloon()
    except REFUSED as error:  # not a tuple that is built here: there is no memory for it
        limit.release()  # the traceback keeps all that the balloon has: without this, there is no memory for what follows
        told["error"] = type(error).__name__
        last = error.__traceback__
        while last is not None and last.tb_next is not None:
            last = last.tb_next
        told["in"] = "" if last is None else last.tb_frame.f_code.co_filename
        del last
    told["peak"] = ((peak_rss_of(os.getpid()) or 0) - mapped_files()) / hard
    gc.collect()
    limit.follow(measure(hard))
    told["goes on"] = len([bytearray(MIB) for _ in range(20)])
    return told


@pytest.mark.parametrize("balloon", BALLOONS, ids=lambda balloon: balloon.__name__)
def test_a_balloon_bursts_at_the_limit(balloon: Callable[[], object]) -> None:
    """The code that asks for too much gets the error, the process never holds more than 1.05 of its limit, and it goes on afterwards."""
    told = in_child(lambda: burst(balloon))

    assert told["error"] == ("OSError" if balloon is anonymous_map else "MemoryError")
    assert Path(told["in"]).name in ("test_rlimit.py", "decoder.py", "numeric.py", "")  # none: no memory for its line
    assert told["peak"] <= 1.05
    assert told["goes on"] == 20


def test_a_process_that_is_at_its_limit_gets_the_minimum_once() -> None:
    """Not again at each tick, or a leak would go on at that rate."""

    def run() -> list[int]:
        limit = DataLimit(lambda: None)
        data = statm()[5]
        values = []
        for grown in (0, MIB, MINIMUM, MINIMUM):
            limit.follow(reading(data + grown, -50 * MIB))
            values.append(soft() - data)
        return values

    assert in_child(run) == [MINIMUM] * 4


def test_it_follows_what_is_mapped() -> None:
    """What is mapped and not touched, as the stack of a thread, is added; a change below SLACK is left."""

    def run() -> tuple[int, int, int]:
        limit = DataLimit(lambda: None)
        limit.follow(reading(100 * MIB, 50 * MIB))
        first = soft()
        limit.follow(reading(100 * MIB + SLACK - 1, 50 * MIB))
        second = soft()
        limit.follow(reading(130 * MIB, 50 * MIB))
        return first, second, soft()

    assert in_child(run) == (150 * MIB, 150 * MIB, 180 * MIB)


HOLES = {
    "given back, and still mapped": ([(100, 90, 200), (100, 20, 270)], 70),
    "unmapped": ([(100, 90, 200), (30, 20, 270)], 0),
    "given back in part": ([(100, 90, 200), (80, 20, 270)], 50),
    "given back, and filled again": ([(100, 90, 200), (100, 20, 270), (100, 60, 230)], 30),
    "filled, and more": ([(100, 90, 200), (100, 20, 270), (150, 140, 150)], 0),
    "given back while a library is loaded": ([(100, 90, 200), (160, 30, 260)], 60),
    "a library's buffer": ([(100, 90, 200), (160, 100, 190)], 0),
    "threads that come and go": ([(100, 90, 200), (100, 20, 270), (180, 20, 270), (100, 20, 270)], 70),
    "an array at the limit that nobody has written to": ([(100, 90, 200), (290, 90, 200)], 190),
    "which is written to": ([(100, 90, 200), (290, 90, 200), (290, 280, 10)], 0),
    "which is gone": ([(100, 30, 200), (290, 30, 200), (100, 30, 200)], 0),
}


@pytest.mark.parametrize(("ticks", "holes"), HOLES.values(), ids=HOLES)
def test_holes_are_what_can_come_back_unasked(ticks: list[tuple[int, int, int]], holes: int) -> None:
    """By what is mapped, what of it is resident, and the room, in MiB: they take from the room."""

    def run() -> tuple[int, int]:
        limit = DataLimit(lambda: None)
        for data, anonymous, room in ticks:
            limit.follow(Reading(data * MIB, anonymous * MIB, room * MIB))
        return limit.holes // MIB, soft() // MIB

    data, _, room = ticks[-1]
    assert in_child(run) == (holes, data + room - holes)


def test_a_heap_that_was_trimmed_grows_no_further_than_the_limit() -> None:
    """malloc_trim gives back pages in the middle of the heap, and leaves them mapped; malloc uses them again without asking."""

    def run() -> tuple[int, float]:
        hard = statm()[1] + 250 * MIB
        limit = DataLimit(lambda: measure(hard))
        limit.follow(measure(hard))
        blocks = [bytes(1000)]
        while measure(hard).room > 30 * MIB:
            blocks += [bytes(1000 + len(blocks) % 2) for _ in range(1000)]
        limit.follow(measure(hard))
        blocks = blocks[::100]
        before = statm()[1]
        need(trim(), "no malloc_trim here")
        limit.follow(measure(hard))
        given_back = before - statm()[1]
        forget_peak()
        try:
            while True:
                blocks.append(bytes(1000))
        except MemoryError:
            blocks.clear()
        return given_back, (peak_rss_of(os.getpid()) or 0) / hard

    given_back, peak = in_child(run)
    assert given_back > 100 * MIB
    assert peak <= 1.05


def test_the_reserve_is_there_when_there_is_no_memory_at_all() -> None:
    """Once, and again after a tick that had room."""

    def run() -> list[bool]:
        limit = limited(8 * MIB)
        seen = []
        for _ in range(2):
            kept = [found for size in (MIB, PAGE) for found in until_refused(size)]
            limit.release()
            more = list(until_refused(PAGE))
            seen.append(len(more) == RESERVE // PAGE)
            limit.release()
            seen.append(not list(until_refused(PAGE)))
            kept.clear()
            more.clear()
            limit.follow(measure()._replace(room=8 * MIB))
        return seen

    assert in_child(run) == [True, True, True, True]


@pytest.mark.parametrize("own", [OWN, -1])
def test_lifted_it_leaves_what_was_there(own: int) -> None:
    """The hard value is never touched."""

    def run() -> tuple[tuple[int, int], tuple[int, int], int]:
        set_soft(own)
        before = resource.getrlimit(resource.RLIMIT_DATA)
        limit = limited()
        held = soft()
        limit.lift()
        return before, resource.getrlimit(resource.RLIMIT_DATA), held

    before, after, held = in_child(run)
    assert before == after
    assert 0 < held < OWN


def test_the_applications_own_lower_value_stays_and_is_told_once() -> None:
    """Set before us or while we hold it, and it is what is left behind; one that is higher gives way."""

    def run() -> dict[str, Any]:
        data = statm()[5]
        lower, lowest = data + 60 * MIB, data + 30 * MIB
        told: dict[str, Any] = {"lower": lower, "lowest": lowest}
        set_soft(lower)
        limit = DataLimit(lambda: None)
        told["first"] = [limit.follow(reading(data, 100 * MIB)) for _ in range(2)], soft()
        set_soft(lowest)
        told["second"] = [limit.follow(reading(data, 100 * MIB)) for _ in range(2)], soft()
        set_soft(OWN)
        told["higher"] = [limit.follow(reading(data, 100 * MIB)) for _ in range(2)], soft() - data
        limit.lift()
        told["left"] = soft()
        return told

    told = in_child(run)
    assert told["first"] == ([told["lower"], None], told["lower"])
    assert told["second"] == ([told["lowest"], None], told["lowest"])
    assert told["higher"] == ([None, None], 100 * MIB)
    assert told["left"] == OWN


def test_what_the_supervisor_sets_is_not_the_applications() -> None:
    """It holds while it is said to, also where the limit is set anew, and leaves no trace."""

    def run() -> dict[str, Any]:
        outside = [rlimit.NOBODY]
        data = statm()[5]
        limit = DataLimit(lambda: reading(statm()[5], 100 * MIB), lambda: outside[0])
        told: dict[str, Any] = {"data": data, "before": (limit.follow(reading(data, 100 * MIB)), soft())}
        cap = rlimit.marked(data + 10 * MIB)
        outside[0] = rlimit.Outside(cap, soft())
        # it has set another one before, and is between its record of the new one and its call
        set_soft(rlimit.marked(data + 9 * MIB))
        told["capped"] = [limit.follow(reading(data, 100 * MIB)), soft() - cap]
        limit.suspend()
        told["suspended"] = soft()
        limit.resume()
        told["resumed"] = soft() - cap
        limit.grant(5 * MIB)
        told["granted"] = soft() - cap
        limit.withdraw(5 * MIB)
        outside[0] = rlimit.Outside(None, outside[0].before)
        told["afterwards"] = limit.follow(reading(data, 100 * MIB)), soft()
        limit.lift()
        told["left"] = soft()
        return told

    told = in_child(run)
    assert told["capped"] == [None, 0]
    assert told["suspended"] == told["left"] == -1
    assert told["resumed"] == 0
    assert told["granted"] == 5 * MIB
    assert told["afterwards"] == told["before"] == (None, told["data"] + 100 * MIB)


def test_another_processs_limit() -> None:
    """Its soft value is read and set from outside, never above its hard one; that of a process that is gone is None."""

    def hear(line: Any) -> None:
        while line.hear():
            line.say(resource.getrlimit(resource.RLIMIT_DATA))

    with Child(hear) as child:
        before = rlimit.soft_of(child.pid)
        assert rlimit.put_soft(child.pid, 123 * MIB) == before
        assert rlimit.soft_of(child.pid) == 123 * MIB
        child.say("now")
        assert child.hear() == (123 * MIB, resource.getrlimit(resource.RLIMIT_DATA)[1])
        resource.prlimit(child.pid, resource.RLIMIT_DATA, (100 * MIB, 200 * MIB))
        assert rlimit.put_soft(child.pid, UNLIMITED) == 100 * MIB
        assert rlimit.soft_of(child.pid) == 200 * MIB
    assert rlimit.soft_of(child.pid) is None
    assert rlimit.put_soft(child.pid, 1) is None


def test_a_lower_hard_value_is_the_ceiling() -> None:
    """Whatever room there is: ours is not tried, and what it is instead is told."""

    def run() -> tuple[int | None, int, int]:
        ceiling = statm()[5] + 50 * MIB
        resource.setrlimit(resource.RLIMIT_DATA, (ceiling, ceiling))
        told = DataLimit(lambda: None).follow(reading(statm()[5], 200 * MIB))
        return told, soft(), ceiling

    told, held, ceiling = in_child(run)
    assert told == held == ceiling


def test_suspended_by_two_the_last_one_puts_it_back() -> None:
    """As it must be by then: what has been mapped meanwhile is added. A tick in between changes nothing."""

    def run() -> list[int]:
        set_soft(OWN)
        limit = limited(50 * MIB)
        seen = []
        limit.suspend()
        limit.suspend()
        seen.append(soft())
        kept = mmap.mmap(-1, 20 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        limit.resume()
        limit.follow(reading(statm()[5], 50 * MIB))
        seen.append(soft())
        limit.resume()
        seen.append(soft() - statm()[5])
        limit.resume()  # once too often
        limit.suspend()
        seen.append(soft())
        kept.close()
        return seen

    first, second, room, again = in_child(run)
    assert (first, second, again) == (OWN, OWN, OWN)
    assert abs(room - 50 * MIB) <= MIB


def test_many_threads_that_suspend_it() -> None:
    """Never in force while one of them needs it suspended, and in force when all are done."""

    def run() -> tuple[list[int], int]:
        set_soft(OWN)
        limit = limited()
        seen: list[int] = []

        def start() -> None:
            for _ in range(300):
                limit.suspend()
                seen.append(soft())
                limit.resume()

        threads = [threading.Thread(target=start) for _ in range(8)]
        limit.suspend()
        for thread in threads:
            thread.start()
        limit.resume()
        for thread in threads:
            thread.join()
        return sorted(set(seen)), soft()

    seen, held = in_child(run)
    assert seen == [OWN]
    assert held < OWN


def test_a_grant_is_room_beside_the_limit() -> None:
    """Until it is withdrawn, and ticks leave it; what is mapped meanwhile is added, and does not take from the room."""

    def run() -> list[int]:
        limit = limited(50 * MIB)
        data = statm()[5]
        limit.grant(20 * MIB)
        limit.follow(reading(data, 50 * MIB))
        granted = soft() - data
        kept = mmap.mmap(-1, 20 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        limit.withdraw(20 * MIB)
        seen = [granted, soft() - data]
        kept.close()
        return seen

    granted, after = in_child(run)
    assert granted == 70 * MIB
    assert abs(after - 70 * MIB) <= MIB


def test_what_never_ends_does_not_hold_it_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that failed before it ran withdraws nothing, and a command may run for hours: a later tick puts the limit back."""

    def run() -> list[int]:
        set_soft(OWN)
        limit = limited()
        data = statm()[5]
        limit.suspend()
        limit.grant(20 * MIB)
        seen = [soft()]
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + LONGEST - 0.1)
        limit.follow(reading(data, 64 * MIB))
        seen.append(soft())
        monkeypatch.setattr(time, "monotonic", lambda: now + LONGEST + 0.1)
        limit.follow(reading(data, 64 * MIB))
        seen.append(soft() - data)
        limit.resume()
        limit.withdraw(20 * MIB)
        return [*seen, soft() - statm()[5]]

    first, second, put_back, after = in_child(run)
    assert (first, second, put_back) == (OWN, OWN, 64 * MIB)
    assert abs(after - 64 * MIB) <= MIB


def test_what_can_not_be_measured_leaves_the_last_value() -> None:
    """And what is lifted stays lifted, whatever was under way."""

    def run() -> list[int]:
        set_soft(OWN)
        limit = DataLimit(lambda: None)
        limit.follow(reading(100 * MIB, 50 * MIB))
        limit.suspend()
        limit.resume()
        seen = [soft()]
        limit.suspend()
        limit.grant(MIB)
        limit.lift()
        limit.withdraw(MIB)
        limit.resume()
        return [*seen, soft()]

    assert in_child(run) == [150 * MIB, OWN]


def test_a_measurement_that_fails_is_no_failure_of_a_start() -> None:
    """At the limit, it too may get no memory."""

    def fail() -> Reading:
        raise MemoryError

    def run() -> bool:
        limit = DataLimit(fail)
        limit.follow(reading(statm()[5], 64 * MIB))
        limit.suspend()
        limit.resume()
        return True

    assert in_child(run) is True


def test_a_fork_leaves_it_to_its_parent() -> None:
    """The fork has the application's value, though its limit was in force, and though another thread was just suspending it."""

    def run() -> tuple[int, int]:
        set_soft(OWN)
        limit = limited()
        held = threading.Event()
        go_on = threading.Event()

        def hold() -> None:
            with limit._lock:
                held.set()
                go_on.wait(10)

        thread = threading.Thread(target=hold)
        thread.start()
        held.wait(10)

        def leave() -> int:
            limit.leave()
            return soft()

        in_fork = in_child(leave)
        go_on.set()
        thread.join()
        return in_fork, soft()

    in_fork, here = in_child(run)
    assert in_fork == OWN
    assert here < OWN


def test_this_kernel_enforces_it() -> None:
    """Found out by trying, which leaves the limit as it was."""

    def run() -> tuple[Enforcement, int]:
        set_soft(OWN)
        return enforcement(statm()[5]), soft()

    assert in_child(run) == (Enforcement(True, ""), OWN)


def test_a_value_that_is_low_already_does_not_hinder_the_trial() -> None:
    """Not even one that is below what is mapped: then nothing can be mapped to compare with, and that is said."""

    def run(room: int) -> tuple[Enforcement, bool]:
        before = statm()[5] + room
        set_soft(before)
        found = enforcement(statm()[5])
        return found, soft() == before

    found, kept = in_child(lambda: run(BEYOND + 2 * TRIAL))
    assert (found, kept) == (Enforcement(True, ""), True)
    found, kept = in_child(lambda: run(0))
    assert found.enforced is None
    assert "could not be tried" in found.reason
    assert kept


def test_where_it_does_not_hold(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each says why."""
    data = statm()[5]
    parameters = tmp_path / "kernel/parameters"
    parameters.mkdir(parents=True)
    (parameters / "ignore_rlimit_data").write_text("Y\n")
    ignored = enforcement(data, modules=str(tmp_path))
    assert ignored.enforced is False
    assert "ignore_rlimit_data is Y" in ignored.reason

    for unknown in (None, 0):
        found = enforcement(unknown)
        assert found.enforced is None
        assert "gVisor" in found.reason

    with monkeypatch.context() as here:
        here.setattr(rlimit, "_can_map", lambda size: True)
        found = enforcement(data)
        assert found.enforced is False
        assert "not refused" in found.reason
    with monkeypatch.context() as here:
        here.setattr(rlimit, "resource", None)
        assert enforcement(data) == Enforcement(False, "this Python knows no RLIMIT_DATA")
    with monkeypatch.context() as here:
        here.setattr(sys, "platform", "darwin")
        found = enforcement(data)
        assert found.enforced is False
        assert "darwin" in found.reason


def test_what_a_thread_takes() -> None:
    """Its stack as it is set for this process."""

    def run() -> tuple[int, int, int]:
        usual = thread_size()
        threading.stack_size(MIB)
        small = thread_size()
        threading.stack_size(0)
        hard = resource.getrlimit(resource.RLIMIT_STACK)[1]
        resource.setrlimit(resource.RLIMIT_STACK, (16 * MIB, hard))
        return usual, small, thread_size()

    usual, small, large = in_child(run)
    assert usual >= THREAD
    assert small == MIB + THREAD
    assert large == 16 * MIB + THREAD


STEP = st.sampled_from(["follow", "suspend", "resume", "grant", "withdraw", "app"])

#: Even numbers are ours, and odd ones the application's: by the value alone, one can't be told from the other.
EVEN, SIGNED = st.integers(0, 1 << 40).map(lambda n: 2 * n), st.integers(-1 << 40, 1 << 40).map(lambda n: 2 * n)


@given(st.lists(st.tuples(STEP, EVEN, SIGNED), max_size=30))
@example([("app", 9 * MIB, 0), ("follow", 0, 0), ("suspend", 0, 0), ("app", 0, 0), ("follow", 0, 0), ("app", 9 * MIB, 0), ("follow", 0, 0)])
def test_whatever_happens_it_leaves_what_it_should(steps: list[tuple[str, int, int]]) -> None:
    """No more than the room at a tick, beside grants; never more than the application's own value, and that where it is suspended."""
    own, held, suspended, granted = UNLIMITED, UNLIMITED, 0, 0

    class Kernel:
        RLIMIT_DATA, RLIM_INFINITY = 2, -1

        @staticmethod
        def getrlimit(_: int) -> tuple[int, int]:
            return (held if held < UNLIMITED else -1), -1

        @staticmethod
        def setrlimit(_: int, values: tuple[int, int]) -> None:
            nonlocal held
            assert values[1] == -1
            held = values[0] if values[0] >= 0 else UNLIMITED

    with pytest.MonkeyPatch.context() as here:
        here.setattr(rlimit, "resource", Kernel)
        limit = DataLimit(lambda: None)
        first = True
        for step, size, room in steps:
            if step == "app":
                own = held = size + 1
            elif step == "follow":
                limit.follow(reading(size, room))
                if not suspended:
                    assert held <= size + max(room, MINIMUM) + granted + SLACK
                    assert not first or held >= min(own, size + MINIMUM)
                first = False
            elif step == "grant":
                limit.grant(size)
                granted += size
            elif step == "withdraw":
                limit.withdraw(size)
                granted = max(0, granted - size)
            elif step == "suspend":
                limit.suspend()
                suspended += 1
            else:
                limit.resume()
                suspended = max(0, suspended - 1)
            assert held == own if suspended else held <= own
        limit.lift()
        assert held == own


def test_work_is_confined_beside_the_limit_and_without_one() -> None:
    """The lower of the two is in force, in one system call each; afterwards it is what it was."""

    def run() -> list[int]:
        free, limit = DataLimit(lambda: reading(statm()[5], 0)), limited()
        limit.lift()
        free.confine(statm()[5] + 40 * MIB)
        seen = [soft() - statm()[5]]
        free.free()
        seen.append(soft())
        limit.follow(reading(statm()[5], 64 * MIB))
        outside = soft()
        for most in (32, 900):
            limit.confine(statm()[5] + most * MIB)
            seen.append(soft() - statm()[5])
            limit.free()
            limit.free()
            seen.append(soft() - outside)
        return seen

    alone, unlimited, lower, then, higher, last = in_child(run)

    assert (unlimited, then, last) == (resource.RLIM_INFINITY, 0, 0)
    assert [round(room / MIB) for room in (alone, lower, higher)] == [40, 32, 62]  # 2 MiB are mapped again as its reserve


@pytest.mark.parametrize("done", [True, False])
@pytest.mark.parametrize("act", ["confine", "free", "suspend", "grant", "follow"])
def test_a_signal_handler_that_raises_where_it_is_set(act: str, done: bool) -> None:
    """Right after the value was set, or just before: it is not taken for the application's, and what is due later is set."""

    class Told(Exception):
        """What the handler raises."""

    def run() -> tuple[bool, list[int]]:
        limit = limited()
        outside, most, told = soft(), statm()[5] + 32 * MIB, []
        if act == "free":
            limit.confine(most)

        def interrupted(theirs: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any) -> Any:
                if done:
                    theirs(*args)
                told.append(1)
                raise Told

            return call

        with pytest.MonkeyPatch.context() as here:
            for name in ("setrlimit", "prlimit"):
                here.setattr(resource, name, interrupted(getattr(resource, name)))
            with pytest.raises(Told):
                {
                    "confine": lambda: limit.confine(most),
                    "free": limit.free,
                    "suspend": limit.suspend,
                    "grant": lambda: limit.grant(8 * MIB),
                    "follow": lambda: limit.follow(reading(statm()[5], 100 * MIB)),
                }[act]()
        if act == "suspend":
            limit.resume()
        elif act == "grant":
            limit.withdraw(8 * MIB)
        seen = []
        for _ in range(2):
            limit.confine(most)
            seen.append(soft() - most)
            limit.free()
        limit.follow(reading(statm()[5], 200 * MIB))
        seen.append(soft() - statm()[5] - 200 * MIB)
        limit.lift()
        return outside < UNLIMITED and len(told) == 1, [*seen, soft()]

    once, seen = in_child(run)
    assert once
    assert seen[:2] == [0, 0]
    assert abs(seen[2]) < MIB
    assert seen[3] == resource.RLIM_INFINITY


def test_confined_work_is_refused_more() -> None:
    """By the kernel."""

    def run() -> tuple[float, float, int]:
        limit, before, malloc = DataLimit(lambda: None), statm(), ask_malloc()
        limit.confine(statm()[5] + 100 * MIB)
        with pytest.raises(MemoryError):
            bytearrays()
        gone = (peak_rss_of(os.getpid()) or 0) - before[1]
        limit.free()
        return gone / MIB, 0 if malloc is None else malloc.free / MIB, len(bytearray(200 * MIB))

    grown, had, free = in_child(run)

    assert 95 < grown < 103 + had  # what malloc has free already is mapped, and need not be resident
    assert free == 200 * MIB


@pytest.mark.parametrize("when", ["before", "inside"])
def test_what_the_application_sets_around_confined_work_stays(when: str) -> None:
    """Its soft value, lower than ours or not."""

    def run() -> tuple[int, int]:
        limit = DataLimit(lambda: None)
        limit.confine(statm()[5] + 100 * MIB)
        if when == "before":
            limit.free()
            set_soft(OWN)
            limit.confine(statm()[5] + 100 * MIB)
        else:
            set_soft(OWN)
        inside = soft()
        limit.free()
        return inside, soft()

    inside, after = in_child(run)

    assert after == OWN
    assert (inside < OWN) == (when == "before")


def test_a_process_that_confined_work_starts_is_not_confined() -> None:
    """And a thread of it takes nothing from what it may have."""

    def run() -> list[int]:
        limit = DataLimit(lambda: reading(statm()[5], 0))
        limit.confine(statm()[5] + 100 * MIB)
        limit.suspend()
        seen = [soft()]
        limit.resume()
        before = limit.grant(thread_size())
        stack = mmap.mmap(-1, 8 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        limit.withdraw(thread_size(), before)
        seen.append(soft() - statm()[5])
        stack.close()
        limit.leave()
        return [*seen, soft()]

    suspended, room, fork = in_child(run)

    assert (suspended, fork) == (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    assert round(room / MIB) == 100


def test_the_reserve_is_there_again_for_the_next() -> None:
    """What was released for a MemoryError is mapped again, and takes nothing from the room."""

    def run() -> tuple[bool, int, bool]:
        limit = DataLimit(lambda: None)
        limit.confine(statm()[5] + 50 * MIB)
        limit.release()
        limit.free()
        there, before = not limit._reserve.closed, statm()[5]
        limit.confine(before + 50 * MIB)
        return there, soft() - statm()[5], not limit._reserve.closed

    was, room, there = in_child(run)

    assert (was, round(room / MIB), there) == (False, 50, True)
