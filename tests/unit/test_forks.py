"""A fork of a worker that comes back through our code: nothing of what it does reaches its parent's slot."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from typing import Any

import pytest
from unit.children import Child, Line, in_child
from unit.scripted import CGROUP, MIB, Memory

from oomsafe.policy.limits import Capacity
from oomsafe.policy.settings import Policy
from oomsafe.policy.state import State
from oomsafe.scoreboard import layout
from oomsafe.scoreboard.board import Scoreboard
from oomsafe.worker.guard import Guard
from oomsafe.worker.meter import Work
from oomsafe.wsgi import MemoryMiddleware

HERE = Capacity(1000 * MIB, CGROUP, workers=2)


class Worker:
    """A worker that has served some requests, and what others see of it."""

    def __init__(self, board: Scoreboard) -> None:
        slot = board.reserve()
        assert slot is not None
        slot.claim()
        self.board, self.memory, self.recycled = board, Memory(50 * MIB), 0
        policy = Policy(soft_limit="100MiB", jitter=0, min_lifetime=0, reclaim=False, draining_oom_score_adj=0)
        self.guard = Guard(policy, recycle=self.recycle, board=board, slot=slot, capacity=HERE, memory=self.memory)
        self.guard.ready()
        for _ in range(3):
            self.guard.meter.begin(b"before").end()
        self.guard.meter.publish_at = 0.0
        self.work = self.guard.meter.begin(b"GET /fork")
        self.work.route = "/fork"

    def recycle(self) -> None:
        """Called by the guard."""
        self.recycled += 1

    def slot(self) -> bytes:
        """Its bytes on the scoreboard."""
        number = self.guard.slot.number
        at = layout.HEADER_SIZE + number * layout.SLOT_SIZE
        return bytes(self.board._memory[at : at + layout.SLOT_SIZE])

    def names(self) -> list[str]:
        """The routes that the pool counts under."""
        return self.board.header._names()


@pytest.fixture
def worker(board: Scoreboard) -> Worker:
    """In the middle of a request."""
    return Worker(board)


def ends(worker: Worker) -> None:
    """The request that forked ends in the child, too."""
    worker.work.end()


def grows(worker: Worker) -> None:
    """It is over the limit, and ends."""
    worker.memory.be(200 * MIB)
    worker.work.end()


def serves(worker: Worker) -> None:
    """It takes requests, more than there are cells, and has them in flight when it is killed."""
    worker.work.end()
    works: list[Work] = []
    for number in range(20):
        works.append(worker.guard.meter.begin(b"stolen %d" % number))
    works[0].end()


def ticks(worker: Worker) -> None:
    """The server's loop goes on in it."""
    worker.memory.be(200 * MIB)
    worker.guard.ready()
    worker.guard.meter.publish_at = 0.0
    worker.guard.tick()


def retires(worker: Worker) -> None:
    """It ends as a worker does."""
    worker.guard.retire()


def takes_up(worker: Worker) -> None:
    """What a Celery child does before a task."""
    worker.guard.slot.take_up(7, 50 * MIB)
    worker.guard.slot.heed_limit(7)


@pytest.mark.parametrize("act", [ends, grows, serves, ticks, retires, takes_up], ids=lambda act: act.__name__)
def test_nothing_reaches_the_parent(worker: Worker, act: Callable[[Worker], None]) -> None:
    """Neither a count nor a state, nor what is in flight, nor a route's name; and it is not told to recycle itself."""
    before, names = worker.slot(), worker.names()

    def child() -> tuple[int, bool]:
        act(worker)
        return worker.recycled, worker.guard.here

    assert in_child(child) == (0, False)
    assert (worker.slot(), worker.names()) == (before, names)
    worker.work.end()
    assert (worker.guard.meter.counters.work, worker.guard.meter.in_flight, worker.board.read().workers[0].in_flight) == (4, 0, [])


@pytest.mark.parametrize("act", [ticks, retires], ids=lambda act: act.__name__)
def test_a_fork_that_python_does_not_see(worker: Worker, act: Callable[[Worker], None]) -> None:
    """C code's: found where something is decided."""
    before = worker.slot()
    read, write = os.pipe()
    pid = ctypes.PyDLL(None).fork()
    if not pid:
        try:
            act(worker)
            os.write(write, b"%d" % worker.recycled)
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    os.close(write)

    assert os.read(read, 9) == b"0"
    os.close(read)
    assert worker.slot() == before


def test_a_lock_that_another_thread_held(worker: Worker) -> None:
    """The thread is not in the fork, so nobody would let go of it there."""
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with worker.guard.meter._lock:
            held.set()
            done.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(10)
    try:
        assert in_child(lambda: (worker.work.end(), worker.guard.meter.measure())[1]) == 50 * MIB
    finally:
        done.set()
        thread.join()


def test_a_supervisors_fork_claims_the_slot_that_it_was_given(board: Scoreboard) -> None:
    """The parent has reserved it, and claimed another."""
    own, given = board.reserve(), board.reserve()
    assert own is not None
    assert given is not None
    own.claim()

    def work(line: Line) -> None:
        given.claim()
        given.set_state(State.SERVING)
        own.set_state(State.LEAVING)
        line.say("claimed")
        line.hear()

    with Child(work) as child:
        child.hear()
        states = {worker.pid: worker.state for worker in board.read().workers}

        assert states == {os.getpid(): "starting", child.pid: "serving"}


def test_a_request_that_forks(board: Scoreboard) -> None:
    """Its child ends by sys.exit(), out through the middleware."""
    worker = Worker(board)
    worker.work.end()
    before = worker.slot()

    def app(environ: Any, start_response: Any) -> list[bytes]:
        def child() -> bool:
            worker.memory.be(200 * MIB)
            raise SystemExit

        environ["test.child"] = Child(lambda line: line.say(_ended(child)))
        start_response("200 OK", [])
        return []

    def _ended(child: Callable[[], bool]) -> bool:
        try:
            MemoryMiddleware(lambda *_: child(), guard=worker.guard)({"REQUEST_METHOD": "GET"}, None)  # type: ignore[arg-type, return-value]
        except SystemExit:
            return worker.slot()[: layout.CELLS_AT] == before[: layout.CELLS_AT]
        return False

    environ: dict[str, Any] = {"REQUEST_METHOD": "GET", "PATH_INFO": "/"}
    body: Any = MemoryMiddleware(app, guard=worker.guard)(environ, lambda *_: None)
    with environ["test.child"] as child:
        assert child.hear() is True
    body.close()

    assert (worker.guard.meter.counters.work, worker.guard.meter.in_flight) == (5, 0)
