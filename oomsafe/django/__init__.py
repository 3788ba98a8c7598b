"""Middleware for Django, sync and async: ``MIDDLEWARE = ["oomsafe.django.MemoryMiddleware", ...]``, ``OOMSAFE = {...}``.

It runs in a worker, for each request, also under the middleware of the server's adapter, which has counted the request already. It may
import http, worker, the rooms below them, and Django. It is one file: middleware.py.
"""

from __future__ import annotations

from oomsafe.django.middleware import MemoryMiddleware

__all__ = ["MemoryMiddleware"]
