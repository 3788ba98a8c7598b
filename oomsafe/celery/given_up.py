"""A task that is given up: failed with its reason, and its message rejected for good, so that a dead-letter exchange gets it."""

from __future__ import annotations

from functools import partial
from typing import Any

from celery import signals
from celery.worker.state import task_ready

from oomsafe.celery.errors import info_of
from oomsafe.log import attempt, log


def give_up(request: Any, error: Exception) -> None:
    """What Celery's own Request.on_failure does, but for a lost worker that would ask the broker for another run.

    Each step by itself: a result backend that is down must not keep the message.
    """
    log.error("%s", error)
    info = info_of(error)
    for what, step in (
        ("the failure of a task", partial(_record, request, error)),
        ("the rejection of a message", partial(request.reject, requeue=False)),
        ("the end of a task", partial(task_ready, request)),
        ("task_failure", partial(_signal, request, error, info)),
        ("the event of a task", partial(request.send_event, "task-failed", exception=repr(error), traceback=info.traceback)),
    ):
        attempt(what, "Celery", step)


def _record(request: Any, error: Exception) -> None:
    request.task.backend.mark_as_failure(request.id, error, request=request._context, store_result=request.store_errors)


def _signal(request: Any, error: Exception, info: Any) -> None:
    signals.task_failure.send(
        sender=request.task, task_id=request.id, exception=error, args=request.args, kwargs=request.kwargs,
        traceback=info.traceback, einfo=info,
    )  # fmt: skip
