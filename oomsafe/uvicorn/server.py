"""uvicorn's Server in a worker: it measures its app, and drains at its end. It translates, and decides nothing."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from typing import Any, ClassVar

from uvicorn.config import Config
from uvicorn.server import Server

from oomsafe.asgi.middleware import MemoryMiddleware
from oomsafe.drain.uvicorn import UvicornDrain, log_with_uvicorn, recycles_alone
from oomsafe.log import attempt, log
from oomsafe.policy.settings import Policy, came_too_late, set_in
from oomsafe.scoreboard.own_board import OwnBoard
from oomsafe.scoreboard.seat import Seat
from oomsafe.uvicorn.reading import GIVE_IT, name_of, read_policy
from oomsafe.worker.background import in_thread
from oomsafe.worker.current import STAYS, Way, get_guard, set_guard, warn_of_metrics
from oomsafe.worker.guard import Guard


class GuardedServer(Server):
    """The Server of a worker with the seat from its supervisor, or of a single process without a seat.

    It replaces uvicorn's Server under that name, also for code that subclasses or patches it.
    """

    keywords: ClassVar[Mapping[str, Any]] = {}
    """The keywords of the policy, for Servers without a seat."""
    first: ClassVar[Guard | None] = None
    """This process's guard, if one of these Servers has made it."""

    def __init__(self, config: Config, *, seat: Seat | None = None) -> None:
        super().__init__(config)
        self._policy = Policy() if seat is None else seat.policy
        self._warnings: list[str] = []
        if seat is None and get_guard() is None:
            self._policy, self._warnings = read_policy(self.keywords)
        self._variables = set_in(os.environ)
        self._seat = seat
        self._taken: Any = None
        self._guard: Guard | None = None
        self._drain: UvicornDrain | None = None

    def take_seat(self) -> None:
        """As early as possible in a worker: from now on it is on the scoreboard, and the kernel kills it before its supervisor."""
        if self._seat is not None:
            self._taken = attempt("seat", "uvicorn", self._seat.take)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """The app is loaded; afterwards it serves."""
        if get_guard() is None:
            log_with_uvicorn()
            self._warn()
            attempt("app", "uvicorn", self._wrap_app)
        elif get_guard() is GuardedServer.first:
            # a second Server of the same process, for example for metrics: its requests count, and it ends with the process
            self.config.loaded_app = MemoryMiddleware(self.config.loaded_app, guard=get_guard())
        # else gunicorn's adapter guards the worker in which this Server runs, its app and its end
        await super().startup(sockets)
        if self.started and self._drain is not None:
            self._drain.serves(self)
            attempt("ready", "uvicorn", self._ready)

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second."""
        if self._guard is not None:
            attempt("ready", "uvicorn", self._guard.ready)  # again, in case it failed when the app was loaded
            self._guard.tick()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Its last moments."""
        await super().shutdown(sockets)
        if self._guard is not None:
            self._guard.retire()

    def _warn(self) -> None:
        for warning in self._warnings:
            log.warning("%s", warning)
        if self._seat is None:
            warn_of_metrics(self._policy)
        late = came_too_late(self._variables, os.environ, GIVE_IT)
        if late and (self._seat is None or self._seat.generation == 1):  # the first worker logs for all
            log.warning("%s", late)

    def _wrap_app(self) -> None:
        self._drain = UvicornDrain(self._policy.grace_period)
        if self._seat is not None and self._taken is not None:
            board, slot = self._taken
            self._guard = Guard.of_seat(self._seat, board, slot, unit="requests", recycle=self._drain.begin, background=in_thread)
        else:
            recycle = self._drain.begin if recycles_alone(self.config) else None
            own_board = OwnBoard.create(self._policy.name or name_of(self.config)) if self._seat is None else None
            self._guard = guard = Guard(self._policy, recycle=recycle, background=in_thread, unit="requests", own_board=own_board)
            said = STAYS if recycle is None else Way(recycle).said
            attempt("the line at boot", "uvicorn", lambda: guard.say_limits(said))
        self._guard.at_the_door = True
        GuardedServer.first = self._guard
        set_guard(self._guard)
        self.config.loaded_app = MemoryMiddleware(self.config.loaded_app, guard=self._guard)

    def _ready(self) -> None:
        if self._guard is not None:
            self._guard.ready()
