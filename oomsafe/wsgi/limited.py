"""Around a WSGI app whose worker has a hard limit: a request that is refused memory becomes 503. Imported only with a hard limit."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any

from oomsafe.http.carrier import KEY
from oomsafe.http.refusal import ANSWERED, CUT, REFUSED, TOO_LARGE, listen, whole
from oomsafe.worker.guard import Guard
from oomsafe.wsgi import refusing

Environ = dict[str, Any]


class Limited:
    """The app, with its MemoryErrors answered."""

    def __init__(self, app: Callable[..., Iterable[bytes]], guard: Guard) -> None:
        self._app = app
        self._guard = guard
        listen()

    def __call__(self, environ: Environ, start_response: Any) -> Iterable[bytes]:
        response = Response(self._guard, environ, start_response)
        try:
            body = self._app(environ, response.start)
        except MemoryError as error:
            return response.refused(error)
        if response.replaced:
            _close(body)
            return response.body
        kind = type(body)
        # a list is all there; what the server knows by its type stays what it is
        if kind is list or kind is tuple or not hasattr(kind, "__iter__") or _is_file(body, environ):
            return body
        return (SizedParts if hasattr(kind, "__len__") else Parts)(body, response)


class Response:
    """What one request gets."""

    def __init__(self, guard: Guard, environ: Environ, start_response: Any) -> None:
        self._guard = guard
        self._environ = environ
        self._start = start_response
        self.replaced = False
        """Whether the client gets 503 in place of the app's response."""
        self.sent = False
        """Whether a part of the app's body has been sent."""

    @property
    def body(self) -> list[bytes]:
        """The body of a refusal."""
        return refusing.body(TOO_LARGE, self._environ)

    def start(self, status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
        """start_response for the app; in place of a framework's 500 for a MemoryError, it starts a 503."""
        # taken out whatever the answer is: it holds what the request has allocated
        error = self._environ.pop(REFUSED, None)
        if error is not None and status.startswith("500") and self._guard.hard_limit.refuses(self._environ.get(KEY), error, ANSWERED):
            self.replaced = True
            return refusing.start(TOO_LARGE, self._start, exc_info)
        return self._start(status, headers) if exc_info is None else self._start(status, headers, exc_info)

    def refused(self, error: MemoryError) -> list[bytes]:
        """The body in place of what has failed with this error. Raises the error again if it is not the limit's, or too late for 503."""
        whole(self._environ, error)
        if not self._guard.hard_limit.refuses(self._environ.get(KEY), error, CUT if self.sent else ANSWERED):
            raise error
        if self.sent:
            raise error  # the server closes the connection, so that nobody takes a part for the whole
        refusing.start(TOO_LARGE, self._start, sys.exc_info())
        self.replaced = True
        return self.body


class Parts:
    """A body whose parts come one by one; where one fails for memory, and none has been sent, a refusal comes in its place."""

    def __init__(self, body: Iterable[bytes], response: Response) -> None:
        self._body = body
        self._response = response

    def __iter__(self) -> Iterator[bytes]:
        try:
            for part in self._body:
                # whatever the server has of it by now: after headers, there is no way back
                self._response.sent = self._response.sent or bool(part)
                yield part
        except MemoryError as error:
            yield from self._response.refused(error)

    def close(self) -> None:
        """Close the app's body."""
        _close(self._body)

    def __getattr__(self, name: str) -> Any:
        if name in ("_body", "_response"):
            raise AttributeError(name)
        return getattr(self._body, name)


class SizedParts(Parts):
    """One with a number of parts."""

    def __len__(self) -> int:
        return len(self._body)  # type: ignore[arg-type]


def _is_file(body: Any, environ: Environ) -> bool:
    wrapper = environ.get("wsgi.file_wrapper")
    return isinstance(wrapper, type) and isinstance(body, wrapper)


def _close(body: Any) -> None:
    with suppress(AttributeError):
        body.close()
