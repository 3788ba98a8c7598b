"""In a child: a task is confined, what it fails with, and that all is put back, whenever a signal comes."""

from __future__ import annotations

import errno
import resource
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("celery")

from celery.app import trace
from needs import need
from unit.children import in_child

from oomsafe.celery.task_memory import TaskMemory
from oomsafe.errors import MemoryLimitExceeded
from oomsafe.kernel.process import PAGE
from oomsafe.policy.settings import Policy
from oomsafe.worker.guard import Guard

MIB = 1 << 20


@pytest.fixture(autouse=True)
def _linux() -> None:
    need(sys.platform.startswith("linux"), "only Linux enforces RLIMIT_DATA")


def room() -> int:
    """How many MiB may be mapped, to the next five, because Python maps an arena of its allocator whenever it likes; -1: no limit."""
    soft = resource.getrlimit(resource.RLIMIT_DATA)[0]
    return -1 if soft < 0 else 5 * round((soft - int(Path("/proc/self/statm").read_text().split()[5]) * PAGE) / (5 * MIB))


def made(refused: list[int] | None = None) -> TaskMemory:
    """Of this process, which must be a fork."""
    return TaskMemory(Guard(Policy(soft_limit="8GiB")), ([] if refused is None else refused).append)


def test_a_task_is_confined_while_it_runs() -> None:
    """To what the child has mapped and its limit; one without a limit is not."""

    def run() -> list[int]:
        memory, seen = made(), []
        for growth in (100 * MIB, None, 50 * MIB):
            memory.begin("proj.task", "an-id", growth)
            seen.append(room())
            memory.end()
            memory.end()
            seen.append(room())
        return seen

    assert in_child(run) == [100, -1, -1, -1, 50, -1]


def test_it_measures_again() -> None:
    """What is mapped and not touched does not count from then on; after the task's end, a signal changes nothing."""

    def run() -> list[int]:
        import mmap

        memory = made()
        memory.begin("proj.task", "an-id", 100 * MIB)
        area = mmap.mmap(-1, 60 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        seen = [room()]
        memory.follow()
        seen.append(room())
        area[: 30 * MIB] = b"x" * (30 * MIB)
        memory.follow()
        seen.append(room())
        memory.end()
        memory.follow()
        return [*seen, room()]

    first, again, touched, after = in_child(run)

    assert (first, again, touched, after) == (40, 100, 70, -1)


@pytest.mark.parametrize(
    ("error", "becomes"),
    [
        pytest.param(MemoryError(), True, id="MemoryError"),
        pytest.param(OSError(errno.ENOMEM, "no memory"), True, id="ENOMEM"),
        pytest.param(OSError(errno.ENOENT, "no file"), False, id="ENOENT"),
        pytest.param(ValueError(), False, id="ValueError"),
    ],
)
def test_what_becomes_of_an_error(error: Exception, becomes: bool) -> None:
    """Only while a limit is in force, and there is room then to report it."""

    def run() -> tuple[Any, ...]:
        refused: list[int] = []
        memory = made(refused)
        memory.begin("proj.task", "an-id", 100 * MIB)
        first = memory.instead_of("proj.task", error)
        second, inside = memory.instead_of("proj.task", error), room()
        memory.end()
        return first and first.args, second and second.args, len(refused), inside, room(), memory.instead_of("proj.task", error)

    first, second, refused, inside, after, later = in_child(run)

    assert (after, later) == (-1, None)
    if becomes:
        assert first == second
        assert (first[0], first[2], refused) == ("proj.task", 100 * MIB, 1)
        assert inside >= 105
    else:
        assert (first, second, refused, inside) == (None, None, 0, 100)


@pytest.mark.parametrize(("running", "expected"), [("an-id", MemoryLimitExceeded), ("another", MemoryError)])
def test_in_celery_s_tracer(running: str, expected: type[BaseException]) -> None:
    """The failure of the task in hand is ours, with Celery's own as its cause; that of one inside it is not."""

    def run() -> list[str]:
        seen: list[Any] = []
        trace.TraceInfo.handle_failure = lambda info, *_, **__: seen.extend((info.retval, sys.exc_info()[1]))
        memory = made()
        memory.install(lambda: None)
        memory.begin("proj.task", running, 100 * MIB)
        task, request = SimpleNamespace(name="proj.task", ignore_result=False), SimpleNamespace(id="an-id", ignore_result=False)
        try:
            raise MemoryError("its own")
        except MemoryError as error:
            trace.TraceInfo(trace.FAILURE, error).handle_error_state(task, request)
        return [type(one).__name__ for one in (*seen, seen[0].__cause__)]

    cause = "MemoryError" if expected is MemoryLimitExceeded else "NoneType"
    assert in_child(run) == [expected.__name__, expected.__name__, cause]


def test_words_for_what_was_refused() -> None:
    """Not "used less > limit"."""
    assert str(MemoryLimitExceeded("proj.task", 5 * MIB, 200 * MIB)).startswith(
        "task proj.task asked for more than its memory limit 200.0 MiB, and still used 5.0 MiB; raise the limit"
    )
    assert "used 210.0 MiB > its memory limit 200.0 MiB" in str(MemoryLimitExceeded("proj.task", 210 * MIB, 200 * MIB))
