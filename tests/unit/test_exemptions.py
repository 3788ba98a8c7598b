"""Threads and processes that start under a hard limit: real ones, each way in a process of its own (starting.py)."""

from __future__ import annotations

import _thread
import importlib.util
import json
import mmap
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import starting
from needs import need
from unit.children import Child, Line, in_child

from oomsafe.kernel.rlimit import THREAD, DataLimit, thread_size
from oomsafe.worker import exemptions

MIB = 1 << 20


@pytest.fixture(autouse=True)
def _linux() -> None:
    need(sys.platform.startswith("linux"), "only Linux enforces RLIMIT_DATA")


@pytest.fixture(autouse=True)
def _removed() -> Iterator[None]:
    yield
    exemptions.remove()


def start(way: str, *options: str) -> dict[str, Any]:
    """What came of it."""
    for package in ("gevent", "uvloop"):
        if way.startswith(package):
            need(importlib.util.find_spec(package) is not None, f"no {package} here")
    command = [sys.executable, starting.__file__, way, *options]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONWARNINGS": "ignore"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stderr
    told: dict[str, Any] = json.loads(ran.stdout)
    return told


@pytest.mark.parametrize("way", starting.PROCESSES)
def test_a_process_has_the_applications_own_value(way: str) -> None:
    """Not ours; and afterwards ours is in force again."""
    told = start(way)

    assert told["missing"] == []
    assert told["child"] == starting.OWN
    assert told["before"] < starting.OWN
    assert abs(told["after"] - told["data"] - starting.ROOM) <= 4 * MIB
    assert told["lifted"] == starting.OWN


@pytest.mark.parametrize("way", ["subprocess", "os.posix_spawn", "os.fork", "os.system"])
def test_without_it_a_process_inherits_the_limit(way: str) -> None:
    """The fault that it is there for."""
    told = start(way, "bare")

    assert told["child"] == told["before"] < starting.OWN


@pytest.mark.parametrize("way", starting.STARTS)
def test_threads_start_whatever_room_there_is(way: str) -> None:
    """Their stacks map six times the room, and are only mapped."""
    told = start(way)

    assert told["missing"] == []
    assert told["running"] == starting.THREADS


def test_without_it_threads_can_not_start() -> None:
    """The fault that it is there for."""
    assert start("threading", "bare")["running"] < starting.THREADS / 2


def limited() -> DataLimit:
    """A limit in force that leaves 40 MiB."""
    starting.resource.setrlimit(starting.resource.RLIMIT_DATA, (starting.OWN, -1))
    limit = DataLimit(starting.measure)
    limit.follow(starting.measure())
    return limit


def soft() -> int:
    """The soft value in force."""
    return int(starting.resource.getrlimit(starting.resource.RLIMIT_DATA)[0])


@pytest.mark.parametrize("way", ["fork_exec", "posix_spawn", "start_new_thread"])
def test_a_start_that_fails_leaves_the_limit_in_force(way: str) -> None:
    """Its error is the application's."""

    def run() -> tuple[str, bool, int]:
        limit = limited()
        exemptions.install(limit)
        error = ""
        try:
            if way == "fork_exec":
                subprocess.run(["/not/there"], check=False)
            elif way == "posix_spawn":
                os.posix_spawn("/not/there", ["x"], {})
            else:
                size = int(Path("/proc/self/statm").read_text().split()[0]) * starting.resource.getpagesize()
                starting.resource.setrlimit(starting.resource.RLIMIT_AS, (size + 4 * MIB, -1))
                threading.stack_size(4096 * MIB)  # more than this process can have given back meanwhile
                _thread.start_new_thread(print, ())
        except (OSError, RuntimeError, ValueError) as raised:
            error = type(raised).__name__
        return error, soft() < starting.OWN, limit._suspended + limit._granted

    error, in_force, left = in_child(run)
    assert error == ("RuntimeError" if way == "start_new_thread" else "FileNotFoundError")
    assert (in_force, left) == (True, 0)


def test_the_application_s_stack_size_stays() -> None:
    """threading.stack_size() sets what it reads to its default."""

    def run() -> tuple[int, int]:
        exemptions.install(limited())
        threading.stack_size(2 * MIB)
        thread = threading.Thread(target=int)
        thread.start()
        thread.join()
        return thread_size() - THREAD, threading.stack_size()

    assert in_child(run) == (2 * MIB, 2 * MIB)


def test_what_is_no_function_is_refused_as_before() -> None:
    """By the function that stood there."""

    def run() -> str:
        exemptions.install(limited())
        try:
            _thread.start_new_thread(None, ())  # type: ignore[arg-type]
        except TypeError as error:
            return str(error)
        return ""

    assert "callable" in in_child(run)


def test_a_thread_has_its_arguments_and_its_own_errors(capfd: pytest.CaptureFixture[str]) -> None:
    """The function is named, not ours."""

    def run() -> tuple[list[object], str]:
        exemptions.install(limited())
        got: list[object] = []
        done = threading.Event()

        def take(*args: object, **kwargs: object) -> None:
            got.extend([*args, kwargs])
            done.set()

        _thread.start_new_thread(take, (1, 2), {"three": 3})
        done.wait(10)
        reports: list[str] = []
        failed = threading.Event()

        def report(unraisable: Any) -> None:
            reports.append(f"{unraisable.err_msg} {unraisable.object!r}")  # Python 3.13 names it in the message
            failed.set()

        sys.unraisablehook = report
        _thread.start_new_thread(starting.written, (0,))
        failed.wait(10)
        return got, reports[0]

    got, report = in_child(run)
    assert got == [1, 2, {"three": 3}]
    assert "written" in report


def full() -> DataLimit:
    """A limit in force that leaves nothing."""
    limit = DataLimit(lambda: starting.measure()._replace(room=-1))
    limit.follow(starting.measure()._replace(room=16 * MIB))
    kept.extend(starting.until_refused(1 << 18))
    kept.extend(starting.until_refused(1 << 12))
    return limit


kept: list[mmap.mmap] = []


@pytest.mark.parametrize("again", [False, True])
def test_a_thread_starts_at_the_limit(again: bool) -> None:
    """Its stack fits in what it is granted, and its first frames too, or Thread.start() would wait for ever."""

    def run() -> tuple[list[int], bool, int]:
        limit = full()
        exemptions.install(limit)
        got: list[int] = []
        for _ in range(10 if again else 1):
            thread = threading.Thread(target=got.append, args=[1])
            thread.start()
            thread.join()
        # as the next tick: a stack that glibc keeps for later is unmapped where there are too many, of threads of this process's parent
        limit.follow(starting.measure()._replace(room=-1))
        refused = not list(starting.until_refused(4 * MIB))
        return got, refused, limit._granted

    ended = threading.Event()
    threads = [threading.Thread(target=ended.wait) for _ in range(8)]  # more than glibc keeps the stacks of, 40 MiB
    for thread in threads:
        thread.start()
    try:
        got, refused, granted = in_child(run)
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    assert got == [1] * (10 if again else 1)
    assert (refused, granted) == (True, 0)


def test_a_thread_that_dies_before_it_runs_is_an_error() -> None:
    """Not a wait without end, as in Python without us."""

    class Broken(threading.Thread):
        def _bootstrap(self) -> None:
            raise MemoryError

    def run() -> tuple[str, int, int]:
        limit = limited()
        exemptions.install(limit)
        sys.unraisablehook = lambda _: None
        error = ""
        try:
            Broken().start()
        except RuntimeError as raised:
            error = str(raised)
        return error, limit._granted, threading.active_count()

    assert in_child(run) == ("can't start new thread", 0, 1)


def test_a_start_at_the_limit_is_tried_again() -> None:
    """Whoever is at the limit is refused at once, and gives back what it had."""

    def run() -> bool:
        limit = full()
        exemptions.install(limit)
        exemptions.PATIENCE = 20.0  # in this child alone, on a busy machine
        soft = starting.resource.getrlimit(starting.resource.RLIMIT_DATA)[0]
        starting.resource.setrlimit(starting.resource.RLIMIT_DATA, (soft, soft))  # now nothing can be granted

        signal.signal(signal.SIGALRM, lambda *_: kept.clear())
        threading.stack_size(1 << 18)
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        got: list[int] = []
        thread = threading.Thread(target=got.append, args=[1])
        thread.start()
        thread.join()
        return got == [1]

    assert in_child(run) is True


def test_a_start_is_tried_once_more_when_nothing_is_in_the_way() -> None:
    """What was in the way is given back after the refusal, and before it is checked."""

    def run() -> bool:
        limit = full()
        exemptions.install(limit)
        soft = starting.resource.getrlimit(starting.resource.RLIMIT_DATA)[0]
        starting.resource.setrlimit(starting.resource.RLIMIT_DATA, (soft, soft))  # now nothing can be granted
        type(limit).is_close = lambda *_: bool(kept.clear())  # type: ignore[method-assign]
        threading.stack_size(1 << 18)
        got: list[int] = []
        thread = threading.Thread(target=got.append, args=[1])
        thread.start()
        thread.join()
        return got == [1]

    assert in_child(run) is True


def test_a_fork_that_goes_on_has_no_limit_of_ours() -> None:
    """It starts threads and processes of its own, and may be given a limit of its own."""

    def go_on(line: Line) -> None:
        exemptions.install(limited())
        with Child(lambda inner: inner.say(generation())) as fork:
            line.say(fork.hear())

    def generation() -> list[object]:
        seen: list[object] = [soft() == starting.OWN, exemptions._limit]
        threading.Thread(target=seen.append, args=[1]).start()
        while len(seen) < 3:
            pass
        seen.append(subprocess.run(["/bin/sh", "-c", "ulimit -Sd"], capture_output=True, check=True).stdout)
        again = limited()
        seen.append(exemptions.install(again))
        seen.append(subprocess.run(["/bin/sh", "-c", "ulimit -Sd"], capture_output=True, check=True).stdout)
        seen.append(soft() < starting.OWN)
        return seen

    own = b"%d\n" % (starting.OWN >> 10)
    with Child(go_on) as child:
        assert child.hear() == [True, None, 1, own, [], own, True]


def test_removed_everything_is_as_it_was() -> None:
    """Also where it was put twice."""

    def functions() -> list[object]:
        places = [place for places in exemptions.PROCESSES.values() for place in places] + list(exemptions.THREADS)
        return [getattr(sys.modules.get(module), name, None) for module, name in places]

    def run() -> tuple[bool, bool]:
        before = functions()
        limit = limited()
        exemptions.install(limit)
        exemptions.install(limit)
        between = functions()
        exemptions.remove()
        return functions() == before, all(isinstance(found, exemptions._Exempt) for found in between if found is not None)

    assert in_child(run) == (True, True)


def test_what_others_have_put_over_it_stays() -> None:
    """Ours below it is without effect then, and in effect again with the next limit."""

    def run() -> list[bool]:
        limit = limited()
        exemptions.install(limit)
        ours, calls = os.posix_spawn, []

        def theirs(*args: Any, **kwargs: Any) -> int:
            calls.append(soft())
            return ours(*args, **kwargs)

        os.posix_spawn = theirs
        exemptions.remove()
        seen = [os.posix_spawn is theirs]
        for expected in (False, True):
            os.waitpid(os.posix_spawn(starting.ARGUMENTS[0], starting.ARGUMENTS, os.environ), 0)
            seen.append((starting.written() == starting.OWN) is expected)
            os.unlink(starting.FILE)
            exemptions.install(limit)
        return [*seen, len(calls) == 2]

    assert in_child(run) == [True] * 4


def test_what_is_not_there_does_not_hinder_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """And is told."""
    monkeypatch.setattr(exemptions, "SOURCES", frozenset({"no_such_module", *exemptions.SOURCES}))
    monkeypatch.setitem(exemptions.PROCESSES, "another way", (("no_such_module", "start"), ("os", "no_such_function")))

    def run() -> tuple[list[str], bytes]:
        missing = exemptions.install(limited())
        return missing, subprocess.run(["/bin/sh", "-c", "ulimit -Sd"], capture_output=True, check=True).stdout

    assert in_child(run) == (["another way"], b"%d\n" % (starting.OWN >> 10))


def test_starts_at_once() -> None:
    """Processes and threads from many threads: no child ever has our value, and nothing is left suspended."""

    def run() -> tuple[set[bytes], int, bool]:
        limit = limited()
        exemptions.install(limit)
        seen: set[bytes] = set()

        def begin() -> None:
            for _ in range(5):
                seen.add(subprocess.run(["/bin/sh", "-c", "ulimit -Sd"], capture_output=True, check=True).stdout)
                threading.Thread(target=int).start()

        threads = [threading.Thread(target=begin) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return seen, limit._suspended + limit._granted, soft() < starting.OWN

    assert in_child(run) == ({b"%d\n" % (starting.OWN >> 10)}, 0, True)


def test_its_modules_are_found() -> None:
    """The names are those of this Python: at least one place of each way."""
    assert Path(starting.__file__).exists()
    assert in_child(lambda: exemptions.install(limited())) == []
