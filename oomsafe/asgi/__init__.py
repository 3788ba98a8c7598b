"""Middleware for ASGI apps: Starlette, FastAPI, Django, and any other.

It runs in a worker, for each request; under a uvicorn that nothing else guards it also recycles the worker. It may import http, drain,
worker and the rooms below them. Start with middleware.py; routes.py finds the name of the route that a framework chose.
"""

from __future__ import annotations

from oomsafe.asgi.middleware import MemoryMiddleware

__all__ = ["MemoryMiddleware"]
