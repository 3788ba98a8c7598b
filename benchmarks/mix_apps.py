"""A noisy mix: 20 routes, of which 19 allocate and free, one of these 20 MiB, and one keeps 64 KiB with each call. LEAK says how.

For Flask (`flask`), FastAPI with coroutines (`fast`) and with plain functions in its thread pool (`pool`), and as tasks of Celery.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from typing import Any

#: Bytes that one call keeps.
EACH = 64 << 10

HOW = os.environ.get("LEAK", "bytes")

kept: list[Any] = []


def keep() -> None:
    """The leak."""
    if HOW == "dicts":
        kept.append([{"a": number} for number in range(EACH // 232)])
    elif HOW == "numpy":
        import numpy

        kept.append(numpy.ones(EACH // 8))
    elif HOW == "c":
        # a library of C, which calls malloc as an extension module does; what ctypes itself is asked for by name, no tracer sees
        sqlite = ctypes.CDLL("libsqlite3.so.0")
        sqlite.sqlite3_malloc.restype = ctypes.c_void_p
        ctypes.memset(sqlite.sqlite3_malloc(EACH), 1, EACH)
    elif HOW == "many":
        kept.append(b"x" * (16 * EACH))
    elif HOW == "bytes":
        kept.append(bytes(EACH))


def leak() -> str:
    """It keeps EACH."""
    keep()
    return "ok"


def balloon() -> str:
    """20 MiB for a moment."""
    return str(len(bytearray(20 << 20)))


def noise(number: int) -> Callable[[], str]:
    """100 to 1000 KiB in pieces, for a moment."""

    def free() -> str:
        return str(len([bytearray(1024) for _ in range(100 + 50 * number)]))

    free.__name__ = f"free{number}"
    return free


WORKS: dict[str, Callable[[], str]] = {"leak": leak, "balloon": balloon, **{f"free{number}": noise(number) for number in range(18)}}


def make_flask() -> Any:
    """Views that are plain functions."""
    from flask import Flask

    app = Flask(__name__)
    app.add_url_rule("/", "root", lambda: "ok")
    for name, work in WORKS.items():
        app.add_url_rule(f"/{name}", name, work)
    return app


def make_fast(threads: bool) -> Any:
    """Endpoints that are coroutines, or functions that run in the thread pool."""
    from fastapi import FastAPI
    from fastapi.responses import PlainTextResponse

    app = FastAPI()
    app.add_api_route("/", lambda: "ok")
    for name, work in WORKS.items():
        chosen = work if threads else endpoint_of(name)
        app.add_api_route(f"/{name}", chosen, methods=["GET"], response_class=PlainTextResponse, response_model=None)
    return app


async def leak_later() -> str:
    """As an endpoint of its own, so that its code is its route's alone."""
    return leak()


def endpoint_of(name: str) -> Any:
    """A coroutine that does this work."""
    work = WORKS[name]

    async def endpoint() -> str:
        return work()

    return leak_later if name == "leak" else endpoint


def __getattr__(name: str) -> Any:
    if name == "flask":
        return make_flask()
    if name in ("fast", "pool"):
        return make_fast(name == "pool")
    raise AttributeError(name)
