"""What a request is counted under: its method and its route, both of which the app has made up, and no client."""

from __future__ import annotations

from collections.abc import Collection

#: What a route takes that does not say which methods it takes. A client may send any other word.
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


def label(method: str, path: str, methods: Collection[str] | None = None) -> str | None:
    """``GET /items/{item_id}``; None for a method that is none of `methods`, which the route takes."""
    return f"{method} {path}" if method in (METHODS if methods is None else methods) else None
