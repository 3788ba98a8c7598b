"""End an asyncio server without losing a request.

Stop accepting; send `Connection: close` with every response (the middleware does that); end when no
connection is left, or at the deadline. By themselves, servers close connections that are kept alive
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

#: Seconds between two checks whether a connection is left. The first check waits as long, so that a connection accepted just now counts.
POLL_EVERY = 0.05

#: Seconds between two checks of what each connection waits for, because there may be thousands.
CHECK_EVERY = 0.25

#: Seconds that a client has to finish its TLS handshake, the head of a request, or its own side of closing a connection.
#: A lost packet is first sent again within a second (RFC 6298).
HEAD_MOMENT = 1.0

#: The least seconds between two checks in a hurry; a check takes longer than that with thousands of connections.
HURRY_EVERY = 0.01

#: Seconds for which no part of a body may arrive while the app waits for it: two or three losses of the same packet.
BODY_MOMENT = 5.0

#: Seconds that the other end of a websocket has to answer its close.
WEBSOCKET_MOMENT = 1.0

#: RFC 6455's registry: "Service Restart".
SERVICE_RESTART = 1012


class Drain:
    """The drain of one server. `begin` may be called from any thread.

    `listeners()` returns the server's asyncio.Servers, `connections()` the protocols of its open connections, `left()` the number of
    these and of anything else that must be done before the end. `wait_of` says what a connection waits for from its client, which
    gets a moment for it. `finish(late)` ends the server; `late` means that something is left, and that the server must not wait for it.
    If its memory keeps the pool from serving, it does not wait for idle kept-alive connections either.
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
        """From now on the server takes no new work and finishes what it has."""
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
            log.error("oomsafe failed in draining (the worker still ends): %r", error)
        self._finish(bool(left or shaking))

    async def _wait(self, gone: list[asyncio.Task[None]], deadline: float) -> tuple[int, int]:
        """Wait until nothing is left, or until the deadline.

        Returns how many connections are left then, and how many listeners still have a handshake under way.
        """
        began = check_at = self._loop.time()
        pause = POLL_EVERY
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
            pause = min(POLL_EVERY, max(HURRY_EVERY, 10 * (self._loop.time() - now))) if hurry else POLL_EVERY
        for task in gone:
            task.cancel()
        if self._stalled.closed:
            log.info("worker %d closed %d connections that had not sent a whole request", os.getpid(), self._stalled.closed)
        return left, shaking

    async def _stop_accepting(self) -> list[asyncio.Task[None]]:
        """Close the listeners. Returns a task for each, which is done when all connections that it accepted are gone.

        A server counts a connection once its TLS handshake is done; asyncio's and uvloop's Server count it from the accept on.
        """
        listeners = list(self._listeners())
        # started before close(), because after close() wait_closed() only waits since Python 3.12
        gone = [self._loop.create_task(listener.wait_closed()) for listener in listeners]
        # closing a listener makes asyncio drop what was accepted but is not a connection yet; uvloop does not
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
    """Checked by name, because asyncio may have been imported twice, and then its classes differ."""
    return type(listener).__module__.startswith("asyncio.")


_websockets: set[Callable[[Any], Awaitable[None]]] = set()


def open_websocket(send: Callable[[Any], Awaitable[None]]) -> None:
    """Register a websocket, to be closed at the deadline."""
    _websockets.add(send)


def closed_websocket(send: Callable[[Any], Awaitable[None]]) -> None:
    """Forget a websocket that is gone."""
    _websockets.discard(send)


async def close_websockets() -> None:
    """Close all websockets with 1012, which tells their clients to connect again: another worker serves."""
    if not _websockets:
        return
    closing = [asyncio.ensure_future(_close(send)) for send in list(_websockets)]
    await asyncio.wait(closing, timeout=WEBSOCKET_MOMENT)


async def _close(send: Callable[[Any], Awaitable[None]]) -> None:
    try:
        await send({"type": "websocket.close", "code": SERVICE_RESTART, "reason": "service restart"})
    except Exception as error:
        log.log(logging.DEBUG, "a websocket could not be closed: %r", error)


class Heart:
    """Sends the worker's heartbeat from a thread, while a server that shuts down no longer does: it would be killed for a hang."""

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
        # bounded, so that a worker that hangs forever is killed in the end
        for _ in range(self._beats):
            try:
                self._beat()
            except (OSError, ValueError):
                return  # the file is closed: the worker has ended
            if self._stop.wait(1):
                return
