"""A whole Django project in one file, with a leak, a balloon and a stream. `wsgi` and `asgi` are what a server runs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator

from django.conf import settings
from django.core.asgi import get_asgi_application
from django.core.wsgi import get_wsgi_application
from django.http import HttpRequest, HttpResponse, StreamingHttpResponse
from django.urls import path
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from oomsafe.metrics.prometheus import MemoryCollector

settings.configure(
    SECRET_KEY="only an example",
    ALLOWED_HOSTS=["127.0.0.1", "localhost"],
    ROOT_URLCONF=__name__,
    MIDDLEWARE=[
        "oomsafe.django.MemoryMiddleware",  # first, because middleware before it is not measured
        "django.middleware.common.CommonMiddleware",
    ],
    OOMSAFE={"headers": True},
)

#: An unbounded cache: the most common leak of all.
_cache: list[bytes] = []

_registry = CollectorRegistry()
_registry.register(MemoryCollector())


def _keep(kib: int) -> HttpResponse:
    _cache.append(bytes([len(_cache) % 256]) * (min(kib, 4096) * 1024))
    return HttpResponse(f"kept {kib} KiB, {len(_cache)} entries\n")


def index(request: HttpRequest) -> HttpResponse:
    """A request that costs nothing."""
    return HttpResponse("ok\n")


def leak(request: HttpRequest, kib: int) -> HttpResponse:
    """Keep `kib` KiB forever."""
    return _keep(kib)


async def async_leak(request: HttpRequest, kib: int) -> HttpResponse:
    """Keep `kib` KiB forever, in the event loop."""
    return _keep(kib)


def report(request: HttpRequest, mib: int) -> HttpResponse:
    """Take `mib` MiB, and give them back: a worker near its limit goes over it."""
    rows = [bytes(1024) for _ in range(min(mib, 100) * 1024)]
    return HttpResponse(f"{len(rows)} rows\n")


def stream(request: HttpRequest, parts: int) -> StreamingHttpResponse:
    """Send an answer in parts: the request is in flight until the last one."""

    def body() -> Iterator[str]:
        for number in range(parts):
            yield f"{number}\n"
            time.sleep(0.05)

    return StreamingHttpResponse(body())


async def async_stream(request: HttpRequest, parts: int) -> StreamingHttpResponse:
    """The same under ASGI, while other requests run."""

    async def body() -> AsyncIterator[str]:
        for number in range(parts):
            yield f"{number}\n"
            await asyncio.sleep(0.05)

    return StreamingHttpResponse(body())


def metrics(request: HttpRequest) -> HttpResponse:
    """The metrics of the whole pool, whichever worker answers; expose them only on an internal address."""
    return HttpResponse(generate_latest(_registry), content_type=CONTENT_TYPE_LATEST)


urlpatterns = [
    path("", index),
    path("leak/<int:kib>", leak),
    path("async-leak/<int:kib>", async_leak),
    path("report/<int:mib>", report),
    path("stream/<int:parts>", stream),
    path("async-stream/<int:parts>", async_stream),
    path("metrics/", metrics),
]

wsgi = get_wsgi_application()
asgi = get_asgi_application()
