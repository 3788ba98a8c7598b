"""Real tasks from this process: each good one's result is checked, each ballooning one must fail by itself."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

from celery import Celery

from oomsafe.cli.demo_celery import settings

#: One task in so many balloons.
BALLOONS = 20

#: Seconds without any result after which no more are waited for.
PATIENCE = 15.0


class TaskLoad:
    """Sends `rate` tasks a second to the worker of `folder` until stop(), which waits for what is under way."""

    def __init__(self, folder: str, rate: float = 60) -> None:
        self.requests = 0
        """Good tasks that were sent."""
        self.failed = 0
        """Good ones without their result, and ballooning ones that did not end as failures of their own."""
        self.failures: dict[str, int] = {}
        """By what went wrong."""
        self.ballooned = 0
        """Tasks that ran out of memory, and failed."""
        self._client = Celery("demo-client", set_as_current=False)
        self._client.conf.update(settings(folder, out="sending", control="client"))
        self._sending, self._queue = (os.path.join(folder, name) for name in ("sending", "queue"))
        self._pause = 1 / rate
        self._expected: dict[str, int | None] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._send, daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """Send no more, wait for the results, and count what is missing."""
        self._stop.set()
        self._thread.join()
        deadline = time.monotonic() + PATIENCE
        while self._expected and time.monotonic() < deadline:
            before = len(self._expected)
            self._collect()
            if len(self._expected) < before:
                deadline = time.monotonic() + PATIENCE
            time.sleep(0.05)
        for _ in self._expected:
            self._failed("never ended")

    def _send(self) -> None:
        number = 0
        while not self._stop.wait(self._pause):
            number += 1
            if number % BALLOONS:
                self.requests += 1
                self._expected[self._client.send_task("good", [number]).id] = number * number
            else:
                self._expected[self._client.send_task("balloon").id] = None
            # whole or not at all: a worker that reads a message which is still being written ends (kombu 5.7)
            for name in os.listdir(self._sending):
                os.rename(os.path.join(self._sending, name), os.path.join(self._queue, name))

    def _collect(self) -> None:
        for task_id, expected in list(self._expected.items()):
            meta: dict[str, Any] = self._client.backend.get_task_meta(task_id)
            if meta["status"] not in ("SUCCESS", "FAILURE"):
                continue
            del self._expected[task_id]
            if expected is None:
                self.ballooned += meta["status"] == "FAILURE"
            if (meta["status"], meta["result"]) != ("SUCCESS", expected) and (expected is not None or meta["status"] == "SUCCESS"):
                self._failed("with a wrong result" if meta["status"] == "SUCCESS" else "of a good task")

    def _failed(self, how: str) -> None:
        self.failed += 1
        self.failures[how] = self.failures.get(how, 0) + 1
