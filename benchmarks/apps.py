"""The app whose server imports.py starts: it answers, and keeps nothing."""

from __future__ import annotations

from typing import Any


def wsgi(environ: dict[str, Any], start_response: Any) -> list[bytes]:
    """The WSGI app."""
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "3")])
    return [b"ok\n"]
