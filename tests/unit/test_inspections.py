"""An inspection of a worker that serves: its place on the scoreboard, its order, what a worker refuses, and the words of the command."""

from __future__ import annotations

import json
import math
import os
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.test_orders import NOW, POLICY, answer, one_worker, put, right

from oomsafe.cli.inspection import inspection_text, record_of
from oomsafe.kernel.capacity import read_capacity
from oomsafe.kernel.process import children_of, shared_out
from oomsafe.policy.inspection import TEXT, Inspection, Phase
from oomsafe.policy.limits import Capacity
from oomsafe.policy.objects import Cache, Container, Objects, TypeCount
from oomsafe.policy.settings import Policy
from oomsafe.policy.state import State
from oomsafe.policy.stock import Parts
from oomsafe.scoreboard import layout
from oomsafe.scoreboard.board import Scoreboard
from oomsafe.scoreboard.inspections import read_inspection, write_inspection
from oomsafe.scoreboard.mailbox import Answer, What
from oomsafe.scoreboard.view import PoolView
from oomsafe.supervisor.inspections import OVER_WITHIN, ROOM, TAKEN_WITHIN, Inspections
from oomsafe.supervisor.orders import Orders
from oomsafe.supervisor.probes import Probes
from oomsafe.supervisor.replacements import Reading
from oomsafe.worker import inspector, stocktaking
from oomsafe.worker.guard import Guard

MIB = 1 << 20
POOL = PoolView("test", 1, 1, 0.0, 1, 1, None, None, name="shop", unit="requests")

FIGURES = st.none() | st.integers(0, layout.LARGEST)
PARTS = st.builds(
    Parts, python_live=FIGURES, python_kept=FIGURES, malloc_live=FIGURES, malloc_kept=FIGURES, malloc_stuck=FIGURES,
    files=st.integers(0, layout.LARGEST), shared=st.integers(0, layout.LARGEST), other=st.integers(0, layout.LARGEST),
)  # fmt: skip
TIMES = st.none() | st.floats(0, 1e6)
OBJECTS = Objects(
    tracked=1000, every=3, complete=False, threads=4, threads_before=1, descriptors=12,
    types=(TypeCount(name="list", count=10, size=1000, before=3),),
    containers=(Container(name="apps.CACHE", kind="dict", entries=1000),),
    caches=(Cache(name="apps.f", entries=10, bound=None, before=1),),
)  # fmt: skip
ONE = Inspection(
    at=NOW, pid=812, slot=3, generation=7, phase=Phase.DONE, work=1203, served=61.0, fresh=40 * MIB, stopped=0.0031, took=0.21,
    objects=OBJECTS, parts=Parts(python_live=90 * MIB, malloc_live=10 * MIB, malloc_kept=3 * MIB, files=6 * MIB),
)  # fmt: skip
INSPECTIONS = st.builds(
    Inspection, at=st.floats(1, 1e10), pid=st.integers(1, 1 << 40), slot=st.integers(0, 1023), generation=st.integers(0, 1 << 60),
    phase=st.sampled_from([phase for phase in Phase if phase]), text=st.text("abc ", max_size=TEXT), work=st.integers(0, 1 << 60),
    served=st.floats(0, 1e6), fresh=FIGURES, parts=PARTS, stopped=TIMES, took=TIMES,
)  # fmt: skip


@given(INSPECTIONS)
def test_what_is_written_is_read(one: Inspection) -> None:
    """Law: the same comes out; objects only once it is done."""
    header = memoryview(bytearray(layout.HEADER_SIZE))

    write_inspection(header, replace(one, objects=OBJECTS))

    assert read_inspection(header) == replace(one, objects=OBJECTS if one.phase is Phase.DONE else None)


@given(
    st.binary(min_size=layout.INSPECTED.size, max_size=layout.INSPECTED.size),
    st.binary(min_size=200, max_size=layout.OBJECTS_SIZE),
    st.sampled_from([0, *Phase, 77]),
)
def test_whatever_a_worker_writes(raw: bytes, objects: bytes, phase: int) -> None:
    """Law: it is nothing, or figures in their ranges and printable text, for a terminal and as JSON."""
    header = bytearray(layout.HEADER_SIZE)
    at, pid, generation, slot, _, *rest = layout.INSPECTED.unpack(raw)
    layout.INSPECTED.pack_into(header, layout.INSPECTED_AT, at, pid, generation, slot, phase, *rest)
    header[layout.INSPECTED_OBJECTS_AT : layout.INSPECTED_OBJECTS_AT + len(objects)] = objects
    struct.pack_into("<Qd", header, layout.INSPECTED_OBJECTS_AT, generation, at)  # so that they are taken for this one's

    one = read_inspection(header)

    if one is None:
        return
    assert phase in frozenset(Phase) and phase
    assert 0 < one.at < math.inf and 0 <= one.served < math.inf
    assert one.text.isprintable() and len(one.text) <= TEXT
    assert all(figure is None or 0 <= figure < math.inf for figure in (one.fresh, one.stopped, one.took, one.parts.live, one.parts.kept))
    json.dumps(record_of(POOL, one), allow_nan=False)
    assert all(line.isprintable() for line in inspection_text(POOL, one, 80).plain.splitlines())


def test_while_it_is_written_there_is_none() -> None:
    """The time comes last; and objects that belong to another inspection are not this one's."""
    header = memoryview(bytearray(layout.HEADER_SIZE))
    write_inspection(header, ONE)
    layout.write(header, layout.INSPECTED_AT, layout.MOMENT, NOW + 1)
    one = read_inspection(header)
    assert one is not None and one.objects is None
    layout.write(header, layout.INSPECTED_AT, layout.MOMENT, 0.0)
    assert read_inspection(header) is None


def test_the_words() -> None:
    """The parts that there are, objects, and what it cost."""
    text = inspection_text(POOL, ONE, 120).plain

    assert text.splitlines()[:5] == [
        "worker 812 (slot 3) of shop holds 109 MiB, +63.0 MiB since it was ready, after 1 203 requests in 61 s",
        "  in use by Python objects           90.0 MiB",
        "  in use by malloc                   10.0 MiB",
        "  free, kept by malloc until a trim   3.0 MiB",
        "  of files                            6.0 MiB",
    ]
    assert "worker 812 holds: 1 000 objects that the garbage collector tracks" in text
    assert text.splitlines()[-1] == "counted in 0.21 s by a fork of the worker; the worker stood still for 3.1 ms"


class Pool:
    """A pool of one worker, and its supervisor's side."""

    def __init__(self, board: Scoreboard, held: int = 0) -> None:
        self.board = board
        self.slot = one_worker(board)

        def reading() -> Reading:
            return Reading(Capacity(1 << 30, "a test"), 1 << 30, held)

        self.inspections = Inspections(board, reading)
        self.orders = Orders(board, Probes(board, reading), self.inspections)
        self._sequence = 0

    def order(self, policy: Policy = POLICY, **change: float) -> Answer:
        """What a new order is answered."""
        self._sequence += 1
        put(self.board, right(self.slot, self._sequence)._replace(what=What.INSPECT, **change))  # type: ignore[arg-type]
        self.orders.tick(policy, NOW)
        sequence, given_answer = answer(self.board)
        assert sequence == self._sequence
        return Answer(given_answer)

    def tells(self, phase: Phase, **more: object) -> None:
        """As the worker does."""
        self.board.header.note_inspection(
            replace(ONE, at=time.time(), pid=os.getpid(), slot=0, generation=self.slot.generation, phase=phase, **more)  # type: ignore[arg-type]
        )


@pytest.mark.parametrize(
    ("policy", "change", "state", "held", "expected"),
    [
        pytest.param(POLICY, {}, State.SERVING, 0, Answer.ORDERED, id="it serves"),
        pytest.param(POLICY, {}, State.WAITING, 0, Answer.ORDERED, id="it serves, and asks to be replaced"),
        pytest.param(Policy(dry_run=True), {}, State.SERVING, 0, Answer.ORDERED, id="a dry run, too"),
        pytest.param(POLICY, {}, State.STARTING, 0, Answer.LEAVES, id="it boots"),
        pytest.param(POLICY, {}, State.DRAINING, 0, Answer.LEAVES, id="it drains"),
        pytest.param(POLICY, {"pid": 0}, State.SERVING, 0, Answer.UNKNOWN, id="no pid"),
        pytest.param(POLICY, {"pid": 1}, State.SERVING, 0, Answer.UNKNOWN, id="another's worker"),
        pytest.param(POLICY, {"generation": 9}, State.SERVING, 0, Answer.UNKNOWN, id="another worker of this slot"),
        pytest.param(POLICY, {"at": NOW - 60}, State.SERVING, 0, Answer.STALE, id="old"),
        pytest.param(POLICY, {}, State.SERVING, (1 << 30) - ROOM + 1, Answer.SHORT, id="no room in the pool"),
    ],
)
def test_what_becomes_of_an_order(policy: Policy, change: dict[str, float], state: State, held: int, expected: Answer) -> None:
    """Only ORDERED reaches the worker, which takes it once."""
    pool = Pool(Scoreboard.private(), held)
    pool.slot.set_state(state)

    assert pool.order(policy, **change) is expected

    assert [pool.slot.take_inspection_order() for _ in range(2)] == [expected is Answer.ORDERED, False]


def test_one_at_a_time() -> None:
    """Until the worker has told what came of it."""
    pool = Pool(Scoreboard.private())
    for phase in (Phase.DONE, Phase.FAILED):
        assert [pool.order(), pool.order()] == [Answer.ORDERED, Answer.BUSY]
        assert pool.slot.take_inspection_order()
        pool.tells(Phase.COUNTS)
        assert pool.order() is Answer.BUSY
        pool.tells(phase)
    assert pool.order() is Answer.ORDERED


def test_what_another_worker_tells_is_not_its_end() -> None:
    """Only what this one tells, and since it was ordered."""
    pool = Pool(Scoreboard.private())
    pool.tells(Phase.DONE)
    assert pool.order() is Answer.ORDERED
    assert pool.order() is Answer.BUSY
    pool.board.header.note_inspection(replace(ONE, generation=99))
    assert pool.order() is Answer.BUSY


def test_an_order_that_is_not_taken(said: Callable[[], list[str]]) -> None:
    """Is withdrawn, and whoever has given it is told."""
    pool = Pool(Scoreboard.private())
    pool.order()
    now = time.monotonic()

    pool.inspections.tick(now + TAKEN_WITHIN - 1)
    assert pool.slot.is_to_be_inspected
    pool.inspections.tick(now + TAKEN_WITHIN + 1)

    assert not pool.slot.is_to_be_inspected
    found = pool.board.read().inspected
    assert found is not None
    assert (found.pid, found.phase) == (os.getpid(), Phase.UNTAKEN)
    assert found.text == "it has not taken the order within 5 s, which is withdrawn: it is busy in one call"
    assert said() == [f"worker {os.getpid()} (slot 0) is not inspected: {found.text}"]
    assert pool.order() is Answer.ORDERED


def test_a_worker_that_never_tells() -> None:
    """Or whose fork and itself are stopped: others can be inspected after a while."""
    pool = Pool(Scoreboard.private())
    pool.order()
    pool.slot.take_inspection_order()
    pool.tells(Phase.COUNTS)
    now = time.monotonic()

    pool.inspections.tick(now + OVER_WITHIN - 1)
    assert pool.order() is Answer.BUSY
    pool.inspections.tick(now + OVER_WITHIN + 1)

    found = pool.board.read().inspected
    assert found is not None
    assert (found.phase, found.text) == (Phase.FAILED, "it has not told what its memory is within 15 s")


@pytest.mark.parametrize("taken", [False, True])
def test_a_worker_that_ends(taken: bool) -> None:
    """Before it has told: that is said at once."""
    pool = Pool(Scoreboard.private())
    pool.order()
    if taken:
        pool.slot.take_inspection_order()
        pool.tells(Phase.COUNTS)
    pool.board.release(pool.slot.number, pool.slot.generation)

    pool.inspections.tick()

    found = pool.board.read().inspected
    assert found is not None
    assert (found.phase, found.text) == (Phase.FAILED, "it ended before it could tell what its memory was")


@given(st.binary(min_size=layout.MAILBOX.size, max_size=layout.MAILBOX.size))
def test_garbage_orders_nothing(raw: bytes) -> None:
    """Law: whatever stands in the mailbox, no worker is ordered by it."""
    pool = Pool(Scoreboard.private())
    pool.board.header.memory[layout.MAILBOX_AT : layout.MAILBOX_AT + layout.MAILBOX.size] = raw
    pool.board.header.memory[layout.MAILBOX_AT + 56 : layout.MAILBOX_AT + 64] = b"\3" + bytes(7)

    pool.orders.tick(POLICY, NOW)

    assert not pool.slot.is_to_be_inspected


def guarded(pool: Pool) -> Guard:
    """This process as a worker of the pool's that serves."""
    guard = Guard(Policy(), board=pool.board, slot=pool.slot, recycle=lambda: None)
    guard.ready()
    return guard


def told(pool: Pool, guard: Guard, seconds: float = 20.0, *, waits: bool = True, since: float = 0.0) -> Inspection:
    """What the worker has told of its inspection, after `since`; with `waits`, once it has reaped its fork."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        guard.meter.publish_at = 0.0
        guard.tick()
        found = pool.board.header.inspected
        if found is not None and found.phase.is_over and found.at > since and (guard._examination._inspector is None or not waits):
            return found
        time.sleep(0.01)
    raise AssertionError(f"nothing was told: {pool.board.header.inspected}")


REMEMBERED = {number: str(number) for number in range(50_000)}


def test_a_worker_is_inspected(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fork of it counts what it has itself; it holds as much as before, serves, and has no child left."""
    monkeypatch.setattr(inspector, "FOR_OBJECTS", 30.0)  # the test runner has imported everything
    monkeypatch.setattr(inspector, "ENDS_AFTER", 60.0)
    monkeypatch.setattr(inspector, "KILLED_AFTER", 60.0)
    pool = Pool(Scoreboard.private())
    guard = guarded(pool)
    children, threads = children_of(os.getpid()), len(os.listdir("/proc/self/task"))
    pool.order()

    one = told(pool, guard, 90.0)

    assert (one.phase, one.text, one.pid, one.generation) == (Phase.DONE, "", os.getpid(), pool.slot.generation)
    assert abs(one.parts.total - guard.meter.rss) < 0.1 * guard.meter.rss
    assert (one.parts.python_live or 0) > 10 * MIB
    assert one.stopped is not None and one.took is not None and 0 < one.stopped < 5
    assert one.objects is not None and one.objects.tracked and one.objects.threads == threads
    named = {each.name: each.entries for each in one.objects.containers}
    assert named.get(f"{__name__}.REMEMBERED", 0) in (0, len(REMEMBERED))  # the runner may have larger ones
    assert children_of(os.getpid()) == children
    assert pool.slot.state is State.SERVING
    assert pool.order() is Answer.ORDERED


def test_an_order_while_the_last_fork_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has told, so that the pool takes another order, and is not gone yet: the worker takes it as soon as it has reaped that one."""
    pool = Pool(Scoreboard.private())
    guard = guarded(pool)
    fork = inspector.fork
    monkeypatch.setattr(inspector, "FOR_OBJECTS", 0.01)
    monkeypatch.setattr(inspector, "fork", lambda run, seconds: fork(lambda: (run(), time.sleep(0.3))[1], seconds))
    pool.order()
    first = told(pool, guard, waits=False)

    assert guard._examination._inspector is not None
    assert pool.order() is Answer.ORDERED
    guard.meter.publish_at = 0.0
    guard.tick()
    assert pool.board.header.inspected == first
    second = told(pool, guard, since=first.at)

    assert (first.phase, second.phase, second.text) == (Phase.DONE, Phase.DONE, "")


def test_what_it_shows_is_the_worker_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the fork's: it has closed all descriptors, and no file is mapped in it yet."""
    pool = Pool(Scoreboard.private())
    guard = guarded(pool)
    monkeypatch.setattr(inspector, "FOR_OBJECTS", 0.01)
    before = len(os.listdir("/proc/self/fd"))
    pool.order()

    one = told(pool, guard)

    assert one.objects is not None and abs((one.objects.descriptors or 0) - before) <= 2
    assert one.parts.files > 2 * MIB
    assert one.parts.malloc_kept is not None and one.parts.python_live


REFUSALS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str]] = {
    "grpc": (lambda patch: patch.setitem(sys.modules, "grpc._cython.cygrpc", ModuleType("cygrpc")), "it has loaded gRPC, whose own "),
    "a GPU": (lambda patch: patch.setattr(inspector, "own_device", lambda: "/dev/nvidia0"), "it has /dev/nvidia0 open, "),
    "too large": (lambda patch: patch.setattr(inspector, "page_tables_of", lambda: 9 * MIB), "its page tables have 9.0 MiB, "),
    "too many objects": (lambda patch: patch.setattr(inspector, "MOST_BLOCKS", 1), "it has "),
    "PyPy": (lambda patch: patch.setattr(inspector, "can_count_objects", lambda: False), "that needs Linux, and CPython"),
    "macOS": (lambda patch: patch.setattr(inspector, "resident_of", lambda: None), "that needs Linux, and CPython"),
}


@pytest.mark.parametrize("why", REFUSALS)
def test_what_a_worker_refuses(monkeypatch: pytest.MonkeyPatch, said: Callable[[], list[str]], why: str) -> None:
    """Without a fork, in one line, and in the answer."""
    pool = Pool(Scoreboard.private())
    guard = guarded(pool)
    monkeypatch.setattr(inspector, "fork", lambda *_: pytest.fail("it has forked"))
    REFUSALS[why][0](monkeypatch)
    pool.order()

    one = told(pool, guard)

    assert (one.phase, one.objects) == (Phase.FAILED, None)
    assert one.text.startswith(REFUSALS[why][1])
    assert [line for line in said() if "inspected" in line] == [f"{guard} is not inspected: {one.text}"]


def test_without_room_in_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages that the fork looks at are copied: they must not be what the pool recycles for."""
    pool = Pool(Scoreboard.private())
    pool.board.header.describe(workers=1, turns=1, limit=1 << 40, budget=1 << 40)
    pool.board.header.held = (1 << 40) - MIB
    guard = guarded(pool)
    pool.order()

    one = told(pool, guard)

    assert one.phase is Phase.FAILED
    assert one.text.startswith("the pool is short of memory: 1.0 MiB left up to its budget, and a fork that counts may take ")


def test_without_room_up_to_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of it must be left in any case."""
    pool = Pool(Scoreboard.private())
    guard = guarded(pool)
    limit = 1 << 42
    monkeypatch.setattr(
        stocktaking, "read_capacity", lambda: replace(read_capacity(), limit=limit, working_set=limit * 4 // 5, droppable=0)
    )
    pool.order()

    one = told(pool, guard)

    assert one.phase is Phase.FAILED
    assert one.text.startswith("the pool is short of memory: a fork that counts may take ")
    assert one.text.endswith(", and 25% of the limit must be left in any case")


def test_a_fork_that_the_kernel_refuses(monkeypatch: pytest.MonkeyPatch, said: Callable[[], list[str]]) -> None:
    """RLIMIT_NPROC, or the pids of its cgroup."""

    def refused(*_: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    pool = Pool(Scoreboard.private())
    guard = guarded(pool)
    monkeypatch.setattr(inspector, "fork", refused)
    pool.order()

    one = told(pool, guard)

    assert (one.phase, one.text) == (Phase.FAILED, "it can't be forked: Resource temporarily unavailable")
    assert guard.hard_limit is not None and pool.slot.state is State.SERVING
    assert said()[-1] == f"{guard} is not inspected: {one.text}"


def fails() -> None:
    """In the fork: it has no memory."""
    raise MemoryError


def hangs() -> None:
    """In the fork."""
    time.sleep(60)


def dies() -> None:
    """In the fork: the kernel takes it."""
    os.kill(os.getpid(), 9)


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        (fails, "the fork could not count: MemoryError()"),
        (hangs, "the fork that counted has not come to its end within 0 s"),
        (dies, "the fork that counted was killed: by the kernel, if memory is short, because it is to take that first"),
        (lambda: os._exit(7), "the fork that counted has ended with status 7"),
    ],
)
def test_what_becomes_of_the_fork(monkeypatch: pytest.MonkeyPatch, what: Callable[[], None], expected: str) -> None:
    """Its worker reaps it, tells, and goes on."""
    pool = Pool(Scoreboard.private())
    guard = guarded(pool)
    monkeypatch.setattr(inspector, "take_stock", lambda parent: what())
    monkeypatch.setattr(inspector, "ENDS_AFTER", 0.2)
    children = children_of(os.getpid())
    pool.order()

    one = told(pool, guard)

    assert (one.phase, one.text) == (Phase.FAILED, expected)
    assert children_of(os.getpid()) == children


def test_a_fork_that_hangs_before_its_alarm(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a library's own handler of forks, say: its worker kills it."""
    pool = Pool(Scoreboard.private())
    guard = guarded(pool)
    monkeypatch.setattr(inspector, "take_stock", lambda parent: hangs())
    monkeypatch.setattr(inspector, "KILLED_AFTER", 0.2)
    monkeypatch.setattr(inspector, "ENDS_AFTER", 60.0)
    pool.order()

    assert told(pool, guard).text == "the fork that was to count has hung, and was killed after 0 s"


def test_a_worker_that_ends_leaves_no_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    """That would outlive it."""
    pool = Pool(Scoreboard.private())
    guard = guarded(pool)
    monkeypatch.setattr(inspector, "take_stock", lambda parent: hangs())
    monkeypatch.setattr(inspector, "ENDS_AFTER", 60.0)
    children = children_of(os.getpid())
    pool.order()
    guard.meter.publish_at = 0.0
    guard.tick()
    assert len(children_of(os.getpid())) == len(children) + 1

    guard.retire()

    assert children_of(os.getpid()) == children


def test_what_the_worker_holds_by_itself_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages that its fork has, too, are its own all the same: where soft limits count those, no sample is taken until it is gone."""
    pool = Pool(Scoreboard.private())
    guard = guarded(pool)
    monkeypatch.setattr(inspector, "take_stock", lambda parent: hangs())
    monkeypatch.setattr(inspector, "ENDS_AFTER", 0.3)

    def own(after: float = 60.0) -> int:
        """As its soft limit counts it, when another sample is due."""
        guard.meter.measure()
        return guard._gauge.read("uss", guard.meter.held, 0, time.monotonic() + after)

    before = own(0.0)
    pool.order()
    guard.meter.publish_at = 0.0
    guard.tick()
    shared = shared_out()
    assert shared is not None and shared.uss < before / 2

    assert own() > 0.9 * before
    assert told(pool, guard).phase is Phase.FAILED
    assert own() > 0.9 * before
    assert guard._gauge.shares is not None and guard._gauge.shares.uss > 0.9 * before


def test_a_worker_that_leaves_is_not_inspected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its order may have come before."""
    pool = Pool(Scoreboard.private())
    guard = guarded(pool)
    monkeypatch.setattr(inspector, "fork", lambda *_: pytest.fail("it has forked"))
    pool.order()
    guard.meter.leaving = True

    assert told(pool, guard).text == "it leaves"
