"""A Flask app with the two ways in which services run out of memory: a leak, and a balloon."""

from __future__ import annotations

from flask import Flask
from werkzeug.middleware.dispatcher import DispatcherMiddleware

from oomsafe.metrics.prometheus import metrics_app

app = Flask(__name__)

#: An unbounded cache: the most common leak of all.
_cache: dict[int, bytes] = {}


@app.get("/")
def index() -> str:
    """A request that costs nothing."""
    return "ok\n"


@app.get("/leak/<int:kib>")
def leak(kib: int) -> str:
    """Keep `kib` KiB forever."""
    number = len(_cache)
    _cache[number] = bytes([number % 256]) * (min(kib, 4096) * 1024)
    return f"kept {kib} KiB, {number + 1} entries\n"


@app.get("/report/<int:mib>")
def report(mib: int) -> str:
    """Take `mib` MiB, and give them back: a worker near its limit goes over it."""
    rows = [bytes(1024) for _ in range(min(mib, 100) * 1024)]
    return f"{len(rows)} rows\n"


# the metrics of the whole pool, whichever worker answers; expose them only on an internal address
app.wsgi_app = DispatcherMiddleware(app.wsgi_app, {"/metrics": metrics_app})  # type: ignore[method-assign]
