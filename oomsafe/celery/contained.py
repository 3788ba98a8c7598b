"""A task's MemoryError stays that task's failure. Raised again by Celery, it would end the whole node (celery#5655)."""

from __future__ import annotations

from typing import Any

from oomsafe.errors import TaskMemoryError


def memory_error_in(result: Any) -> BaseException | None:
    """The MemoryError that a tracer has made a failure of, and stored; None: it has not.

    What it returns is (failed, what the task returned or an ExceptionInfo, seconds).
    """
    if not isinstance(result, tuple) or not result[0]:
        return None
    error = getattr(result[1], "exception", None)
    error = getattr(error, "exc", error)  # billiard may have it wrapped, to keep its traceback
    return error if isinstance(error, MemoryError) else None


def in_words(name: str, error: BaseException) -> TaskMemoryError:
    """What may leave the task in its place: plain text, and no chain, for what can't be pickled must not cross either."""
    said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return TaskMemoryError(f"task {name} ran out of memory: {said}")
