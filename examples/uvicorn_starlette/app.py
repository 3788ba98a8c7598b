"""A Starlette app with a leak: in the event loop, in the thread pool, and behind a websocket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.websockets import WebSocket

from oomsafe.metrics.prometheus import metrics_app

#: An unbounded cache: the most common leak of all.
_cache: list[bytes] = []


def _keep(kib: int) -> int:
    _cache.append(bytes([len(_cache) % 256]) * (min(kib, 4096) * 1024))
    return len(_cache)


async def index(request: Request) -> Response:
    """A request that costs nothing."""
    return JSONResponse({"status": "ok"})


async def leak(request: Request) -> Response:
    """Keep `kib` KiB forever."""
    return JSONResponse({"entries": _keep(request.path_params["kib"])})


def threaded_leak(request: Request) -> Response:
    """Keep them from a thread of the pool, which counts as well."""
    return JSONResponse({"entries": _keep(request.path_params["kib"])})


async def clock(request: Request) -> Response:
    """An endless stream: a draining worker waits for it until its grace period is over."""

    async def ticks() -> AsyncIterator[str]:
        tick = 0
        while True:
            yield f"data: {tick}\n\n"
            tick += 1
            await asyncio.sleep(1)

    return StreamingResponse(ticks(), media_type="text/event-stream")


async def echo(websocket: WebSocket) -> None:
    """A websocket that is closed with 1012 (service restart) when its worker ends."""
    await websocket.accept()
    async for text in websocket.iter_text():
        await websocket.send_text(text)


app = Starlette(
    routes=[
        Route("/", index),
        Route("/leak/{kib:int}", leak),
        Route("/threaded-leak/{kib:int}", threaded_leak),
        Route("/clock", clock),
        WebSocketRoute("/echo", echo),
        Mount("/metrics", metrics_app),
    ]
)
