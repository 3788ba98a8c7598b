"""ASGI middleware: a request is in flight until the app returns, which is after its background tasks.

Pure ASGI. `receive` is never wrapped: a server may pass an object of its own, and a wrapped stream
would cost something at every part.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import sys
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from oomsafe.asgi.routes import RouteNames
from oomsafe.drain.drain import closed_websocket, open_websocket
from oomsafe.drain.uvicorn import own_name, own_recycle, running_loop, serves_here
from oomsafe.http.carrier import KEY, carried
from oomsafe.http.headers import TOKEN_ASGI, announces, headers_of
from oomsafe.log import attempt
from oomsafe.policy.settings import load_policy
from oomsafe.scoreboard.layout import UNMATCHED
from oomsafe.worker.current import get_guard, guard_for, knows_routes, own_guard
from oomsafe.worker.door import Waiting
from oomsafe.worker.guard import Guard
from oomsafe.worker.meter import Meter, Work

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

#: The first and the longest pause, in seconds, between checks from the start of the lifespan on whether the server listens.
FIRST_TRY, LAST_TRY = 0.5, 64.0

#: Makes the client send its next request on another connection, which another worker accepts.
CLOSE = (b"connection", b"close")


def _async_marks() -> dict[str, Any]:
    """The attributes that make a plain function which returns an awaitable pass for a coroutine function."""
    if sys.version_info >= (3, 12):
        return vars(inspect.markcoroutinefunction(lambda: None))
    return {"_is_coroutine": getattr(asyncio.coroutines, "_is_coroutine", None)}


_ASYNC = _async_marks()


class MemoryMiddleware:
    """Measures each request, and puts memory headers on its response if the policy says so.

    The keywords are those of Policy. If a server adapter has made this process's guard, only
    `headers` is used and the others are ignored. A websocket is in flight while it is open; the growth that it causes
    counts as background growth. Raises ConfigError.
    """

    def __init__(self, app: ASGIApp, *, guard: Guard | None = None, **policy: Any) -> None:
        self.app = app
        self._keywords = policy
        self._headers = (guard.policy if guard is not None else load_policy(os.environ, policy)[0]).headers
        self._given = guard
        # one tuple, read once a request: because of __getattr__, reading an attribute costs three times as much
        self._hot: tuple[ASGIApp, Guard | None, Meter | None, bool | str, RouteNames] = (app, None, None, self._headers, RouteNames())
        knows_routes(self._hot[4])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> Any:
        if scope["type"] != "http" or KEY in scope:
            return await self._other(scope, receive, send)
        app, guard, meter, headers, names = self._hot
        if guard is None or meter is None or not guard.here:
            work = carried(scope)
            if work is not None:
                scope[KEY] = work
                return await self._other(scope, receive, send)
            guard = self._find_guard()
            if guard is None:
                return await app(scope, receive, send)
            app, meter = self._hot[0], guard.meter
        if meter.crowded and not await _room(guard, scope):
            return await _shed(scope, send)
        # inlined, because every request pays for this code. Servers provide method and path; an app's own tests may leave out what
        # the app does not use
        work = scope[KEY] = meter.begin(f"{scope.get('method', '')} {scope.get('path', '')}".encode("utf-8", "replace"))
        try:
            running = app(scope, receive, send if not headers and not meter.leaving else self._announcing(scope, send, work))
            # pass on the result, because a server complains if an app returns something
            return await (running if not meter.apart.steps else Steps(running, work))
        finally:
            # Starlette and FastAPI: the route or endpoint that their routers chose leads to the app's own name for it, never to client text
            taken = scope.get("route") or scope.get("endpoint")
            if taken is not None:
                known = names.get(id(taken))
                name = known.get(scope.get("method", "")) if known is not None and work.route is UNMATCHED else None
                work.route = name or names.find(scope, taken, work.route)
            meter.end(work)

    def __getattr__(self, name: str) -> Any:
        """The app's attributes, such as `state` or `router`, for code that expects them on the served object."""
        if name == "app" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.app, name)

    def _find_guard(self) -> Guard | None:
        given = self._given
        guard = given if given is not None and given.here else guard_for(self._keywords, "requests", own_recycle, own_name)
        app = self.app
        if guard is not None:
            guard.meter.apart.elsewhere = _in_pool_threads
            if guard.policy.refuses_memory:
                from oomsafe.asgi.limited import Limited  # imported here, because most workers have no hard limit

                app = Limited(app, guard)
        self._hot = app, guard, guard.meter if guard is not None else None, self._headers, self._hot[4]
        return guard

    async def _other(self, scope: Scope, receive: Receive, send: Send) -> Any:
        """Everything except an HTTP request that is not counted yet: a counted request, a websocket, a lifespan."""
        if scope["type"] == "http":  # wrapped twice, counted once
            send = self._announcing(scope, send, scope[KEY]) if self._headers else send
        if scope["type"] == "lifespan" and self._given is None:
            return await self._lifespan(scope, receive, send)
        if scope["type"] != "websocket" or KEY in scope:  # a lifespan starts before there is a server that could be recycled
            return await self.app(scope, receive, send)
        guard = self._hot[1]
        if guard is None or not guard.here:
            guard = self._find_guard()
        if guard is None:
            return await self.app(scope, receive, send)
        open_websocket(send)
        try:
            with guard.meter.begin(f"WEBSOCKET {scope.get('path', '')}".encode("utf-8", "replace"), measured=False) as scope[KEY]:
                return await self._hot[0](scope, receive, send)
        finally:
            closed_websocket(send)

    async def _lifespan(self, scope: Scope, receive: Receive, send: Send) -> Any:
        self._begin_later(FIRST_TRY)
        try:
            return await self.app(scope, receive, send)
        finally:  # at the end of a uvicorn that got a signal nothing else runs: it raises that signal again
            guard = own_guard()
            if guard is not None:
                guard.forget_row()

    def _begin_later(self, seconds: float) -> None:
        """Under a uvicorn without an adapter, make the guard before the first request, because its other workers wait until it has booted.

        The guard then measures while no requests arrive, too, since nothing else would notice growth then.
        """
        loop = running_loop()
        if loop is None:
            return  # trio runs the app: no uvicorn

        def begin() -> None:
            if get_guard() is None and attempt("looking for uvicorn's server", "the server", serves_here):
                self._find_guard()
            guard = own_guard()
            if guard is not None:
                tick(guard)
            elif get_guard() is None and seconds < LAST_TRY:
                self._begin_later(seconds * 2)

        def tick(guard: Guard) -> None:
            if guard.here:
                guard.tick()
                loop.call_later(guard.pause, tick, guard)

        loop.call_later(seconds, begin)

    def _announcing(self, scope: Scope, send: Send, work: Work) -> Send:
        """A `send` that adds the memory headers, if the client may see them, and `Connection: close` if the worker leaves.

        It returns the server's own awaitable, and passes for a coroutine function as the server's send() does, because asgiref checks that.
        """
        shown, meter = announces(self._headers, work, lambda: _token(scope)), work.meter

        def announce(message: Message) -> Awaitable[None]:
            if message["type"] == "http.response.start":
                headers = message.get("headers", ())
                if shown:
                    headers = [*headers, *headers_of(work).raw]
                if meter.leaving and scope.get("http_version") != "2":
                    headers = [*(pair for pair in headers if pair[0].lower() != b"connection"), CLOSE]
                # a new message, because an app may send the same one every time
                message = {**message, "headers": headers}
            return send(message)

        announce.__dict__ = _ASYNC
        return announce


class Steps:
    """Awaits an app's coroutine, and has each of its steps measured."""

    __slots__ = ("_iterator", "_work")

    def __init__(self, running: Awaitable[None], work: Work) -> None:
        # a coroutine is its own iterator but for __next__; any other awaitable makes one
        self._iterator: Any = running.__await__()
        self._work = work

    def __await__(self) -> Steps:
        return self

    def __iter__(self) -> Steps:
        return self

    def __next__(self) -> Any:
        return self._work.meter.run_step(self._work, self._iterator.__next__)

    def send(self, value: Any) -> Any:
        """Go on with this value. Raises StopIteration at its end."""
        return self._work.meter.run_step(self._work, self._iterator.send, value)

    def throw(self, *error: Any) -> Any:
        """Go on with this error."""
        return self._work.meter.run_step(self._work, self._iterator.throw, *error)

    def close(self) -> None:
        """End it."""
        close = getattr(self._iterator, "close", None)
        if close is not None:
            close()


def _in_pool_threads() -> dict[Work, int]:
    """The ident of the thread in which each request's plain function runs."""
    from oomsafe.asgi.pool_threads import requests_in_pool_threads  # imported here, because only a worker that has grown needs it

    return requests_in_pool_threads()


async def _room(guard: Guard, scope: Scope) -> bool:
    """Wait until there is memory for one more request, or until the longest wait is over. False: the request is to be refused."""
    if running_loop() is None:
        return True  # trio runs the app
    waiting = Waiting(guard)
    while seconds := waiting.seconds():
        await asyncio.sleep(seconds)
    return not guard.sheds or not guard.refuses(scope.get("path", ""))


async def _shed(scope: Scope, send: Send) -> None:
    from oomsafe.asgi.refusing import refuse  # imported here, because most workers never need it
    from oomsafe.http.refusal import SHED

    await refuse(SHED, scope, send)


def _token(scope: Scope) -> bytes | None:
    return next((value for name, value in scope.get("headers", ()) if name == TOKEN_ASGI), None)
