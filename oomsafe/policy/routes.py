"""The name that a request is counted under: method and route. Both are chosen by the app, never by a client."""

from __future__ import annotations

from collections.abc import Collection

#: The methods of a route that does not declare its own. A client may send any other word.
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


def label(method: str, path: str, methods: Collection[str] | None = None) -> str | None:
    """``GET /items/{item_id}``; None if `method` is not one of the route's `methods` (None: METHODS)."""
    return f"{method} {path}" if method in (METHODS if methods is None else methods) else None
