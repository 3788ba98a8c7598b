"""Middleware for WSGI apps: Flask, Django, and what else there is."""

from __future__ import annotations

from oomsafe.wsgi.middleware import MemoryMiddleware

__all__ = ["MemoryMiddleware"]
