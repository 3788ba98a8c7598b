"""An adapter for a server that oomsafe does not know, after CONTRIBUTING.md: hypercorn with its own options, its asyncio workers guarded.

python guarded.py app:app --workers 2
"""

from __future__ import annotations

import asyncio
import atexit
import os
import sys
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any

import hypercorn.__main__
import hypercorn.asyncio.run as in_worker
import hypercorn.run as in_parent

from oomsafe.asgi import MemoryMiddleware
from oomsafe.log import log_with
from oomsafe.policy.settings import load_policy
from oomsafe.scoreboard.seat import Seat
from oomsafe.supervisor.supervisor import Supervisor
from oomsafe.worker.background import in_thread
from oomsafe.worker.current import set_guard
from oomsafe.worker.guard import Guard


def main() -> int:
    """In the parent: hypercorn's own command, which starts its workers through this context."""
    in_parent.get_context = lambda _: Context()
    return hypercorn.__main__.main()


class Context(SpawnContext):
    """Starts hypercorn's workers, each with a seat. hypercorn joins a worker that has ended, and starts another in its place."""

    supervisor: Supervisor | None = None

    def Process(self, *, kwargs: dict[str, Any], **_: Any) -> SpawnProcess:
        config = kwargs["config"]
        if self.supervisor is None:
            log_with(config.log.error_logger)
            config._log = None  # it can't be pickled
            self.supervisor = Supervisor(load_policy(os.environ, {})[0], "hypercorn", config.workers)
            atexit.register(self.supervisor.close)
        return Process(self.supervisor, kwargs)


class Process(SpawnProcess):
    """One worker, as its parent handles it."""

    def __init__(self, supervisor: Supervisor, kwargs: dict[str, Any]) -> None:
        self.supervised = supervisor, (seat := supervisor.seat(supervisor.reserve()))
        super().__init__(target=work, kwargs={**kwargs, "seat": seat})

    def start(self) -> None:
        """Start the worker, and register its pid with its seat."""
        (supervisor, seat), self.supervised = self.supervised, None  # type: ignore[assignment]  # must not be pickled for the worker
        super().start()
        self.supervised = supervisor, seat
        supervisor.born_seat(seat.number, seat.generation, self.pid)

    def join(self, timeout: float | None = None) -> None:
        """Wait for the worker's end, and free its seat."""
        super().join(timeout)
        supervisor, seat = self.supervised
        supervisor.release_seat(seat.number, seat.generation)


def work(seat: Seat, config: Any, **how: Any) -> None:
    """In a worker: run hypercorn's own worker, with its app in the middleware, a way to recycle it, and a tick."""
    log_with(config.log.error_logger)
    board, slot = seat.take()
    load, context = in_worker.load_application, in_worker.WorkerContext
    serving: list[Serving] = []

    class Serving(context):  # created in the worker's loop, before it listens
        def __init__(self, max_requests: int | None) -> None:
            super().__init__(max_requests)
            self.loop = asyncio.get_running_loop()
            serving.append(self)
            guard.ready()
            self.tick()

        def tick(self) -> None:
            guard.tick()
            self.loop.call_later(guard.pause, self.tick)

    def recycle() -> None:  # does what hypercorn does when max_requests is reached
        serving[0].loop.call_soon_threadsafe(serving[0].terminate._event.set)

    def load_guarded(*arguments: Any) -> Any:
        wrapper = load(*arguments)
        wrapper.app = MemoryMiddleware(wrapper.app)
        return wrapper

    guard = Guard.of_seat(seat, board, slot, unit="requests", recycle=recycle, background=in_thread)
    set_guard(guard)
    in_worker.load_application, in_worker.WorkerContext = load_guarded, Serving
    in_worker.asyncio_worker(config, **how)
    guard.retire()


if __name__ == "__main__":
    sys.exit(main())
