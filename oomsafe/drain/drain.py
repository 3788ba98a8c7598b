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

from oomsafe.drain.stalled import Owed, Stalled, Wait
from oomsafe.log import log
from oomsafe.worker.current import get_guard
from oomsafe.worker.pressure import IDLE_MOMENT

#: Seconds between two looks at whether a connection is left. The first comes after one: who was accepted just now is counted then.
LOOK_EVERY = 0.05

#: Seconds between two looks at what each connection waits for: there may be thousands.
CHECK_EVERY = 0.25

#: Seconds that a client has for what it has begun: its TLS handshake, the head of a request, its own end of a connection.
#: A packet that is lost comes again within a second at the first try (RFC 6298).
HEAD_MOMENT = 1.0

#: Seconds between two looks in a hurry, at least; a look takes longer where there are thousands of connections.
HURRY_EVERY = 0.01

#: Seconds for which none of a body may come while the app waits for it: two or three losses of the same packet.
BODY_MOMENT = 5.0

#: Seconds that a websocket's other end has to answer its close.
FAREWELL = 1.0

#: RFC 6455's registry: "Service Restart".
SERVICE_RESTART = 1012


class Drain:
    """One server's. `begin` may be called from any thread.

    `listeners()` are the server's asyncio.Servers, `connections()` the protocols of those that are open, `left()` is the number of
    these, and of what else must be done before the end; `wait_of` says what a connection waits for from its client, which
    has a moment for it. `finish(late)` has the server end; `late` says that something is left, for which it must not wait.
    Where its memory keeps the pool from serving, it does not wait for connections that are kept alive and idle, either.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        grace_period: float,
        listeners: Callable[[], Iterable[Any]],
        left: Callable[[], int],
        finish: Callable[[bool], None],
        connections: Callable[[], Iterable[Any]] = tuple,
        wait_of: Callable[[Any], Wait | None] = lambda _: None,
    ) -> None:
        self._loop = loop
        self._grace_period = grace_period
        self._listeners = listeners
        self._left = left
        self._finish = finish
        moments = {Owed.HEAD: HEAD_MOMENT, Owed.NEXT: IDLE_MOMENT, Owed.BODY: BODY_MOMENT, Owed.CLOSE: HEAD_MOMENT}
        self._stalled = Stalled(connections, wait_of, moments)
        self._task: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """From now on this server only finishes what it has."""
        self._loop.call_soon_threadsafe(self._start)

    def _start(self) -> None:
        if self._task is None:
            self._task = self._loop.create_task(self._run(), name="oomsafe drain")

    async def _run(self) -> None:
        deadline = self._loop.time() + self._grace_period
        left = shaking = 0
        try:
            gone = await self._stop_accepting()
            left, shaking = await self._wait(gone, deadline)
            if left:
                log.warning(
                    "worker %d: the grace period of %.0f s is over with %d connections open: they are closed",
                    os.getpid(), self._grace_period, left,
                )  # fmt: skip
                await close_websockets()
        except Exception as error:
            log.error("oomsafe failed in draining (the worker ends all the same): %r", error)
        self._finish(bool(left or shaking))

    async def _wait(self, gone: list[asyncio.Task[None]], deadline: float) -> tuple[int, int]:
        """Until nothing is left, or the deadline: the connections then, and the listeners with something that is not even one."""
        began = check_at = self._loop.time()
        pause = LOOK_EVERY
        while True:
            await asyncio.sleep(pause)
            now = self._loop.time()
            left, shaking = self._left(), sum(not task.done() for task in gone)
            if not (left or (shaking and now - began < HEAD_MOMENT)) or now >= deadline:
                break
            hurry = _holds_up()
            if now >= check_at or hurry:
                check_at = now + CHECK_EVERY
                self._stalled.close_overdue(now, hurry)
            pause = min(LOOK_EVERY, max(HURRY_EVERY, 10 * (self._loop.time() - now))) if hurry else LOOK_EVERY
        for task in gone:
            task.cancel()
        if self._stalled.closed:
            log.info("worker %d closed %d connections that had not sent a whole request", os.getpid(), self._stalled.closed)
        return left, shaking

    async def _stop_accepting(self) -> list[asyncio.Task[None]]:
        """Close the listeners. For each, a task that is done when all that it has accepted is gone.

        A server counts a connection when its TLS handshake is done; asyncio's and uvloop's Server count it from the accept on.
        """
        listeners = list(self._listeners())
        # begun before close(): after it, wait_closed() waits only since Python 3.12
        gone = [self._loop.create_task(listener.wait_closed()) for listener in listeners]
        # what asyncio has accepted and not yet made a connection of, it drops when its listener is closed; uvloop does not
        for listener in listeners:
            for sock in listener.sockets if _is_asyncio(listener) else ():
                self._loop.remove_reader(sock.fileno())
        await asyncio.sleep(0)
        for listener in listeners:
            listener.close()
        return gone


def _holds_up() -> bool:
    guard = get_guard()
    return guard is not None and guard.holds_up()


def _is_asyncio(listener: Any) -> bool:
    """By its name: asyncio may have been imported twice, and its classes differ then."""
    return type(listener).__module__.startswith("asyncio.")


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
