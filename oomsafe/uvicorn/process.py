"""One of uvicorn's worker processes: what its supervisor hands over to it must pickle, for it is spawned."""

from __future__ import annotations

from socket import socket

from uvicorn.config import Config
from uvicorn.server import Server
from uvicorn.supervisors.multiprocess import Process

from oomsafe.pool.meter import log
from oomsafe.pool.seat import Seat
from oomsafe.uvicorn.server import GuardedServer


class GuardedProcess(Process):
    """A worker with its seat in the pool."""

    def __init__(self, config: Config, sockets: list[socket], seat: Seat) -> None:
        self.seat = seat
        super().__init__(config, sockets)

    def target(self, sockets: list[socket] | None = None) -> None:
        """In the worker."""
        server = self.server
        assert isinstance(server, GuardedServer)
        server.take_seat()
        super().target(sockets)

    @property
    def server(self) -> Server:
        """In the worker: made once."""
        if self._server is None:
            self._server = GuardedServer(self.config, policy=self.seat.policy, seat=self.seat)
        return self._server

    def kill(self) -> None:
        """In the supervisor, by uvicorn's health check too, for a worker that does not answer: nobody should take it for an OOM kill."""
        if self.process.is_alive():
            log.error("worker %s (slot %d) is killed by uvicorn itself: it has not answered in time", self.pid, self.seat.number)
        super().kill()
