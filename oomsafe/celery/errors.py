"""How a task's failure is passed to billiard and Celery, wherever the task runs. Imported only if Celery is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from billiard.einfo import ExceptionInfo
from billiard.exceptions import WorkerLostError

from oomsafe.errors import SoftMemoryLimitExceeded, TaskMemoryError
from oomsafe.policy.text import printable

if TYPE_CHECKING:
    from oomsafe.scoreboard.slot import Slot


class WorkerOutOfMemory(WorkerLostError):  # type: ignore[misc]
    """The kernel's OOM killer killed the child that ran the task. Its text is one plain line, which any result backend can keep."""


def info_of(error: Exception) -> ExceptionInfo:
    """The result that billiard expects of a failed task. It needs a traceback, so the error is raised once."""
    try:
        raise error
    except Exception:
        return ExceptionInfo()


def memory_error_in(result: Any) -> BaseException | None:
    """The MemoryError that Celery's tracer has turned into a failure and stored; None: there is none.

    `result` is what the tracer returns: (failed, what the task returned or an ExceptionInfo, seconds).
    """
    if not isinstance(result, tuple) or not result[0]:
        return None
    error = getattr(result[1], "exception", None)
    error = getattr(error, "exc", error)  # billiard may have wrapped it to keep its traceback
    return error if isinstance(error, MemoryError) else None


def in_words(name: str, error: BaseException) -> TaskMemoryError:
    """The error that leaves the task instead of its MemoryError, which would end the whole node if Celery raised it again (celery#5655).

    It is plain text without a chain of causes, because nothing that can't be pickled may be passed to another process.
    """
    said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return TaskMemoryError(f"task {name} ran out of memory: {said}")


def heed(slot: Slot | None, ticket: int, name: str) -> None:
    """In the handler of TELL: raise SoftMemoryLimitExceeded if the task with this ticket (0: no task) is the one that is over its limit."""
    limit = slot.heed_limit(ticket) if slot is not None else None
    if limit is not None:
        raise SoftMemoryLimitExceeded(printable(name), *limit)
