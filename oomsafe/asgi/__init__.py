"""Middleware for ASGI apps: Starlette, FastAPI, Django, and what else there is."""

from __future__ import annotations

from oomsafe.asgi.middleware import MemoryMiddleware

__all__ = ["MemoryMiddleware"]
