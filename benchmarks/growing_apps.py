"""Apps whose memory grows, each in another way; a request's path says how, its query how much. For verdicts.py: as WSGI, ASGI and tasks."""

from __future__ import annotations

import ctypes
import random
from collections import deque
from typing import Any

MIB, KIB = 1 << 20, 1 << 10

kept: list[Any] = []
models: dict[str, bytes] = {}
cached: deque[bytes] = deque(maxlen=60)
registry: deque[Any] = deque(maxlen=4)


def _bytes(kib: int) -> bytes:
    """Written to, so that it is really there."""
    return b"x" * (kib * KIB)


def leak_dicts(kib: int) -> None:
    """A leak of small objects."""
    kept.append([{"a": number} for number in range(kib * KIB // 224)])


def leak_bytes(kib: int) -> None:
    """A leak of large ones."""
    kept.append(_bytes(kib))


def leak_in_c(kib: int) -> None:
    """A leak that Python knows nothing of."""
    malloc = ctypes.CDLL(None).malloc
    malloc.argtypes, malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    ctypes.memset(malloc(kib * KIB), 1, kib * KIB)


def leak_arrays(kib: int) -> None:
    """A leak of numpy's."""
    import numpy as np

    kept.append(np.ones(kib * KIB // 8))


def fragment_malloc(mib: int) -> None:
    """No leak: of many blocks of a size that varies one in thirty stays for a while, each in a page that malloc can't give back."""
    size = 520 + 48 * random.randrange(40)
    registry.append([bytes(size) for _ in range(mib * MIB // size)][::30])


def fragment_pymalloc(mib: int) -> None:
    """No leak: of many dicts one in thirty stays for a while, and pymalloc's arenas with it."""
    registry.append([{"a": number} for number in range(mib * MIB // 224)][::30])


def cache(kib: int) -> None:
    """No leak: a cache that is full with so many entries, and then forgets the oldest."""
    cached.append(_bytes(kib))


def model(mib: int) -> None:
    """No leak: it is loaded once, with the first request that needs it."""
    if not models:
        models["model"] = _bytes(mib * KIB)


def balloon(kib: int) -> None:
    """No leak: so much for a moment."""
    _bytes(random.randrange(kib) + 1)


def nothing(_: int) -> None:
    """As most requests."""


WAYS = {
    "/leak_dicts": leak_dicts, "/leak_bytes": leak_bytes, "/leak_in_c": leak_in_c, "/leak_arrays": leak_arrays,
    "/fragment_malloc": fragment_malloc, "/fragment_pymalloc": fragment_pymalloc, "/cache": cache, "/model": model, "/balloon": balloon,
}  # fmt: skip


def act(path: str, query: str) -> bytes:
    """The answer."""
    WAYS.get(path, nothing)(int(query or 0))
    return b"ok"


def wsgi(environ: dict[str, Any], start_response: Any) -> list[bytes]:
    """Under gunicorn."""
    body = act(environ["PATH_INFO"], environ["QUERY_STRING"])
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]


async def asgi(scope: Any, receive: Any, send: Any) -> None:
    """The same."""
    if scope["type"] != "http":
        return
    body = act(scope["path"], scope["query_string"].decode())
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", str(len(body)).encode())]})
    await send({"type": "http.response.body", "body": body})
