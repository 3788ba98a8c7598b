"""Middleware for ASGI apps: Starlette, FastAPI, Django, and what else there is.

Runs in a worker, for each request; under a uvicorn that nothing else guards it also has the worker recycled. It may import http, drain,
worker and what is below. Begin with middleware.py; routes.py finds what a framework calls what it has taken.
"""

from __future__ import annotations

from oomsafe.asgi.middleware import MemoryMiddleware

__all__ = ["MemoryMiddleware"]
