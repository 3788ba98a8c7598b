"""The ASGI messages of a request that is refused for want of memory. Imported once a worker needs it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from oomsafe.http.refusal import Refusal

Message = MutableMapping[str, Any]


async def refuse(refusal: Refusal, scope: Message, send: Callable[[Message], Awaitable[None]]) -> None:
    """Send the whole response."""
    headers = [(name.lower().encode(), value.encode()) for name, value in refusal.headers]
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": refusal.body(scope.get("method"))})
