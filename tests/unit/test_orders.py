"""An operator's order to recycle a worker: from the mailbox on the scoreboard to the worker's slot, and back."""

from __future__ import annotations

import os
import struct
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.children import Child, Line
from unit.retiring import several

from oomsafe.errors import ScoreboardError
from oomsafe.kernel.process import start_time
from oomsafe.policy.limits import Capacity
from oomsafe.policy.probed import Stage
from oomsafe.policy.settings import Policy
from oomsafe.policy.state import State
from oomsafe.policy.trend import Growth
from oomsafe.scoreboard import layout, mailbox, places
from oomsafe.scoreboard.board import Scoreboard
from oomsafe.scoreboard.layout import Counters
from oomsafe.scoreboard.mailbox import GOOD_FOR, Answer, Mailbox, OperatorOrder, What, order_probe, order_recycle
from oomsafe.scoreboard.slot import Figures, Slot
from oomsafe.supervisor.inspections import Inspections
from oomsafe.supervisor.orders import Orders
from oomsafe.supervisor.probes import TRIES, Probes
from oomsafe.supervisor.replacements import Reading

NewBoard = Callable[..., Scoreboard]
POLICY, DRY = Policy(), Policy(dry_run=True)
NOW = 1000.0


def one_worker(board: Scoreboard) -> Slot:
    """This process as the worker of a slot."""
    slot = board.reserve()
    assert slot is not None
    slot.claim()
    slot.set_state(State.SERVING)
    board._tenants.by_number[slot.number].pid = os.getpid()
    board._tenants.by_number[slot.number].started = start_time() or 0
    return slot


def orders_of(board: Scoreboard, held: int = 0) -> Orders:
    """Of a pool whose budget is a GiB, and which holds so much of it."""

    def reading() -> Reading:
        return Reading(Capacity(1 << 30, "a test"), 1 << 30, held)

    return Orders(board, Probes(board, reading), Inspections(board, reading))


def put(board: Scoreboard, order: OperatorOrder) -> None:
    """As a tool writes it."""
    layout.write(board.header.memory, layout.MAILBOX_AT, layout.MAILBOX, *order)


def answer(board: Scoreboard) -> tuple[int, int]:
    """(sequence, answer)."""
    return layout.ANSWER.unpack_from(board.header.memory, layout.ANSWER_AT)


def right(slot: Slot, sequence: int = 1) -> OperatorOrder:
    """The order that is meant for it."""
    return OperatorOrder(sequence, slot.number, os.getpid(), start_time() or 0, slot.generation, NOW)


def test_an_order_is_passed_on_once_and_answered(said: Callable[[], list[str]]) -> None:
    """One line, however often it is ordered; the worker finds it in its slot, its successor does not."""
    board = Scoreboard.private()
    slot, orders = one_worker(board), orders_of(board)
    assert not slot.operator_orders

    for sequence, expected in ((1, Answer.ORDERED), (2, Answer.LEAVES), (3, Answer.LEAVES)):
        put(board, right(slot, sequence))
        orders.tick(POLICY, NOW)
        assert answer(board) == (sequence, expected)

    assert slot.operator_orders
    assert said() == [f"worker {os.getpid()} (slot 0) is to be recycled by an operator's order"]
    board.release(slot.number, slot.generation)
    assert not one_worker(board).operator_orders


def test_an_order_is_heeded_once() -> None:
    """Ticks that find it again do nothing."""
    board = Scoreboard.private()
    slot, orders = one_worker(board), orders_of(board)
    put(board, right(slot))

    orders.tick(POLICY, NOW)
    layout.write(board.header.memory, layout.ANSWER_AT, layout.ANSWER, 0, 0)
    orders.tick(POLICY, NOW)

    assert answer(board) == (0, 0)


@pytest.mark.parametrize(
    ("policy", "change", "state", "expected"),
    [
        pytest.param(POLICY, {"pid": 1}, State.SERVING, Answer.UNKNOWN, id="another pid"),
        pytest.param(POLICY, {"pid": 0, "started": 0}, State.SERVING, Answer.UNKNOWN, id="no pid"),
        pytest.param(POLICY, {"started": 1}, State.SERVING, Answer.UNKNOWN, id="another process of this pid"),
        pytest.param(POLICY, {"generation": 2}, State.SERVING, Answer.UNKNOWN, id="another worker of this slot"),
        pytest.param(POLICY, {"slot": 1}, State.SERVING, Answer.UNKNOWN, id="a slot without a worker"),
        pytest.param(POLICY, {"slot": layout.COUNT_MAX}, State.SERVING, Answer.UNKNOWN, id="no slot at all"),
        pytest.param(POLICY, {"at": NOW - GOOD_FOR - 1}, State.SERVING, Answer.STALE, id="old"),
        pytest.param(POLICY, {"at": NOW + GOOD_FOR + 1}, State.SERVING, Answer.STALE, id="of the future"),
        pytest.param(POLICY, {"at": float("nan")}, State.SERVING, Answer.STALE, id="no time"),
        pytest.param(POLICY, {}, State.DRAINING, Answer.LEAVES, id="it drains"),
        pytest.param(DRY, {}, State.SERVING, Answer.DRY_RUN, id="dry run"),
        pytest.param(POLICY, {}, State.STARTING, Answer.ORDERED, id="it boots"),
    ],
)
def test_what_becomes_of_it(policy: Policy, change: dict[str, float], state: State, expected: Answer) -> None:
    """Only ORDERED reaches the worker."""
    board = Scoreboard.private()
    slot = one_worker(board)
    slot.set_state(state)
    put(board, right(slot)._replace(**change))  # type: ignore[arg-type]

    orders_of(board).tick(policy, NOW)

    assert answer(board) == (1, expected)
    assert slot.operator_orders == (expected is Answer.ORDERED)


@given(st.binary(min_size=layout.MAILBOX.size, max_size=layout.MAILBOX.size), st.binary(min_size=12, max_size=12))
def test_garbage_orders_nothing(raw: bytes, answered: bytes) -> None:
    """Law: whatever stands in the mailbox, no worker is ordered by it."""
    board = Scoreboard.private()
    slot = one_worker(board)
    board.header.memory[layout.MAILBOX_AT : layout.MAILBOX_AT + layout.MAILBOX.size] = raw
    board.header.memory[layout.ANSWER_AT : layout.ANSWER_AT + layout.ANSWER.size] = answered

    orders_of(board).tick(POLICY, NOW)

    assert not slot.operator_orders


def probing(slot: Slot, sequence: int = 1, **more: float) -> OperatorOrder:
    """The order to probe whichever worker."""
    return OperatorOrder(sequence, 0, 0, 0, 0, NOW, What.PROBE, 100, 10.0)._replace(**more)  # type: ignore[arg-type]


def test_one_worker_is_probed_at_a_time(said: Callable[[], list[str]]) -> None:
    """Until it has told, or is gone: then one line says that nothing came of it."""
    board = Scoreboard.private()
    slot, orders = one_worker(board), orders_of(board)

    for sequence, expected in ((1, Answer.ORDERED), (2, Answer.BUSY)):
        put(board, probing(slot, sequence))
        orders.tick(POLICY, NOW)
        assert answer(board) == (sequence, expected)
    assert slot.probe_order == (100, 10.0)

    board.header.note_probe(os.getpid(), slot.generation, Stage.TRACES, "traces")
    board.release(slot.number, slot.generation)
    another = one_worker(board)
    put(board, probing(another, 3))
    orders.tick(POLICY, NOW)

    assert answer(board) == (3, Answer.ORDERED)
    assert said() == [f"the probe of worker {os.getpid()} failed: its worker ended before it could tell what it had found"]
    assert board.read().probed is not None
    board.header.note_probe(os.getpid(), another.generation, Stage.FAILED, "no room")
    put(board, probing(another, 4))
    orders.tick(POLICY, NOW)
    assert answer(board) == (4, Answer.ORDERED)  # it stays, and can be probed again


def test_a_worker_that_is_gone_before_it_has_begun(said: Callable[[], list[str]]) -> None:
    """Who has ordered it is told, and need not wait for ever."""
    board = Scoreboard.private()
    slot, orders = one_worker(board), orders_of(board)
    put(board, probing(slot))
    orders.tick(POLICY, NOW)
    board.release(slot.number, slot.generation)

    orders._probes.tick(POLICY)

    probed = board.header.probed
    assert probed is not None
    assert (probed.pid, probed.generation, probed.stage) == (os.getpid(), slot.generation, Stage.FAILED)
    assert said() == [f"the probe of worker {os.getpid()} failed: its worker ended before it could tell what it had found"]


@pytest.mark.parametrize(
    ("policy", "change", "state", "held", "expected"),
    [
        pytest.param(DRY, {}, State.SERVING, 0, Answer.DRY_RUN, id="dry run"),
        pytest.param(POLICY, {"work": 0}, State.SERVING, 0, Answer.STRANGE, id="no work"),
        pytest.param(POLICY, {"work": 1 << 40}, State.SERVING, 0, Answer.STRANGE, id="too much work"),
        pytest.param(POLICY, {"seconds": float("nan")}, State.SERVING, 0, Answer.STRANGE, id="no time"),
        pytest.param(POLICY, {"seconds": float("inf")}, State.SERVING, 0, Answer.STRANGE, id="for ever"),
        pytest.param(POLICY, {"seconds": -1.0}, State.SERVING, 0, Answer.STRANGE, id="in the past"),
        pytest.param(POLICY, {"what": 77}, State.SERVING, 0, Answer.STRANGE, id="what nobody knows"),
        pytest.param(POLICY, {"pid": 1}, State.SERVING, 0, Answer.UNKNOWN, id="another's worker"),
        pytest.param(POLICY, {}, State.SERVING, (1 << 30) - (32 << 20), Answer.SHORT, id="no room in the pool"),
        pytest.param(POLICY, {}, State.STARTING, 0, Answer.SHORT, id="nobody serves"),
        pytest.param(POLICY, {}, State.WAITING, 0, Answer.SHORT, id="it is about to be recycled"),
    ],
)
def test_what_is_not_probed(policy: Policy, change: dict[str, float], state: State, held: int, expected: Answer) -> None:
    """Nothing reaches the worker."""
    board = Scoreboard.private()
    slot = one_worker(board)
    slot.set_state(state)
    put(board, probing(slot, **change))

    orders_of(board, held).tick(policy, NOW)

    assert answer(board) == (1, expected)
    assert slot.probe_order is None


def test_by_itself_until_it_knows(new_board: NewBoard) -> None:
    """A leak's pool: again if nothing came of it, at most so often, never after it was told; anew after a reload."""
    board = new_board()
    slot = one_worker(board)
    other = one_worker(board)
    probes = Probes(board, lambda: Reading(Capacity(1 << 30, "a test"), 1 << 30, 0))
    policy = Policy(probe=True)

    def ordered() -> int:
        """How many workers are ordered after one more retirement, which frees them again."""
        board.header.note_retirement(replace(several(1)[0], at=time.time()))
        probes.tick(policy)
        found = sum(each.probe_order is not None for each in (slot, other))
        for each in (slot, other):
            board.order_probe(each.number, each.generation, 0, 0.0)
        return found

    def fails() -> None:
        board.header.note_probe(os.getpid(), probes._generation or 0, Stage.FAILED, "no room")

    for one in several(3):
        board.header.note_retirement(one)
    for _ in range(TRIES):
        assert ordered() == 1
        assert ordered() == 0  # one at a time
        fails()
    assert ordered() == 0

    probes.reloaded()
    assert ordered() == 1
    board.header.note_probe(os.getpid(), probes._generation or 0, Stage.NOTHING, "no line")
    assert ordered() == 0
    probes.reloaded()
    policy = Policy(probe=False)
    assert ordered() == 0
    policy = Policy(probe=True, dry_run=True)
    assert ordered() == 0


def test_a_worker_that_works_is_probed(new_board: NewBoard) -> None:
    """Of those with room the one with most, but not one that gets no work: clients may keep their connections to another."""
    board = new_board()
    # room in MiB, and work done
    slots = [one_worker(board) for _ in range(4)]
    for slot, (room, work) in zip(slots, [(20, 9000), (500, 10), (100, 5000), (200, 4000)], strict=True):
        slot.publish(Figures(rss=1 << 30, anon=1 << 30, soft=(1 << 30) + (room << 20)), Counters(work=work))
        slot.need(1 << 30, Growth())
    put(board, probing(slots[0]))

    orders_of(board).tick(POLICY, NOW)

    assert [slot.probe_order is not None for slot in slots] == [False, False, False, True]


def test_a_tool_orders_a_probe_through_the_file(new_board: NewBoard) -> None:
    """Of this worker, or of any."""
    board = new_board()
    slot = one_worker(board)
    (worker,) = board.read().workers
    stop = supervised(board)

    try:
        answers = [order_probe(board.path or "", worker, 7, 5.0), order_probe(board.path or "", None, 7, 5.0)]
    finally:
        stop()

    assert answers == [Answer.ORDERED, Answer.BUSY]
    assert slot.probe_order == (7, 5.0)


def test_an_order_that_is_being_written_is_no_order() -> None:
    """The sequence comes last."""
    board = Scoreboard.private()
    put(board, right(one_worker(board), sequence=0))

    assert Mailbox(board.header.memory).order() is None


def supervised(board: Scoreboard, *, ticks: bool = True) -> Callable[[], None]:
    """Tick in a thread, as a supervisor would; returns what ends it."""
    orders, end = orders_of(board), threading.Event()

    def run() -> None:
        while ticks and not end.wait(0.005):
            orders.tick(POLICY, time.time())

    thread = threading.Thread(target=run)
    thread.start()

    def stop() -> None:
        end.set()
        thread.join()

    return stop


@pytest.mark.parametrize("sealed", [True, False], ids=["a sealed memory that the file names", "the file itself"])
def test_a_tool_orders_through_the_file(new_board: NewBoard, monkeypatch: pytest.MonkeyPatch, sealed: bool) -> None:
    """The answers follow the orders; afterwards the mailbox is empty, so that nothing is ordered again after a restart."""
    monkeypatch.setattr(mailbox.backing, "may_become_another_user", lambda: sealed)
    board = new_board()
    slot = one_worker(board)
    (worker,) = board.read().workers
    assert board.path
    stop = supervised(board)

    try:
        answers = [order_recycle(board.path, worker) for _ in range(3)]
    finally:
        stop()

    assert answers == [Answer.ORDERED, Answer.LEAVES, Answer.LEAVES]
    assert slot.operator_orders
    assert Mailbox(board.header.memory).order() is None


def test_without_an_answer_the_order_is_withdrawn(new_board: NewBoard) -> None:
    """And a supervisor that goes on later finds none."""
    board = new_board()
    slot = one_worker(board)
    assert board.path

    assert order_recycle(board.path, board.read().workers[0], patience=0.05) is None

    orders_of(board).tick(POLICY, time.time())
    assert not slot.operator_orders


def test_an_answer_that_nobody_knows_is_none(new_board: NewBoard, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker may write there, too."""
    board = new_board()
    one_worker(board)
    monkeypatch.setattr(Orders, "_heed", lambda *_: 99)
    stop = supervised(board)

    try:
        assert order_recycle(board.path or "", board.read().workers[0], patience=2) is None
    finally:
        stop()


def test_while_one_tool_orders_another_waits(new_board: NewBoard) -> None:
    """And gives up in time."""
    board = new_board()
    one_worker(board)
    worker, path = board.read().workers[0], board.path or ""

    def other(line: Line) -> None:
        line.say("begins")
        line.say(order_recycle(path, worker, patience=1.0))

    with Child(other) as line:
        assert line.hear() == "begins"
        deadline = time.monotonic() + 5
        while Mailbox(board.header.memory).order() is None:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        with pytest.raises(ScoreboardError, match="another process is giving an order"):
            order_recycle(path, worker, patience=0.1)
        assert line.hear() is None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
@pytest.mark.parametrize("sealed", [True, False])
def test_another_user_can_not_order(new_board: NewBoard, monkeypatch: pytest.MonkeyPatch, sealed: bool) -> None:
    """The board is its user's alone."""
    monkeypatch.setattr(mailbox.backing, "may_become_another_user", lambda: sealed)
    board = new_board()
    one_worker(board)
    worker, path = board.read().workers[0], board.path or ""

    def other(line: Line) -> None:
        os.setuid(65534)
        try:
            line.say(order_recycle(path, worker, patience=0.1))
        except ScoreboardError as error:
            line.say(str(error))

    with Child(other) as line:
        assert "Permission denied" in line.hear()
    assert layout.SEQUENCE.unpack_from(board.header.memory, layout.MAILBOX_AT) == (0,)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_root_may_order_in_the_pool_of_another_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a third user may not."""
    with tempfile.TemporaryDirectory() as parent:
        os.chmod(parent, 0o1777)  # as /dev/shm
        monkeypatch.setattr(places, "folders", lambda: iter([f"{parent}/oomsafe-{os.geteuid()}"]))

        def pool(line: Line) -> None:
            os.setgroups([])
            os.setuid(65534)
            board, _ = Scoreboard.create(1, "test")
            slot = one_worker(board)
            stop = supervised(board)
            line.say((board.path, board.read().workers[0]))
            line.hear()
            stop()
            line.say(slot.operator_orders)

        def third(line: Line) -> None:
            os.setgroups([])
            os.setuid(65533)
            try:
                line.say(order_recycle(path, worker, patience=0.1))
            except ScoreboardError as error:
                line.say(str(error))

        with Child(pool) as supervisor:
            path, worker = supervisor.hear()
            with Child(third) as other:
                refused = other.hear()
            answered = order_recycle(path, worker)
            supervisor.say("end")
            ordered = supervisor.hear()

    assert "Permission denied" in refused
    assert (answered, ordered) == (Answer.ORDERED, True)


def test_a_board_that_is_cut_short_is_said(new_board: NewBoard, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its opening and the order."""
    board = new_board()
    one_worker(board)
    worker, path = board.read().workers[0], board.path or ""
    fd = os.open(path, os.O_RDWR)
    monkeypatch.setattr(mailbox.backing, "open_to_order", lambda _: fd)

    with monkeypatch.context() as here, pytest.raises(ScoreboardError, match="cut short"):
        here.setattr(os, "pread", lambda *_: b"")
        order_recycle(path, worker)


def test_the_sequence_never_is_zero(new_board: NewBoard) -> None:
    """Not even after the highest."""
    board = new_board()
    one_worker(board)
    layout.write(board.header.memory, layout.ANSWER_AT, struct.Struct("<Q"), layout.COUNT_MAX)
    stop = supervised(board)

    try:
        assert order_recycle(board.path or "", board.read().workers[0]) is Answer.ORDERED
    finally:
        stop()

    assert answer(board)[0] == 1
    assert mailbox.PATIENCE < GOOD_FOR


def test_a_slot_that_nobody_has_claimed_yet_can_not_be_ordered() -> None:
    """Not even by its zeros."""
    board = Scoreboard.private()
    slot = board.reserve()
    assert slot is not None
    put(board, OperatorOrder(1, slot.number, 0, 0, slot.generation, NOW))

    orders_of(board).tick(POLICY, NOW)

    assert answer(board) == (1, Answer.UNKNOWN)


def test_a_worker_that_the_server_has_not_named() -> None:
    """It has claimed its slot, and is a child of the supervisor."""
    board = Scoreboard.private()
    slot = board.reserve()
    assert slot is not None

    def claims(line: Line) -> None:
        slot.claim()
        line.say((os.getpid(), start_time()))
        line.hear()

    with Child(claims) as line:
        pid, started = line.hear()
        put(board, OperatorOrder(1, slot.number, pid, started, slot.generation, NOW))
        orders_of(board).tick(POLICY, NOW)
        line.say("end")

    assert answer(board) == (1, Answer.ORDERED)
