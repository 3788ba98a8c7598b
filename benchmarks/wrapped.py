"""Hello worlds, each wrapped by one contestant: in request_cost.py's own process, and behind a server.

A server finds out by the variable BENCHMARK which one it serves. Path /count tells how many requests
the contestant has counted, so that a contestant that does nothing is found out.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

App = Callable[..., Any]

LIMIT = "4GiB"


# --- the bare apps


def hello_starlette() -> Any:
    """A Starlette app of two routes, as bare as it comes."""
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import PlainTextResponse
    from starlette.routing import Route

    async def hello(request: Request) -> PlainTextResponse:
        return PlainTextResponse("hello")

    async def count(request: Request) -> PlainTextResponse:
        return PlainTextResponse(str(counted(os.environ.get("BENCHMARK", ""))))

    return Starlette(routes=[Route("/", hello), Route("/count", count)])


def hello_wsgi(environ: dict[str, Any], start_response: Any) -> list[bytes]:
    """A WSGI app without a framework."""
    body = str(counted("oomsafe")).encode() if environ["PATH_INFO"] == "/count" else b"hello"
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(body)))])
    return [body]


# --- what does nothing, and what a reader of psutil's documentation writes


class EmptyASGI:
    """One more call, and nothing else."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self.app(scope, receive, send)


class PsutilASGI:
    """memory_info() at both ends of a request, two headers."""

    def __init__(self, app: App) -> None:
        import psutil

        self.app = app
        self.memory_info = psutil.Process().memory_info

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        before = self.memory_info().rss

        async def announce(message: Any) -> None:
            if message["type"] == "http.response.start":
                rss = self.memory_info().rss
                message["headers"].append((b"x-memory-rss", str(rss).encode()))
                message["headers"].append((b"x-memory-delta", str(rss - before).encode()))
            await send(message)

        return await self.app(scope, receive, announce)


def empty_wsgi(app: App) -> App:
    """One more call, and nothing else."""
    return lambda environ, start_response: app(environ, start_response)


def psutil_wsgi(app: App) -> App:
    """memory_info() at both ends of a request, two headers."""
    import psutil

    memory_info = psutil.Process().memory_info

    def wrapped(environ: Any, start_response: Any) -> Any:
        before = memory_info().rss

        def start(status: str, headers: Any, *exc_info: Any) -> Any:
            rss = memory_info().rss
            headers += [("X-Memory-RSS", str(rss)), ("X-Memory-Delta", str(rss - before))]
            return start_response(status, headers, *exc_info)

        return app(environ, start)

    return wrapped


# --- the contestants


def new_guard(headers: bool) -> Any:
    """oomsafe's, with a limit that is never met, and a slot of its own."""
    from oomsafe import Guard, Policy
    from oomsafe.worker.current import set_guard

    guard = Guard(Policy(soft_limit=LIMIT, headers=headers), unit="requests")
    set_guard(guard)
    return guard


def oomsafe_asgi(headers: bool) -> Callable[[App], App]:
    """MemoryMiddleware with all that it does; without `headers`, only those."""

    def wrap(app: App) -> App:
        from oomsafe.asgi import MemoryMiddleware

        return MemoryMiddleware(app, guard=new_guard(headers))

    return wrap


def oomsafe_wsgi(headers: bool) -> Callable[[App], App]:
    """The same for WSGI."""

    def wrap(app: App) -> App:
        from oomsafe.wsgi import MemoryMiddleware

        return MemoryMiddleware(app, guard=new_guard(headers))

    return wrap


def starlette_exporter(app: App) -> App:
    """starlette_exporter as its README has it."""
    from starlette_exporter import PrometheusMiddleware

    app.add_middleware(PrometheusMiddleware)  # type: ignore[attr-defined]
    return app


def instrumentator(app: App) -> App:
    """prometheus-fastapi-instrumentator as its README has it."""
    from prometheus_fastapi_instrumentator import Instrumentator

    Instrumentator().instrument(app)
    return app


def bare(app: App) -> App:
    """Nothing."""
    return app


ASGI: dict[str, Callable[[App], App]] = {
    "bare": bare,
    "one more middleware": EmptyASGI,
    "oomsafe, headers": oomsafe_asgi(headers=True),
    "oomsafe": oomsafe_asgi(headers=False),
    "psutil twice, headers": PsutilASGI,
    "starlette_exporter": starlette_exporter,
    "prometheus-fastapi-instrumentator": instrumentator,
}

WSGI: dict[str, Callable[[App], App]] = {
    "bare": bare,
    "one more middleware": empty_wsgi,
    "oomsafe, headers": oomsafe_wsgi(headers=True),
    "oomsafe": oomsafe_wsgi(headers=False),
    "psutil twice, headers": psutil_wsgi,
}

#: The counter of each exporter.
_SAMPLES = {"starlette_exporter": "starlette_requests_total", "prometheus-fastapi-instrumentator": "http_requests_total"}


def counted(name: str) -> int:
    """Requests that a contestant has counted in this process; 0 for those that don't count."""
    if name.startswith("oomsafe"):
        from oomsafe.worker.current import get_guard

        guard = get_guard()
        return guard.meter.counters.work if guard is not None else 0
    if name in _SAMPLES:
        from prometheus_client import REGISTRY

        return int(sum(s.value for metric in REGISTRY.collect() for s in metric.samples if s.name == _SAMPLES[name]))
    return 0


def asgi_app() -> App:
    """For ``uvicorn --factory``."""
    return ASGI[os.environ["BENCHMARK"]](hello_starlette())
