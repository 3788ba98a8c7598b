"""One of uvicorn's worker processes. It is spawned, so everything that its supervisor passes to it must pickle."""

from __future__ import annotations

import math
import pickle
import time
from collections.abc import Callable
from socket import socket
from typing import Any, ClassVar

from uvicorn.config import Config
from uvicorn.server import Server
from uvicorn.supervisors.multiprocess import Process

from oomsafe.policy.ends import By
from oomsafe.scoreboard.seat import Seat
from oomsafe.uvicorn.server import GuardedServer

#: The most seconds between the moment when a worker's end of the pipe closes and its death.
DYING = 0.5

#: Seconds between two ticks; uvicorn's own loop turns every half second.
TICK_EVERY = 0.1


class GuardedProcess(Process):
    """A worker with a seat in the pool. `arguments` are those that uvicorn passes to its own Process."""

    tick: ClassVar[Callable[[], None]] = staticmethod(lambda: None)
    """In the supervisor, which sets it: what goes on while uvicorn waits for a worker's answer."""
    watch: ClassVar[Callable[[], float]] = staticmethod(lambda: math.inf)
    """Likewise: what goes on between two ticks; returns the seconds until it is due again."""
    enrol: ClassVar[Callable[[GuardedProcess], Seat]]
    """In the supervisor, which sets it: registers a process, and returns its seat."""

    def __init__(self, config: Config, *arguments: Any, **keywords: Any) -> None:
        self.known_dead = False
        """In the supervisor: whether its death, and the reason, have been noted."""
        self.ended_by: By | None = None
        """In the supervisor: why uvicorn has ended it; None: it has not."""
        self.was_killed = False
        """In the supervisor: whether uvicorn has sent it SIGKILL."""
        super().__init__(config, *arguments, **keywords)
        self.config = config
        self._guarded: GuardedServer | None = None
        self.seat = type(self).enrol(self)  # last, so that a process that could not be created is not registered

    def start(self) -> None:
        """In the supervisor. It closes its copy of the worker's end of the pipe, or it would wait in vain for a worker that dies."""
        super().start()
        self.child_conn.close()

    def target(self, sockets: list[socket] | None = None) -> None:
        """In the worker: take the seat, and run the server."""
        server = self.server
        assert isinstance(server, GuardedServer)
        server.take_seat()
        self.real_target = server.run  # older uvicorns run this attribute
        super().target(sockets)

    @property
    def server(self) -> Server:
        """In the worker: its server, created once."""
        if self._guarded is None:
            self._guarded = GuardedServer(self.config, seat=self.seat)
        return self._guarded

    def is_alive(self, timeout: float = 5) -> bool:
        """In the supervisor, for uvicorn's health check: False only once the reason of its death was noted, or at the second check.

        If a worker died at boot, uvicorn would end the whole service.
        """
        if self.process.is_alive():
            if self.ping(timeout):
                return True
            self.process.join(DYING)
        known, self.known_dead = self.known_dead, self.process.exitcode is not None
        return self.known_dead and not known

    def ping(self, timeout: float = 5) -> bool:
        """In the supervisor: whether the worker answers, as uvicorn asks it.

        uvicorn's loop waits here for as long as a worker imports its main module, which some apps take a minute for. The pool is not to be
        unwatched for so long.
        """
        deadline = time.monotonic() + timeout
        try:
            self.parent_conn.send(b"ping")
            tick_at = time.monotonic() + TICK_EVERY
            while not self.parent_conn.poll(max(0.0, min(type(self).watch(), min(tick_at, deadline) - time.monotonic()))):
                now = time.monotonic()
                if now >= deadline:
                    return False
                if now >= tick_at:
                    tick_at = now + TICK_EVERY
                    type(self).tick()
            self.parent_conn.recv()
        except (OSError, EOFError, pickle.UnpicklingError):
            return False
        return True

    def terminate(self) -> None:
        """In the supervisor: uvicorn ends the worker, for a reload or at the end."""
        self.ended_by = self.ended_by or By.ORDER
        super().terminate()

    def kill(self) -> None:
        """In the supervisor, also for uvicorn's health check of a worker that does not answer: note that this is not an OOM kill."""
        if self.process.is_alive():
            self.ended_by = self.ended_by or By.TIMEOUT
            self.was_killed = True
        super().kill()
