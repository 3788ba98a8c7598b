"""This worker's hard limit: the kernel refuses it memory beyond, so that one request can't take the whole service down."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING

from oomsafe.kernel.malloc import trim
from oomsafe.kernel.process import peak_rss_of
from oomsafe.log import attempt, log, once
from oomsafe.policy.text import printable
from oomsafe.policy.units import MIB, format_size
from oomsafe.scoreboard import layout
from oomsafe.scoreboard.slot import Slot
from oomsafe.worker.meter import Meter, Work

if TYPE_CHECKING:
    from oomsafe.kernel.rlimit import DataLimit, Outside, Reading

#: A worker that was refused memory is spent if what it may still map is less than this share of what that was after boot.
SPENT = 0.5

#: Bytes that a worker may map beyond its limit while it answers for a request that was refused memory.
RESERVE = 8 * MIB

#: Seconds for which a MemoryError is put down to a cap of the supervisor's that has ended: giving memory back takes time.
CAPPED_LATELY = 1.0


class HardLimit:
    """The hard limit of one worker. Its guard calls follow(), and adapters call refuses() for a MemoryError that comes out of the app."""

    def __init__(self, meter: Meter, name: str, slot: Slot | None = None) -> None:
        """`name` is the worker's, for the log; `slot` is where its supervisor puts a cap, None: nobody does."""
        self._meter = meter
        self._name = name
        self._slot = slot
        self._size: int | None = None
        """The limit in force in bytes; None: there is none."""
        self._limit: DataLimit | None = None
        self._can_t = False
        """The kernel does not enforce it."""
        self._had = 0
        """What the worker might map right after boot, in bytes."""
        self.spent = False
        """The worker has refused a request memory, and little of the room that it had after boot has come back."""

    @property
    def enforced(self) -> bool:
        """Whether the kernel refuses memory beyond the limit now."""
        return self._size is not None

    @property
    def room(self) -> int | None:
        """What the worker may still get, in bytes; None: the kernel does not hold it to a limit."""
        return None if self._size is None else self._size - self._meter.held

    def follow(self, size: int | None) -> None:
        """Have the kernel enforce this limit, in bytes, from now on; None: none. Call it each time memory was measured. Never raises."""
        if size is not None or self._limit is not None:
            attempt("the hard limit", "the server", lambda: self._follow(size))

    def _follow(self, size: int | None) -> None:
        now = None if size is None or self._can_t else self._reading(size)
        if size is None or now is None or (self._limit is None and not self._begin(size, now.data)):
            before, self._size = self._size, None
            if self._limit is not None and before is not None:
                self._limit.lift()
            return
        assert self._limit is not None
        self._size = size
        theirs = self._limit.follow(now)
        self._had = self._had or now.room
        self.spent = self.spent and self._is_spent(now)
        if theirs is not None:
            once(
                "rlimit", logging.WARNING, "this application has set its own RLIMIT_DATA, %s, which is lower than what the hard limit %s "
                "comes to: it stays", format_size(theirs), format_size(size),
            )  # fmt: skip

    def _is_spent(self, now: Reading) -> bool:
        """Whether there is little room: memory has not been given back, or only within heaps that other threads can't use."""
        soft = None if self._limit is None else self._limit.soft
        return soft is not None and soft - now.data < self._had * SPENT

    def limit_for_tasks(self) -> DataLimit | None:
        """This process's limit, for the limits of the tasks that it runs, whether it has one of its own or not.

        None: the kernel does not enforce it, which is logged once.
        """
        if self._limit is None and not self._can_t:
            found = self._meter.memory.mapped()
            self._begin(None, 0 if found is None else found[2])
        return self._limit

    def _begin(self, size: int | None, data: int) -> bool:
        """`size` None: only tasks have limits."""
        from oomsafe.kernel.rlimit import DataLimit, enforcement  # imported here, because most workers have no hard limit
        from oomsafe.worker.exemptions import install

        self._can_t = True  # until all of it is there
        found = enforcement(data)
        if not found.enforced:
            what, then = (
                ("memory limits of tasks", "the child of a task above it is killed") if size is None
                else (f"hard limit {format_size(size)}", "a worker above it is recycled when its work is done, as above its soft limit")
            )  # fmt: skip
            once("rlimit", logging.WARNING, "%s: the kernel does not refuse memory beyond it (%s): %s", what, found.reason, then)
            return False
        limit = DataLimit(lambda: self._reading(self._size or 0), self._outside)
        missing = install(limit)
        if missing:
            log.warning("what these start has this worker's hard limit, too: %s could not be exempt from it", ", ".join(missing))
        self._limit, self._can_t = limit, False
        return True

    def _reading(self, size: int) -> Reading | None:
        """What a limit of `size` bytes is set by, measured now; None: not known."""
        from oomsafe.kernel.rlimit import Reading

        found = self._meter.memory.mapped()
        if found is None:
            return None
        resident, shared, data = found
        return Reading(data, resident - shared, size - self._meter.held_of(resident, shared))

    def _outside(self) -> Outside:
        """What the supervisor has done to the limit."""
        from oomsafe.kernel.rlimit import NOBODY, Outside

        if self._slot is None:
            return NOBODY
        cap = self._slot.cap
        if not cap.most:
            return NOBODY
        return Outside(cap.most if cap.holds(time.monotonic()) else None, cap.before)

    def _room_of_pool(self) -> int | None:
        """What was left up to the pool's limit when the supervisor has capped this worker, a moment ago; None: it has not.

        Bytes.
        """
        cap, soft = None if self._slot is None else self._slot.cap, None if self._limit is None else self._limit.soft
        return cap.room if cap is not None and soft is not None and cap.most < soft and cap.holds(time.monotonic(), CAPPED_LATELY) else None

    def refuses(self, work: Work | None, error: BaseException, answer: str) -> bool:
        """Whether this error of the app is the hard limit's doing. If so: give back what the request holds, log a line, and count it.

        `answer` says what the client gets, for the log. Never raises.
        """
        if self._limit is not None:
            self._limit.release()  # the first thing, for even a call of ours may find no memory
        if not isinstance(error, MemoryError) or not self.enforced or self._limit is None:
            return False
        self._limit.grant(RESERVE)
        try:
            attempt("a request that was refused memory", "the server", lambda: self._tell(work, error, answer))
        finally:
            self._limit.withdraw(RESERVE)
        return True

    def _tell(self, work: Work | None, error: BaseException, answer: str) -> None:
        meter = self._meter
        name = "work" if work is None else printable(work.name)
        grown = 0 if work is None else work.grown()
        held, where, peak, room = meter.held, where_of(error), peak_rss_of(os.getpid()), self._room_of_pool()
        # before and after memory is given back: what stays mapped can be taken again without the kernel being asked
        self._follow(self._size)
        let_go(error)
        trim()  # the C heap keeps what another thread than the main one has freed
        meter.measure()
        self.spent = True  # until it is seen that it is not
        self._follow(self._size)
        meter.counters.aborts[layout.ABORTS.index("hard_limit" if room is None else "pool")] += 1
        # a framework that answers the error itself has let go of most by now: then only the peak tells how much it was
        most = "" if peak is None else f" (rss {format_size(peak)} at its peak since its start)"
        leaves, then = f"its hard limit {format_size(self._size)} leaves", "raise hard_limit"
        if room is not None:
            leaves = f"its pool has left ({format_size(room)} up to the limit, and this worker held most of those that grew)"
            then = "lower hard_limit, have fewer workers, or more memory"
        log.error(
            "%s: %s has asked for more memory than %s%s: it had grown by %s, and the worker held %s%s; %s; have it take less at a time, "
            "or %s",
            self._name, name, leaves, where, format_size(max(0, grown)), format_size(held), most, answer, then,
        )  # fmt: skip

    def lift(self) -> None:
        """Have no limit from now on: this process serves no more, and may go on as another program's. Never raises."""
        self._can_t = True
        if self._limit is not None:
            attempt("the hard limit", "the server", self._lift)

    def _lift(self) -> None:
        from oomsafe.worker.exemptions import remove

        self._follow(None)
        remove()

    def leave(self) -> None:
        """In a fork of the process: the limit is its parent's."""
        if self._limit is not None:
            self._limit.leave()
        self._size, self._limit, self._can_t = None, None, True


def _frames(error: BaseException) -> Iterator[TracebackType]:
    trace = error.__traceback__
    while trace is not None:
        yield trace
        trace = trace.tb_next


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and those that it came from or while they were handled."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def where_of(error: BaseException) -> str:
    """`` in export (shop/views.py:42)``: the innermost frame of the first MemoryError, which others may have come from: whoever reports one
    needs memory, too. Empty if there is none."""
    first = [error, *(one for one in chain(error) if isinstance(one, MemoryError))][-1]
    for trace in (*_frames(first),)[-1:]:
        code = trace.tb_frame.f_code
        file = "/".join(code.co_filename.split("/")[-2:])
        return f" in {printable(code.co_name)} ({printable(file)}:{trace.tb_lineno})"
    return ""


def let_go(error: BaseException) -> None:
    """Empty the frames that have ended with this error, or with one that it came from: they hold what the request has allocated, and must
    not until it is logged."""
    for one in chain(error):
        for trace in _frames(one):
            try:
                trace.tb_frame.clear()
            except RuntimeError:  # it still runs: it is one of ours, or of the server's
                continue
            if sys.version_info < (3, 13):
                # Who reports errors with the values of variables has read this, and the frame keeps a copy, which clear() leaves.
                # Reading it again updates the copy: nothing is left in it. Newer Pythons keep none (PEP 667).
                trace.tb_frame.f_locals  # noqa: B018
