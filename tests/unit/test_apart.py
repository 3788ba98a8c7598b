"""Growth of pieces of work in threads is divided by what each thread has touched, where that explains it."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.scripted import CGROUP, MIB, Memory

from oomsafe import Guard, Policy
from oomsafe.asgi import pool_threads
from oomsafe.asgi.middleware import Steps
from oomsafe.kernel.process import PAGE, thread_faults
from oomsafe.policy.growth import shares_by_touch
from oomsafe.policy.limits import Capacity
from oomsafe.worker import apart as module
from oomsafe.worker.apart import native_id
from oomsafe.worker.meter import Meter, Work

sizes = st.integers(0, 1 << 40)


@given(st.lists(st.tuples(st.floats(0, 1e12), sizes | st.none()), min_size=1, max_size=8), sizes)
def test_nothing_is_lost(pieces: list[tuple[float, int | None]], elsewhere: int) -> None:
    """What they have together stays what it was, and nobody has less than nothing."""
    shares, touched = [share for share, _ in pieces], [one for _, one in pieces]

    exact = shares_by_touch(shares, touched, elsewhere)

    if exact is not None:
        assert sum(exact) == pytest.approx(sum(shares))
        assert min(exact) >= 0


@pytest.mark.parametrize(
    ("touched", "elsewhere", "exact"),
    [
        ([90, 10, 0], 0, [90, 10, 0]),
        ([50, None, None], 50, [50, 25, 25]),
        ([100, 0, 0], 900, [100, 0, 0]),  # nobody in flight has touched that, so it explains nothing
        ([150, 50, 0], 0, [75, 25, 0]),
        ([201, 0, 0], 0, None),  # given back and touched again, who knows by whom it is kept
        ([49, 0, 0], 0, None),  # huge pages
        ([None, None, None], 100, None),
        ([0, None, None], 100, None),
    ],
)
def test_who_has_touched_it_has_grown(touched: list[int | None], elsewhere: int, exact: list[float] | None) -> None:
    """Of 100 bytes."""
    assert shares_by_touch([100 / 3] * 3, touched, elsewhere) == (exact and pytest.approx(exact))


@pytest.fixture
def memory() -> Memory:
    """What the meter sees."""
    return Memory(100 * MIB)


@pytest.fixture
def meter(memory: Memory) -> Meter:
    """Of a guard without limits that matter."""
    return Guard(Policy(soft_limit="900MiB"), capacity=Capacity(1000 * MIB, CGROUP), memory=memory).meter


class Touching:
    """The count of faults of each thread, by native id."""

    def __init__(self) -> None:
        self.now: dict[int, int] = {}

    def __call__(self) -> dict[int, int]:
        return dict(self.now)

    def touch(self, thread: int, size: int) -> None:
        """So many bytes more."""
        self.now[thread] = self.now.get(thread, 0) + size // PAGE


@pytest.fixture
def touching(meter: Meter, monkeypatch: pytest.MonkeyPatch) -> Touching:
    """The threads' idents are their native ids; each has its count already."""
    touching = Touching()
    touching.now = {1: 500, 2: 500, 3: 500}
    monkeypatch.setattr(module, "native_id", lambda ident: ident)
    monkeypatch.setattr(module, "RESTS", 0)
    meter.apart._read = touching
    return touching


def begun(meter: Meter, thread: int) -> Work:
    """A piece of work in this thread."""
    work = meter.begin(b"work")
    work.thread = thread
    return work


def test_the_thread_that_has_touched_it(meter: Meter, memory: Memory, touching: Touching) -> None:
    """Has all of it, before and after others begin and end."""
    first, second = begun(meter, 1), begun(meter, 2)
    meter.measure()
    touching.touch(1, 50 * MIB)
    memory.be(150 * MIB)
    meter.measure()
    third = begun(meter, 3)
    touching.touch(1, 30 * MIB)
    memory.be(180 * MIB)

    assert (first.grown(), second.grown(), third.grown()) == (80 * MIB, 0, 0)
    assert (second.end(), first.end(), third.end()) == (0, 80 * MIB, 0)
    assert meter.clock.background == 0


def test_small_growth_is_shared(meter: Meter, memory: Memory, touching: Touching) -> None:
    """What little a thread touches may have been given back elsewhere."""
    first, second = begun(meter, 1), begun(meter, 2)
    meter.measure()
    touching.touch(1, 3 * MIB)
    memory.be(103 * MIB)
    meter.measure()

    assert (first.grown(), second.grown()) == (1.5 * MIB, 1.5 * MIB)


def test_an_event_loop_has_no_thread_of_its_own(meter: Meter, memory: Memory, touching: Touching) -> None:
    """Its pieces of work share what it touches; the one in the pool's thread is told apart from them."""
    works = [begun(meter, 1) for _ in range(3)]
    meter.apart.elsewhere = lambda: {works[0]: 2}
    meter.measure()
    touching.touch(1, 20 * MIB)
    touching.touch(2, 60 * MIB)
    memory.be(180 * MIB)
    meter.measure()

    assert [work.grown() for work in works] == [60 * MIB, 10 * MIB, 10 * MIB]


def test_nobody_knows(meter: Meter, memory: Memory, touching: Touching) -> None:
    """Then coroutines are run step by step, for a minute."""
    works = [begun(meter, 1) for _ in range(2)]
    meter.measure()
    assert not meter.apart.steps
    touching.touch(1, 80 * MIB)
    memory.be(180 * MIB)
    meter.measure()

    assert meter.apart.steps
    assert [work.grown() for work in works] == [40 * MIB] * 2
    meter.apart._steps_until = 0
    meter.measure()
    assert not meter.apart.steps


def test_a_failure_leaves_equal_shares(meter: Meter, memory: Memory, touching: Touching, caplog: pytest.LogCaptureFixture) -> None:
    """And is told once."""
    works = [begun(meter, number) for number in (1, 2)]
    meter.measure()
    meter.apart.elsewhere = lambda: 1 / 0  # type: ignore[assignment,return-value]
    memory.be(180 * MIB)
    meter.measure()

    assert [work.grown() for work in works] == [40 * MIB] * 2
    assert "telling threads apart" in caplog.text


def test_it_rests(meter: Meter, memory: Memory, touching: Touching, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a look, for many times as long as that took."""
    monkeypatch.setattr(module, "RESTS", 1e9)
    works = [begun(meter, number) for number in (1, 2)]
    meter.measure()
    touching.touch(1, 80 * MIB)
    memory.be(180 * MIB)
    meter.measure()

    assert [work.grown() for work in works] == [40 * MIB] * 2


def test_another_thread_begins_work_meanwhile(meter: Meter, memory: Memory, touching: Touching, monkeypatch: pytest.MonkeyPatch) -> None:
    """begin() takes no lock: what is in flight may become more while it is looked at."""
    first, second = begun(meter, 1), begun(meter, 2)

    class Slow(Work):
        @property
        def started(self) -> bool:  # type: ignore[override]
            begun(meter, 3)
            return True

    slow = Slow()
    slow.mark, slow.thread, slow.cell = 0.0, 3, first.cell
    meter.apart.works[first.cell] = slow

    assert set(meter.apart.grown(meter.clock)) == {slow, second}
    assert len(meter.apart.works) == 3


def test_one_after_the_other_needs_no_threads(meter: Meter, memory: Memory) -> None:
    """Nothing is imported, nothing is read."""
    with meter.begin(b"work") as work:
        memory.be(180 * MIB)
        meter.measure()
        assert work.grown() == 80 * MIB
    assert meter.apart._faults is None


def test_real_threads_touch_what_they_touch() -> None:
    """10 MiB in one of two."""
    go, end = threading.Event(), threading.Event()
    kept: list[bytearray] = []

    def touch() -> None:
        go.wait(10)
        kept.append(bytearray(b"x") * (10 << 20))
        end.wait(10)

    threads = [threading.Thread(target=touch), threading.Thread(target=end.wait, args=(10,))]
    for thread in threads:
        thread.start()
    before = thread_faults()
    go.set()
    while not kept:
        pass
    after = thread_faults()
    end.set()
    touched = [(after[found] - before[found]) * PAGE for thread in threads if (found := native_id(thread.ident or 0)) is not None]
    for thread in threads:
        thread.join()

    assert len(touched) == 2
    assert touched[1] < MIB
    assert touched[0] < 12 * MIB  # fewer faults than pages where the kernel uses huge ones


@pytest.mark.parametrize("folder", ["nothing", "garbage"])
def test_counts_that_can_t_be_read(tmp_path: Path, folder: str) -> None:
    """Are left out."""
    task = tmp_path / "garbage" / "self" / "task"
    for name, stat in (("12", "12 (x) R 1"), ("13", ""), ("word", "1 (x) R"), ("14", "14 (a) b) R 0 0 0 0 0 0 77 0")):
        (task / name).mkdir(parents=True)
        (task / name / "stat").write_text(stat)

    assert thread_faults(str(tmp_path / folder)) == ({14: 77} if folder == "garbage" else {})


class Hops:
    """Awaits what it is told."""

    def __init__(self, meter: Meter, memory: Memory) -> None:
        self.work = meter.begin(b"hops")
        self.memory = memory

    async def app(self) -> str:
        """Grow by 10 MiB before and after a wait; another grows during it; an error comes back."""
        self.memory.be((self.memory.now or 0) + 10 * MIB)
        await asyncio.sleep(0.01)
        self.memory.be((self.memory.now or 0) + 10 * MIB)
        future = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_soon(future.set_exception, KeyError("mine"))
        try:
            await future
        except KeyError:
            return "done"
        return "not raised"


def test_steps_of_a_coroutine(meter: Meter, memory: Memory) -> None:
    """Each has what grew during its own steps; results, errors and cancellation pass through."""

    async def main() -> None:
        hops, waits = Hops(meter, memory), meter.begin(b"waits")
        assert await Steps(hops.app(), hops.work) == "done"  # type: ignore[arg-type,func-returns-value]
        assert (hops.work.grown(), waits.grown()) == (20 * MIB, 0)
        cancelled = asyncio.create_task(_waiting(waits))
        await asyncio.sleep(0)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled

    asyncio.run(main())


async def _waiting(work: Work) -> None:
    await Steps(asyncio.sleep(60), work)


@pytest.fixture
def tracing() -> Iterator[None]:
    """As a debugger does."""
    threading.settrace(_trace)
    yield
    threading.settrace(None)  # type: ignore[arg-type]


def _trace(frame: FrameType, event: str, argument: Any) -> Any:
    return _trace


def test_a_debugger_s_frames_are_left_alone(tracing: None) -> None:
    """It writes their locals back."""
    code, seen, end = _holding.__code__, threading.Event(), threading.Event()
    thread = threading.Thread(target=_holding, args=(seen, end))
    thread.start()
    assert seen.wait(10)
    found = pool_threads._future_of(sys._current_frames()[thread.ident or 0], code)
    end.set()
    thread.join()

    assert found is None


def _holding(seen: threading.Event, end: threading.Event) -> None:
    future = asyncio.Future(loop=asyncio.new_event_loop())  # type: ignore[var-annotated]
    seen.set()
    end.wait(10)
    future.get_loop().close()


def test_without_a_debugger_it_is_found_and_not_kept() -> None:
    """Reading its locals does not keep them alive."""
    code, seen, end = _holding.__code__, threading.Event(), threading.Event()
    thread = threading.Thread(target=_holding, args=(seen, end))
    thread.start()
    assert seen.wait(10)
    frame = sys._current_frames()[thread.ident or 0]
    found = pool_threads._future_of(frame, code)
    count = sys.getrefcount(found)
    end.set()
    thread.join()

    assert asyncio.isfuture(found)
    assert count <= 3  # its own frame, this one, and the call
