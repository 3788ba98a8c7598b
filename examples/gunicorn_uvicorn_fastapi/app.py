"""A FastAPI app with a leak: in the event loop, and in the thread pool where plain functions run."""

from __future__ import annotations

from fastapi import FastAPI

from oomsafe.metrics.prometheus import metrics_app

app = FastAPI()
app.mount("/metrics", metrics_app)

#: An unbounded cache: the most common leak of all.
_cache: list[bytes] = []


def _keep(kib: int) -> int:
    _cache.append(bytes([len(_cache) % 256]) * (min(kib, 4096) * 1024))
    return len(_cache)


@app.get("/")
async def index() -> dict[str, str]:
    """A request that costs nothing."""
    return {"status": "ok"}


@app.get("/leak/{kib}")
async def leak(kib: int) -> dict[str, int]:
    """Keep `kib` KiB forever."""
    return {"entries": _keep(kib)}


@app.get("/threaded-leak/{kib}")
def threaded_leak(kib: int) -> dict[str, int]:
    """Keep them from a thread of the pool, which counts as well."""
    return {"entries": _keep(kib)}
