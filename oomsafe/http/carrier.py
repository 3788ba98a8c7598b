"""How a request carries its work from one middleware to the next, so that it is counted once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from oomsafe.worker.meter import Work

#: Under which it does, in an ASGI scope, in a WSGI environ, and in Django's META.
KEY = "oomsafe.work"

#: Where a bridge between ASGI and WSGI puts the other side's scope or environ: as a2wsgi names them.
OTHER_SIDE = ("asgi.scope", "wsgi_environ")


def carried(carrier: Mapping[str, Any], start_response: Any = None) -> Work | None:
    """The Work of a request that was counted on the other side of a bridge between ASGI and WSGI; None when it was not.

    `carrier` is the scope or the environ on this side. The bridges of Starlette, uvicorn and asgiref put nothing there, but
    the method that they give as start_response is that of an object which has the scope.
    """
    sides = [carrier.get(name) for name in OTHER_SIDE]
    for side in (*sides, getattr(getattr(start_response, "__self__", None), "scope", None)):
        if isinstance(side, Mapping) and KEY in side:
            work: Work = side[KEY]
            return work
    return None
