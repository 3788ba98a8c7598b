"""One of uvicorn's worker processes: what its supervisor hands over to it must pickle, for it is spawned."""

from __future__ import annotations

from collections.abc import Callable
from socket import socket
from typing import Any, ClassVar

from uvicorn.config import Config
from uvicorn.server import Server
from uvicorn.supervisors.multiprocess import Process

from oomsafe.log import log
from oomsafe.scoreboard.seat import Seat
from oomsafe.uvicorn.server import GuardedServer

#: Seconds that one whose end of the pipe is closed may take to be dead.
DYING = 0.5


class GuardedProcess(Process):
    """A worker with its seat in the pool. `arguments` are those that uvicorn gives to a Process of its own."""

    enrol: ClassVar[Callable[[GuardedProcess], Seat]]
    """In the supervisor, which sets it: takes note of a process, and gives it its seat."""

    def __init__(self, config: Config, *arguments: Any, **keywords: Any) -> None:
        self.known_dead = False
        """In the supervisor: that it has ended has been seen, and why."""
        super().__init__(config, *arguments, **keywords)
        self.config = config
        self._guarded: GuardedServer | None = None
        self.seat = type(self).enrol(self)  # last: nobody hears of one that could not be made

    def start(self) -> None:
        """In the supervisor. While that has the worker's end of the pipe too, it waits in vain for one that dies meanwhile."""
        super().start()
        self.child_conn.close()

    def target(self, sockets: list[socket] | None = None) -> None:
        """In the worker."""
        server = self.server
        assert isinstance(server, GuardedServer)
        server.take_seat()
        self.real_target = server.run  # what older uvicorns run
        super().target(sockets)

    @property
    def server(self) -> Server:
        """In the worker: made once."""
        if self._guarded is None:
            self._guarded = GuardedServer(self.config, seat=self.seat)
        return self._guarded

    def is_alive(self, timeout: float = 5) -> bool:
        """In the supervisor, for uvicorn's health check: dead only once it has been seen why, or at the second look.

        By one that died at boot, uvicorn would end the whole service.
        """
        if self.process.is_alive():
            if self.ping(timeout):
                return True
            self.process.join(DYING)
        known, self.known_dead = self.known_dead, self.process.exitcode is not None
        return self.known_dead and not known

    def ping(self, timeout: float = 5) -> bool:
        """In the supervisor."""
        try:
            return super().ping(timeout)
        except (OSError, EOFError):
            return False

    def kill(self) -> None:
        """In the supervisor, by uvicorn's health check too, for a worker that does not answer: nobody should take it for an OOM kill."""
        if self.process.is_alive():
            log.error("worker %s (slot %d) is killed by uvicorn itself: it has not answered in time", self.pid, self.seat.number)
        super().kill()
