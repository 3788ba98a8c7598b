"""An operator's order to a running pool: recycle this worker, have one trace its allocations, or tell what its memory is.

His tool leaves it on the scoreboard, and the supervisor answers.

Whoever may write to the scoreboard may order: the user that its file belongs to, and root. So may a worker, which can write every byte:
the supervisor takes an order only for a worker of its own, and gives it no more than that worker's turn to be replaced.
"""

from __future__ import annotations

import fcntl
import os
import struct
import time
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

from oomsafe.errors import ScoreboardError
from oomsafe.scoreboard import backing, layout

if TYPE_CHECKING:
    from oomsafe.scoreboard.view import WorkerView

#: Seconds for which an order is good: one that a stopped supervisor finds later would be a surprise.
GOOD_FOR = 10.0

#: Seconds for which a tool waits for the answer: a supervisor ticks about once a second.
PATIENCE = 5.0

_ASK_EVERY = 0.02


class What(IntEnum):
    """What is ordered."""

    RECYCLE = 1
    PROBE = 2
    """Trace the allocations of one worker; a pid of 0 lets the supervisor choose which."""
    INSPECT = 3
    """Have this worker tell what its memory is, while it serves."""


class Answer(IntEnum):
    """What the supervisor has made of an order."""

    ORDERED = 1
    """It has passed the order on to the worker."""
    DRY_RUN = 2
    """It does nothing: the policy says dry_run."""
    UNKNOWN = 3
    """It has no such worker, or not any more."""
    LEAVES = 4
    """The worker leaves already, or has this order already."""
    STALE = 5
    """The order is older than GOOD_FOR seconds, or comes from the future."""
    BUSY = 6
    """A worker of this pool is probed already, or inspected."""
    SHORT = 7
    """The pool has no room for a tracer's memory, or no worker that has; or none for what an inspection takes."""
    STRANGE = 8
    """The supervisor does not know such an order, or its figures are out of range."""


class OperatorOrder(NamedTuple):
    """An order. The supervisor trusts nothing in it."""

    sequence: int
    """Identifies the order; never 0."""
    slot: int
    pid: int
    started: int
    """The start time of the worker's process, in clock ticks since boot."""
    generation: int
    at: float
    """When it was given, seconds since 1970."""
    what: int = What.RECYCLE
    work: int = 0
    """A probe's window ends after so many pieces of work,"""
    seconds: float = 0.0
    """or after so many seconds."""


class Mailbox:
    """The supervisor's side; `memory` is the scoreboard's."""

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory

    def order(self) -> OperatorOrder | None:
        """The last order; None: there is none, or it is being written."""
        found = OperatorOrder(*layout.MAILBOX.unpack_from(self._memory, layout.MAILBOX_AT))
        (sequence,) = layout.SEQUENCE.unpack_from(self._memory, layout.MAILBOX_AT)
        return found if found.sequence and sequence == found.sequence else None

    def answer(self, order: OperatorOrder, answer: Answer) -> None:
        """Tell the operator's tool what became of the order."""
        layout.write(self._memory, layout.ANSWER_AT, layout.ANSWER, order.sequence, answer)


def order_recycle(path: str, worker: WorkerView, patience: float = PATIENCE) -> Answer | None:
    """Order the supervisor of the scoreboard at `path` to recycle this worker, and return its answer.

    None: there was none within `patience` seconds; then the order is withdrawn. Raises ScoreboardError if this process may not order, or
    while another tool does.
    """
    return _order(path, OperatorOrder(0, worker.slot, worker.pid, worker.started, worker.generation, 0.0), patience)


def order_probe(path: str, worker: WorkerView | None, work: int, seconds: float, patience: float = PATIENCE) -> Answer | None:
    """Order that supervisor to have this worker trace its allocations; None: a worker of its choice. Otherwise as order_recycle()."""
    who = (0, 0, 0, 0) if worker is None else (worker.slot, worker.pid, worker.started, worker.generation)
    return _order(path, OperatorOrder(0, *who, 0.0, What.PROBE, work, seconds), patience)


def order_inspection(path: str, worker: WorkerView, patience: float = PATIENCE) -> Answer | None:
    """Order that supervisor to have this worker tell what its memory is. Otherwise as order_recycle()."""
    return _order(path, OperatorOrder(0, worker.slot, worker.pid, worker.started, worker.generation, 0.0, What.INSPECT), patience)


def _order(path: str, order: OperatorOrder, patience: float) -> Answer | None:
    until = time.monotonic() + patience
    fd = backing.open_to_order(path)
    try:
        while not _lock(fd):
            if time.monotonic() >= until:
                raise ScoreboardError(f"{path}: another process is giving an order")
            time.sleep(_ASK_EVERY)
        return _ask(fd, order, until)
    except OSError as error:
        raise ScoreboardError(f"{path}: {error.strerror}") from error
    finally:
        os.close(fd)  # which also releases the lock


def _ask(fd: int, order: OperatorOrder, until: float) -> Answer | None:
    before = max(_read(fd, at, layout.SEQUENCE)[0] for at in (layout.MAILBOX_AT, layout.ANSWER_AT))
    sequence = before % layout.COUNT_MAX + 1  # never 0
    order = order._replace(sequence=sequence, at=time.time())
    raw, head = layout.MAILBOX.pack(*order), layout.SEQUENCE.size
    os.pwrite(fd, bytes(head), layout.MAILBOX_AT)
    os.pwrite(fd, raw[head:], layout.MAILBOX_AT + head)
    os.pwrite(fd, raw[:head], layout.MAILBOX_AT)
    try:
        while time.monotonic() < until:
            answered, answer = _read(fd, layout.ANSWER_AT, layout.ANSWER)
            if answered == sequence:
                return Answer(answer) if answer in frozenset(Answer) else None
            time.sleep(_ASK_EVERY)
        return None
    finally:
        os.pwrite(fd, bytes(head), layout.MAILBOX_AT)


def _read(fd: int, at: int, form: struct.Struct) -> tuple[int, ...]:
    found = os.pread(fd, form.size, at)
    if len(found) != form.size:
        raise ScoreboardError("the scoreboard was cut short")
    return form.unpack(found)


def _lock(fd: int) -> bool:
    """Lock the mailbox among tools: a record lock on its first byte, which the pool itself never takes."""
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, layout.MAILBOX_AT)
    except OSError:
        return False
    return True
