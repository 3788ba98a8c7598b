"""How a request carries its Work from one middleware to the next, so that it is counted once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from oomsafe.worker.meter import Work

#: The key of the Work in an ASGI scope, in a WSGI environ, and in Django's META.
KEY = "oomsafe.work"

#: The keys under which a2wsgi, a bridge between ASGI and WSGI, stores the scope or environ of the other side.
OTHER_SIDE = ("asgi.scope", "wsgi_environ")


def carried(carrier: Mapping[str, Any], start_response: Any = None) -> Work | None:
    """The Work of a request that was counted on the other side of a bridge between ASGI and WSGI; None if it was not counted there.

    `carrier` is the scope or the environ on this side. The bridges of Starlette, uvicorn and asgiref store nothing in it, but
    their start_response is a method of an object that has the scope.
    """
    sides = [carrier.get(name) for name in OTHER_SIDE]
    for side in (*sides, getattr(getattr(start_response, "__self__", None), "scope", None)):
        if isinstance(side, Mapping) and KEY in side:
            work: Work = side[KEY]
            return work
    return None
