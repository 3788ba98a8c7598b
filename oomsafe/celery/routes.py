"""Which function a task runs: asked only when a worker was probed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from celery import current_app


class Routes:
    """The functions of the app's tasks."""

    def called(self) -> Iterator[tuple[Any, str]]:
        """(function, name of the task)."""
        yield from ((task.run, name) for name, task in list(current_app.tasks.items()))
