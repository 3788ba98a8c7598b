"""Real tasks from this process: the result of each good task is checked, and each ballooning or poison task must fail as expected."""

from __future__ import annotations

import os
import re
import threading
import time
from typing import Any

from celery import Celery

from oomsafe.demo.celery_app import settings

#: One task in this many balloons.
BALLOONS = 20

#: The number of tasks in a round, and those of them that are poison: early ones, so that children live long enough to reach their limit.
ROUND, POISONS = 600, (10,)

#: Seconds after which a file that a worker has put into its folder is complete.
WHOLE_AFTER = 0.2

#: Seconds without any result after which stop() gives up.
PATIENCE = 15.0


class TaskLoad:
    """Sends `rate` tasks a second to the worker of `folder` until stop(), which waits for the pending results."""

    def __init__(self, folder: str, poison: bool, rate: float = 60) -> None:
        """`poison`: also send poison tasks; only to a worker in a memory cgroup of its own."""
        self.requests = 0
        """How many good tasks were sent."""
        self.failed = 0
        """How many tasks did not end as expected: see `failures`."""
        self.failures: dict[str, int] = {}
        """The number of failures of each kind."""
        self.ballooned = 0
        """How many tasks ran out of memory, and failed."""
        self.poison: int | None = 0 if poison else None
        """How many poison tasks were sent; None: none may be sent."""
        self.given_up: list[int] = []
        """For each poison task that was given up, how many times the kernel had killed it."""
        self._client = Celery("demo-client", set_as_current=False)
        self._client.conf.update(settings(folder, out="sending", control="client"))
        self._sending, self._again, self._queue = (os.path.join(folder, name) for name in ("sending", "again", "queue"))
        self._pause = 1 / rate
        self._expected: dict[str, tuple[str, int]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._send, daemon=True)

    def start(self) -> None:
        """Start sending."""
        self._thread.start()

    def stop(self) -> None:
        """Stop sending, wait for the results, and count the missing ones as failed."""
        self._stop.set()
        self._thread.join()
        deadline = time.monotonic() + PATIENCE
        while self._expected and time.monotonic() < deadline:
            before = len(self._expected)
            self._forward()
            self._collect()
            if len(self._expected) < before:
                deadline = time.monotonic() + PATIENCE
            time.sleep(0.05)
        for name, _ in self._expected.values():
            self._failed(f"{name}: never ended")

    def _send(self) -> None:
        number = 0
        while not self._stop.wait(self._pause):
            number += 1
            name = self._kind(number)
            self.requests += name == "good"
            if name == "poison":
                self.poison = (self.poison or 0) + 1
            self._expected[self._client.send_task(name, [number] if name == "good" else []).id] = (name, number)
            self._forward()

    def _kind(self, number: int) -> str:
        if self.poison is not None and number % ROUND in POISONS:
            return "poison"
        return "good" if number % BALLOONS else "balloon"

    def _forward(self) -> None:
        """Move only complete messages to the queue: a worker that reads a message which is still being written exits (kombu 5.7)."""
        for folder, age in ((self._sending, 0.0), (self._again, WHOLE_AFTER)):
            for name in os.listdir(folder):
                path = os.path.join(folder, name)
                if not age or time.time() - os.stat(path).st_mtime > age:
                    os.rename(path, os.path.join(self._queue, name))

    def _collect(self) -> None:
        for task_id, (name, number) in list(self._expected.items()):
            meta: dict[str, Any] = self._client.backend.get_task_meta(task_id)
            if meta["status"] not in ("SUCCESS", "FAILURE"):
                continue
            del self._expected[task_id]
            problem = self._problem(name, number, meta["status"] == "SUCCESS", meta["result"])
            if problem:
                self._failed(f"{name}: {problem}")

    def _problem(self, name: str, number: int, succeeded: bool, result: Any) -> str | None:
        """What is wrong with how a task ended; None: nothing."""
        if name == "good":
            return None if succeeded and result == number * number else "a wrong result" if succeeded else "failed"
        if succeeded:
            return "did not fail"
        if name == "balloon":
            self.ballooned += 1
            return None
        deaths = re.search(r"killed for memory (\d+) times", str(result))
        if deaths is None:
            return "failed, and not for its deaths"
        self.given_up.append(int(deaths[1]))
        return None

    def _failed(self, how: str) -> None:
        self.failed += 1
        self.failures[how] = self.failures.get(how, 0) + 1
