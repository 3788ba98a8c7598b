"""Middleware for Django, sync and async: ``MIDDLEWARE = ["oomsafe.django.MemoryMiddleware", ...]``, ``OOMSAFE = {...}``."""

from __future__ import annotations

from oomsafe.django.middleware import MemoryMiddleware

__all__ = ["MemoryMiddleware"]
