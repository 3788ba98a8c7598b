"""What a client gets whose request is refused for want of memory; also where a framework would answer a MemoryError with 500."""

from __future__ import annotations

import sys
from collections.abc import MutableMapping
from functools import partial
from typing import Any

from oomsafe.log import attempt
from oomsafe.worker.hard_limit import chain

#: The key in a scope or an environ of the MemoryError that a framework has answered by itself.
REFUSED = "oomsafe.refused"


class Refusal:
    """A response of 503 that asks the client to come back after `retry_after` seconds. No figures: anybody may read it."""

    status, reason = 503, "Service Unavailable"

    def __init__(self, text: str, retry_after: int) -> None:
        self._body = text.encode()
        self.headers = [
            ("Content-Type", "text/plain; charset=utf-8"),
            ("Retry-After", str(retry_after)),
            ("Cache-Control", "no-store"),
            ("Content-Length", str(len(self._body))),
        ]

    def body(self, method: str | None) -> bytes:
        """What follows the headers; nothing for HEAD."""
        return b"" if method == "HEAD" else self._body


#: For a request that has asked for more than the hard limit leaves. If its client simply tries again at once, that most likely fails again.
TOO_LARGE = Refusal("This request needs more memory than one request may have here.\n", 10)

#: For a request that is shed: it is no fault of the request, and the next second may be another.
SHED = Refusal("This service is short of memory. Please try again in a moment.\n", 2)

#: For the log.
ANSWERED, CUT = "its client got 503", "its response had begun, so the connection is closed"

_listening: set[str] = set()


def listen() -> None:
    """Have Flask and Django tell of a MemoryError that they answer with 500, if they are there."""
    for module, receiver in (("flask.signals", _flask), ("django.core.signals", _django)):
        signal = getattr(sys.modules.get(module), "got_request_exception", None)
        if signal is not None and module not in _listening:
            _listening.add(module)
            attempt("listening to errors", module.partition(".")[0], partial(signal.connect, receiver, weak=False))


def mark(carrier: MutableMapping[str, Any], error: BaseException | None) -> None:
    """Note in a request's scope or environ that a framework answers this error, if it is a MemoryError."""
    if isinstance(error, MemoryError):
        carrier[REFUSED] = whole(carrier, error)


def whole(carrier: MutableMapping[str, Any], error: MemoryError) -> MemoryError:
    """`error`, with the one that was noted before as that during whose handling it came.

    Who reports an error needs memory, too. Python 3.12 and newer raise the MemoryErrors of the interpreter itself without a context
    (_PyErr_NoMemory in Python/errors.c), and so without the error whose frames hold what the request has allocated.
    """
    before = carrier.pop(REFUSED, None)
    if before is not None and not any(one is before for one in chain(error)) and not any(one is error for one in chain(before)):
        (*_, first) = chain(error)
        first.__context__ = before
    return error


def _flask(_: Any, exception: BaseException | None = None, **more: Any) -> None:  # noqa: ARG001
    def note() -> None:
        mark(sys.modules["flask"].request.environ, exception)

    attempt("a request that was refused memory", "Flask", note)


def _django(_: Any = None, request: Any = None, **more: Any) -> None:  # noqa: ARG001
    def note() -> None:
        scope = getattr(request, "scope", None)
        mark(request.META if scope is None else scope, sys.exc_info()[1])

    attempt("a request that was refused memory", "Django", note)
