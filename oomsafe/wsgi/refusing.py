"""The WSGI response to a request that is refused for want of memory. Imported once a worker needs it."""

from __future__ import annotations

from typing import Any

from oomsafe.http.refusal import Refusal


def start(refusal: Refusal, start_response: Any, exc_info: Any = None) -> Any:
    """Start it; with `exc_info`, in place of a response that has been started. Raises that error if its headers have been sent."""
    status, headers = f"{refusal.status} {refusal.reason}", list(refusal.headers)
    return start_response(status, headers) if exc_info is None else start_response(status, headers, exc_info)


def body(refusal: Refusal, environ: dict[str, Any]) -> list[bytes]:
    """Its body."""
    return [part] if (part := refusal.body(environ.get("REQUEST_METHOD"))) else []
