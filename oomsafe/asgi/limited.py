"""Around an ASGI app whose worker has a hard limit: a request that is refused memory becomes 503. Imported only with a hard limit."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from oomsafe.asgi.refusing import refuse
from oomsafe.http.carrier import KEY
from oomsafe.http.refusal import ANSWERED, CUT, REFUSED, TOO_LARGE, listen, whole
from oomsafe.worker.guard import Guard

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]


class Limited:
    """The app, with its MemoryErrors answered."""

    def __init__(self, app: Callable[..., Awaitable[Any]], guard: Guard) -> None:
        self._app = app
        self._guard = guard
        listen()

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Send) -> Any:
        if scope["type"] != "http":
            return await self._other(scope, receive, send)
        begun = replaced = False

        async def answer(message: Message) -> None:
            """Send what the app sends; in place of a framework's 500 for a MemoryError, a refusal."""
            nonlocal begun, replaced
            if replaced:
                return  # what follows belongs to the response that was replaced
            if message["type"] == "http.response.start":
                # Starlette answers inside its `except` and raises the error again; Django tells of it before. What was noted is taken out
                # whatever the answer is, because it holds what the request has allocated
                error = scope.pop(REFUSED, None) or sys.exc_info()[1]
                out_of_memory = error if message["status"] == 500 and isinstance(error, MemoryError) else None
                if out_of_memory is not None and self._guard.hard_limit.refuses(scope.get(KEY), out_of_memory, ANSWERED):
                    begun = replaced = True
                    await refuse(TOO_LARGE, scope, send)
                    return
            begun = True
            await send(message)

        try:
            return await self._app(scope, receive, answer)
        except MemoryError as error:
            if replaced:
                return None  # the same once more
            whole(scope, error)
            if not self._guard.hard_limit.refuses(scope.get(KEY), error, CUT if begun else ANSWERED) or begun:
                raise  # the server closes the connection, so that nobody takes a part for the whole
        await refuse(TOO_LARGE, scope, send)
        return None

    async def _other(self, scope: MutableMapping[str, Any], receive: Any, send: Send) -> Any:
        try:
            return await self._app(scope, receive, send)
        except MemoryError as error:
            if scope["type"] == "websocket":
                self._guard.hard_limit.refuses(scope.get(KEY), error, CUT)
            raise
