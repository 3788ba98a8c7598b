"""Middleware for WSGI apps: Flask, Django, and what else there is.

Runs in a worker, for each request. It may import http, worker and what is below. Begin with middleware.py; routes.py finds what Flask
calls what it has taken.
"""

from __future__ import annotations

from oomsafe.wsgi.middleware import MemoryMiddleware

__all__ = ["MemoryMiddleware"]
