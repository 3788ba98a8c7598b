"""In a child: the kernel holds its task to memory_limit. The task gets a MemoryError where it asks for more.

While the task runs, RLIMIT_DATA is what the child had mapped at the task's begin, plus the limit (kernel/rlimit.py). A MemoryError that
leaves the task becomes MemoryLimitExceeded. What the kernel does not count there is left to MainProcess, which kills the child: mapped
files, shared memory, programs that the task has started, and pages that were mapped before and are touched only now.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from functools import wraps
from typing import Any

from billiard.exceptions import SoftTimeLimitExceeded
from celery import current_app
from celery.app import trace

from oomsafe.errors import MemoryLimitExceeded, SoftMemoryLimitExceeded
from oomsafe.kernel.process import PAGE
from oomsafe.kernel.rlimit import DataLimit
from oomsafe.log import failed, log, once
from oomsafe.policy.text import printable
from oomsafe.policy.units import format_size
from oomsafe.scoreboard import layout
from oomsafe.worker.guard import Guard
from oomsafe.worker.hard_limit import RESERVE, let_go, where_of
from oomsafe.worker.meter import Work


class TaskMemory:
    """The memory limits of the tasks of one child, as far as the kernel enforces them. TELL may come at any time, and calls follow()."""

    def __init__(self, guard: Guard, at_refusal: Callable[[int], None]) -> None:
        """`at_refusal(reserve)`: the task in hand has run out of memory, and the child may now use so many bytes more to report that."""
        self._meter = guard.meter
        self._hard = guard.hard_limit
        self._at_refusal = at_refusal
        self._limit: DataLimit | None = None
        self._statm = b""
        """What the meter has read last: (size, resident, shared, text, lib, data, dt) in pages, as statm has them."""
        self._data = 0
        """Bytes that were mapped then, as Reading.data has them."""
        self._task_id = ""
        self._most = 0
        """The bytes by which the task in hand may grow, in address space; 0: no limit of its own is in force."""
        self._before = 0
        """What the child held when the task began, in bytes."""
        self._refused: int | None = None
        """What the task in hand used when it was first refused more, in bytes; None: it was not."""
        self._works: Callable[[], Work | None] = lambda: None
        self._eased: set[str] = set()

    def install(self, works: Callable[[], Work | None]) -> None:
        """Be asked about each failure of a task. `works` returns the work in flight."""
        self._works = works
        inner = trace.TraceInfo.handle_error_state

        @wraps(inner)
        def handle_error_state(info: Any, task: Any, req: Any, *args: Any, **options: Any) -> Any:
            # a task that this one runs by apply() fails inside it, and that is for this one to catch
            if getattr(req, "id", None) != self._task_id:
                return inner(info, task, req, *args, **options)
            error = self.instead_of(str(task.name), info.retval if info.state == trace.FAILURE else getattr(info.retval, "exc", None))
            if error is None or info.state != trace.FAILURE:
                return inner(info, task, req, *args, **options)
            try:
                raise error from info.retval  # raised, because older versions of Celery take what is being handled
            except MemoryLimitExceeded:
                info.retval = error
                return inner(info, task, req, *args, **options)

        trace.TraceInfo.handle_error_state = handle_error_state

    def begin(self, name: str, task_id: str, growth: int | None) -> None:
        """The task begins, right after the meter has read the memory; it may grow by so many bytes. None: it has no limit."""
        self._task_id = task_id
        if growth is None:
            return
        limit = self._limit or self._first()
        if limit is None:
            return
        if name not in self._eased:
            self._ease(name)
        statm = self._meter.memory.statm
        if statm is not self._statm:
            self._statm, self._data = statm, int(statm.split(b" ", 6)[5]) * PAGE
        most, soft = self._data + growth, limit.soft
        # before the limit is in force, so that end() knows of it whenever TELL comes
        self._most = growth if soft is None or soft >= most else max(1, soft - self._data)
        self._before = self._meter.without_files
        limit.confine(most)

    def follow(self) -> None:
        """In the task: measure again what it has left. Memory that was only mapped, and not touched yet, does not count from now on.

        Raises what another signal tells the task meanwhile.
        """
        limit = self._limit
        if not self._task_id or not self._most or self._refused is not None or limit is None:
            return
        try:
            now = self._meter.memory.mapped()
            if now is not None:
                resident, shared, data = now
                before = self._statm.split(b" ", 3)
                grown = resident - shared - (int(before[1]) - int(before[2])) * PAGE
                limit.confine(data + max(0, self._most - max(0, grown)))
        except (SoftMemoryLimitExceeded, SoftTimeLimitExceeded):
            raise
        except Exception as error:
            failed("following a task's memory", "Celery", error)

    def end(self) -> None:
        """The task has ended. A second call changes nothing."""
        self._task_id = ""
        if self._most and self._limit is not None:
            self._limit.free()
            self._most = 0
            if self._refused is not None:
                self._limit.withdraw(RESERVE)
                self._refused = None

    def instead_of(self, name: str, error: BaseException | None) -> MemoryLimitExceeded | None:
        """What the task in hand fails with instead of this error; None: the error stays. Makes room for the report of the failure."""
        if error is None or not is_refusal(error):
            return None
        if not self._most or self._limit is None:
            self._hard.refuses(self._works(), error, "the task fails")
            return None
        self._limit.release()  # the first thing, for even a call of ours may find no memory
        try:
            if self._refused is None:
                self._at_refusal(RESERVE)  # from here on TELL raises nothing
                self._refused = 0
                self._limit.grant(RESERVE)
                self._meter.measure()
                self._refused = max(0, self._meter.without_files - self._before)
                self._tell(name, error, self._refused)
            let_go(error)
        except SoftMemoryLimitExceeded:  # TELL was a moment earlier, and comes no second time: the task fails already
            return self.instead_of(name, error)
        except Exception as failure:
            failed("a task that was refused memory", "Celery", failure)
        return MemoryLimitExceeded(printable(name), self._refused or 0, self._most)

    def _tell(self, name: str, error: BaseException, used: int) -> None:
        self._meter.counters.aborts[layout.ABORTS.index("hard_limit")] += 1
        log.error(
            "task %s has asked for more than its memory limit %s leaves%s: it had grown by %s, and its child held %s; the child goes on "
            "(task id %s)", printable(name), format_size(self._most), where_of(error), format_size(used), format_size(self._meter.held),
            printable(self._task_id),
        )  # fmt: skip

    def _first(self) -> DataLimit | None:
        limit = self._limit = self._hard.limit_for_tasks()
        self._meter.measure()  # what was made and imported for it is not the task's
        if limit is not None and not self._meter.memory.statm:
            once("statm", logging.WARNING, "memory limits of tasks are left to MainProcess in this child: /proc/self/statm can't be read")
            limit = self._limit = None
        return limit

    def _ease(self, name: str) -> None:
        """Have the task's memory let go as soon as its MemoryError has left it: Celery needs some to report it, or to send it again.

        Celery's tracer, and its wrapper of tasks with autoretry_for, read these attributes at each call.
        """
        self._eased.add(name)
        task = current_app.tasks.get(name)
        if task is None:
            return
        wrapped = "_orig_run" if hasattr(task, "_orig_run") else "run"
        run = getattr(task, wrapped)

        @wraps(run)
        def eased(*args: Any, **kwargs: Any) -> Any:
            try:
                return run(*args, **kwargs)
            except MemoryError as error:
                if self._limit is not None:
                    self._limit.release()  # the first thing, for even a call of ours may find no memory
                    if task.request.id == self._task_id:  # else another task has called this one
                        self.instead_of(name, error)
                raise

        setattr(task, wrapped, eased)


def is_refusal(error: BaseException) -> bool:
    """Whether this error says that there is no memory. Some calls say so by their errno: mmap, fork."""
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
