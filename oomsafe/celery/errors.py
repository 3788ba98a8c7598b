"""Celery's own kinds of errors: this file is only imported where Celery is."""

from __future__ import annotations

from billiard.einfo import ExceptionInfo
from billiard.exceptions import WorkerLostError


class WorkerOutOfMemory(WorkerLostError):  # type: ignore[misc]
    """The kernel's OOM killer took the child that ran the task. Made of one line of plain text, which any result backend can keep."""


def info_of(error: Exception) -> ExceptionInfo:
    """What billiard hands on as a failed task's result: it needs a traceback, so the error is raised once."""
    try:
        raise error
    except Exception:
        return ExceptionInfo()
