"""Middleware for WSGI apps: Flask, Django, and any other.

It runs in a worker, for each request, and may import http, worker and the rooms below them. Start with middleware.py; routes.py finds
the name of the route that Flask chose.
"""

from __future__ import annotations

from oomsafe.wsgi.middleware import MemoryMiddleware

__all__ = ["MemoryMiddleware"]
