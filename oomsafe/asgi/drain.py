"""The end of an asyncio server that loses no request.

Stop accepting; say `Connection: close` on every response (the middleware does); end when no
connection is left, or at the deadline. Servers by themselves close connections that are kept alive
or have just been accepted, with requests on their way.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from oomsafe.pool.log import log

#: Seconds between two looks at whether a connection is left. The first comes after one: who was accepted just now is counted then.
LOOK_EVERY = 0.05

#: Seconds that a websocket's other end has to answer its close.
FAREWELL = 1.0

#: RFC 6455's registry: "Service Restart".
SERVICE_RESTART = 1012


class Drain:
    """One server's. `begin` may be called from any thread.

    `listeners()` are the server's asyncio.Servers, `connections()` the number of those that are open;
    `finish(late)` has the server end; `late` says that something was left at the deadline.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        grace_period: float,
        listeners: Callable[[], Iterable[Any]],
        connections: Callable[[], int],
        finish: Callable[[bool], None],
    ) -> None:
        self._loop = loop
        self._grace_period = grace_period
        self._listeners = listeners
        self._connections = connections
        self._finish = finish
        self._task: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """From now on this server only finishes what it has."""
        self._loop.call_soon_threadsafe(self._start)

    def _start(self) -> None:
        if self._task is None:
            self._task = self._loop.create_task(self._run(), name="oomsafe drain")

    async def _run(self) -> None:
        deadline = self._loop.time() + self._grace_period
        left = 0
        try:
            await self._stop_accepting()
            while True:
                await asyncio.sleep(LOOK_EVERY)
                left = self._connections()
                if not left or self._loop.time() >= deadline:
                    break
            if left:
                log.warning(
                    "worker %d: the grace period of %.0f s is over with %d connections open: they are closed",
                    os.getpid(), self._grace_period, left,
                )  # fmt: skip
                await close_websockets()
        except Exception as error:
            log.error("oomsafe failed in draining (the worker ends all the same): %r", error)
        self._finish(bool(left))

    async def _stop_accepting(self) -> None:
        listeners = list(self._listeners())
        # what asyncio has accepted and not yet made a connection of, it drops when its listener is closed; uvloop does not
        for listener in listeners:
            for sock in listener.sockets if isinstance(listener, asyncio.Server) else ():
                self._loop.remove_reader(sock.fileno())
        await asyncio.sleep(0)
        for listener in listeners:
            listener.close()


_websockets: set[Callable[[Any], Awaitable[None]]] = set()


def open_websocket(send: Callable[[Any], Awaitable[None]]) -> None:
    """The middleware has one more: at the deadline it is closed."""
    _websockets.add(send)


def closed_websocket(send: Callable[[Any], Awaitable[None]]) -> None:
    """It is gone."""
    _websockets.discard(send)


async def close_websockets() -> None:
    """Tell whoever is at the other end to come again: another worker serves."""
    if not _websockets:
        return
    closing = [asyncio.ensure_future(_close(send)) for send in list(_websockets)]
    await asyncio.wait(closing, timeout=FAREWELL)


async def _close(send: Callable[[Any], Awaitable[None]]) -> None:
    try:
        await send({"type": "websocket.close", "code": SERVICE_RESTART, "reason": "service restart"})
    except Exception as error:
        log.log(logging.DEBUG, "a websocket could not be closed: %r", error)


class Heart:
    """Beats beside a loop that does not any more: a server that shuts down no longer says that it lives, and is killed for it."""

    def __init__(self, beat: Callable[[], None], seconds: float) -> None:
        self._beat = beat
        self._beats = int(seconds)
        self._stop = threading.Event()

    def __enter__(self) -> Heart:
        threading.Thread(target=self._run, name="oomsafe heart", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()

    def _run(self) -> None:
        # bounded: what hangs for ever is to be killed in the end
        for _ in range(self._beats):
            try:
                self._beat()
            except (OSError, ValueError):
                return  # the file is closed: the worker has ended
            if self._stop.wait(1):
                return
