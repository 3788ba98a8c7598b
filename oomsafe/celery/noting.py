"""In MainProcess: the thread that writes what is noted of tasks, so that none of them waits for it, and renews this node's lease."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

from oomsafe.celery import poison
from oomsafe.log import attempt


class Noting:
    """One thread, there from the first note on; it sleeps while there is nothing to write and no lease to renew."""

    def __init__(self, renew: Callable[[], object], wanted: Callable[[], bool]) -> None:
        """`renew` is called in the thread every RENEW seconds while `wanted`, and when told to."""
        self._renew = renew
        self._wanted = wanted
        self._renewed = -poison.RENEW
        self._todo: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._ended = False

    def submit(self, note: Callable[[], object]) -> None:
        """Write it soon, after what has been submitted before, and with a lease that is good. From any thread."""
        if self._ended:
            return
        self._todo.put(note)
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="oomsafe-notes", daemon=True)
            thread.start()  # where no thread can be had now, the next note tries again
            self._thread = thread

    def renew(self) -> None:
        """The lease says something new. From any thread."""
        self.submit(self._now)

    def keep(self) -> None:
        """The lease is wanted from now on. Nothing but a look at the clock where it is kept already."""
        if self._is_due():
            self._renewed = time.monotonic()
            self.renew()

    def _is_due(self) -> bool:
        return time.monotonic() >= self._renewed + poison.RENEW

    def close(self) -> None:
        """Write nothing more; what is being written may yet be."""
        self._ended = True
        self._todo.put(None)

    def _run(self) -> None:
        while not self._ended:
            pause = self._renewed + poison.RENEW - time.monotonic()
            # a lease that is due and not wanted is renewed with the next note, or by keep()
            idle = pause <= 0 and not self._wanted()
            try:
                note = self._todo.get(timeout=None if idle else max(0.0, pause))
            except queue.Empty:
                if not self._wanted():
                    continue
                note = self._now
            if note is None:
                return
            if note != self._now and self._is_due():
                attempt("renewing a lease", "Celery", self._now)
            attempt("noting a task", "Celery", note)

    def _now(self) -> None:
        self._renewed = time.monotonic()
        self._renew()
