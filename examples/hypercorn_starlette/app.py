"""A Starlette app with a leak."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route

from oomsafe.metrics.prometheus import metrics_app

#: An unbounded cache: the most common leak of all.
_cache: list[bytes] = []


async def index(request: Request) -> Response:
    """A request that costs nothing."""
    return JSONResponse({"status": "ok"})


async def leak(request: Request) -> Response:
    """Keep `kib` KiB forever."""
    _cache.append(bytes([len(_cache) % 256]) * (min(request.path_params["kib"], 4096) * 1024))
    return JSONResponse({"entries": len(_cache)})


app = Starlette(routes=[Route("/", index), Route("/leak/{kib:int}", leak), Mount("/metrics", metrics_app)])
