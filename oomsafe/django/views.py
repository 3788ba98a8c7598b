"""Which view serves which URL pattern: asked only when a worker was probed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from django.urls import get_resolver

from oomsafe.policy.routes import METHODS, label

#: How many include()s in include()s are searched.
DEPTH = 16


def views() -> Iterator[tuple[Any, str]]:
    """(view, route) for each pattern and method, named as Django's resolver names a match."""
    yield from _of(get_resolver(), "", 0)


def _of(resolver: Any, before: str, depth: int) -> Iterator[tuple[Any, str]]:
    for pattern in getattr(resolver, "url_patterns", ()) if depth < DEPTH else ():
        path = str(pattern.pattern)
        # as URLResolver._join_route does
        path = before + path.removeprefix("^") if before else path
        callback = getattr(pattern, "callback", None)
        if callback is None:
            yield from _of(pattern, path, depth + 1)
        else:
            yield from ((callback, name) for method in METHODS if (name := label(method, f"/{path.removeprefix('/')}")))
