"""WSGI middleware: a request is in flight from the call until the server closes its body (PEP 3333), or drops it.

What an app does in its body's close() is part of the request, so the request does not end with the last part sent. But bridges from
ASGI (uvicorn's own, Starlette's) never close a body: there the request ends when the bridge drops the body.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, repeat
from typing import Any

from oomsafe.http.carrier import KEY, carried
from oomsafe.http.headers import TOKEN_WSGI, announces, headers_of
from oomsafe.policy.settings import load_policy
from oomsafe.worker.current import guard_for, knows_routes
from oomsafe.worker.door import Waiting
from oomsafe.worker.guard import Guard
from oomsafe.worker.meter import Work
from oomsafe.wsgi.routes import Mounts, Views, route_of

Environ = dict[str, Any]
WSGIApp = Callable[[Environ, Any], Iterable[bytes]]


class MemoryMiddleware:
    """Measures each request, and puts memory headers on its response if the policy says so.

    The keywords are those of Policy. If a server adapter has made this process's guard, only
    `headers` is used and the others are ignored. Raises ConfigError.
    """

    def __init__(self, app: WSGIApp, *, guard: Guard | None = None, **policy: Any) -> None:
        self.app = app
        self._keywords = policy
        self._headers = (guard.policy if guard is not None else load_policy(os.environ, policy)[0]).headers
        self._given = guard
        # one tuple, read once a request: because of __getattr__, reading an attribute costs three times as much
        self._hot: tuple[WSGIApp, Guard | None, bool | str, Mounts] = (app, None, self._headers, Mounts(app))
        self._views = Views(app)
        knows_routes(self._views)

    def __call__(self, environ: Environ, start_response: Any) -> Iterable[bytes]:
        app, guard, headers, mounts = self._hot
        work = environ.get(KEY)
        if work is not None:  # wrapped twice, counted once
            return app(environ, _starting(headers, environ, start_response, work))
        if guard is None or not guard.here:
            work = carried(environ, start_response)
            if work is not None:  # inside an ASGI app that is wrapped
                environ[KEY] = work
                return app(environ, _starting(headers, environ, start_response, work))
            guard = self._find_guard()
            if guard is None:
                return app(environ, start_response)
            app = self._hot[0]
        if guard.meter.crowded and not _room(guard, environ):
            return _shed(environ, start_response)
        # PEP 3333 requires a method, but an app's own tests may leave out what the app does not use
        name = f"{environ.get('REQUEST_METHOD', '')} {environ.get('SCRIPT_NAME', '')}{environ.get('PATH_INFO', '')}"
        work = environ[KEY] = guard.meter.begin(name.encode("latin-1", "replace"))
        start = _starting(headers, environ, start_response, work)
        try:
            body = app(environ, mounts.starting(start, environ, work) if mounts else start)
        except BaseException:
            work.end()
            raise
        kind = type(body)
        # most frameworks return a list
        return ListBody(body, work) if kind is list or kind is tuple else _ending(body, work, environ)

    def __getattr__(self, name: str) -> Any:
        """The app's attributes, for code that expects them on the served object."""
        if name == "app" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.app, name)

    def _find_guard(self) -> Guard | None:
        """This process's guard; None if nothing can be measured, or the server's adapter has counted the request already."""
        given = self._given
        guard = given if given is not None and given.here else guard_for(self._keywords, "requests")
        if guard is None or guard.at_the_door:
            return None
        app = self.app
        if guard.policy.refuses_memory:
            from oomsafe.wsgi.limited import Limited  # imported here, because most workers have no hard limit

            app = Limited(app, guard)
        self._hot = app, guard, self._headers, self._hot[3]
        return guard


def _room(guard: Guard, environ: Environ) -> bool:
    """Wait until there is memory for one more request, or until the longest wait is over. False: the request is to be refused."""
    waiting = Waiting(guard)
    while seconds := waiting.seconds():
        time.sleep(seconds)  # looked up in the module each time, because gevent replaces it
    return not guard.sheds or not guard.refuses(f"{environ.get('SCRIPT_NAME', '')}{environ.get('PATH_INFO', '')}")


def _shed(environ: Environ, start_response: Any) -> list[bytes]:
    from oomsafe.http.refusal import SHED  # imported here, because most workers never need it
    from oomsafe.wsgi import refusing

    refusing.start(SHED, start_response)
    return refusing.body(SHED, environ)


def _starting(shown: bool | str, environ: Environ, start_response: Any, work: Work) -> Any:
    """A start_response that records the route, and adds the memory headers, once, if the client may see them."""
    announce = shown and announces(shown, work, lambda: environ.get(TOKEN_WSGI))

    def start(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
        if "werkzeug.request" in environ:
            work.route = route_of(environ, work.route)
        if announce:  # a new list, because an app may pass the same one every time
            headers = [*headers, *headers_of(work).text]
        return start_response(status, headers) if exc_info is None else start_response(status, headers, exc_info)

    return start


def _ending(body: Iterable[bytes], work: Work, environ: Environ) -> Iterable[bytes]:
    """`body`, so that closing it ends the work. A body that the server must recognise by its type is returned unwrapped."""
    kind = type(body)
    wrapper = environ.get("wsgi.file_wrapper")
    if isinstance(wrapper, type) and isinstance(body, wrapper):
        _end_at_close(body, work)
        return body
    if not hasattr(kind, "__iter__") and not hasattr(kind, "__getitem__"):
        work.end()  # gevent's ALREADY_HANDLED: the app has answered on the socket itself
        return body
    return (SizedBody if hasattr(kind, "__len__") else Body)(body, work)


def _end_at_close(body: Any, work: Work) -> None:
    """End the work when a file wrapper is closed. The server uses sendfile for it, so only its close() is replaced, on the instance."""
    close, end = getattr(body, "close", None), End(work)

    def closing() -> None:
        try:
            if close is not None:
                close()
        finally:
            end()

    try:
        body.close = closing
    except AttributeError:
        work.end()  # a built-in type: it is sent after the work has ended for us


class End:
    """Ends the work when it is called or garbage-collected."""

    __slots__ = ("_work",)

    def __init__(self, work: Work) -> None:
        self._work = work

    def __call__(self) -> None:
        self._work.meter.end(self._work)

    __del__ = __call__


class _Ending:
    """A response body that ends the work when it is closed or garbage-collected: bridges from ASGI drop a body once it is sent."""

    __slots__ = ("_body", "_work")

    def __init__(self, body: Iterable[bytes], work: Work) -> None:
        self._body, self._work = body, work

    def close(self) -> None:
        """Close the body, once, and end the work."""
        body, work = self._body, self._work
        self.__class__ = Closed  # type: ignore[assignment]  # Closed has no __del__: calling that would double the cost
        try:
            close = getattr(body, "close", None)
            if close is not None:
                close()
        finally:
            self._body = ()
            work.meter.end(work)

    def __del__(self) -> None:
        self._work.meter.end(self._work)


class ListBody(_Ending):
    """A body whose parts exist already: the server may keep only the iterator while it sends them."""

    __slots__ = ()

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._body)

    def __len__(self) -> int:
        return len(self._body)  # type: ignore[arg-type]


class Body(_Ending):
    """A body whose parts come one by one. All other attributes are those of the app's own body."""

    __slots__ = ()

    def __iter__(self) -> Iterator[bytes]:
        # a server may keep only the iterator, so it holds a reference to this body until the last part; it is written in C, so that
        # a part costs nothing more
        return chain(self._body, repeat(self, 0))  # type: ignore[arg-type]

    def __bytes__(self) -> bytes:
        return bytes(self._body)  # type: ignore[arg-type]  # the content of a response object (Django's)

    def __getattr__(self, name: str) -> Any:
        if name in ("_body", "_work"):
            raise AttributeError(name)
        return getattr(self._body, name)


class SizedBody(Body):
    """A body with a number of parts: some servers set Content-Length if that is one."""

    __slots__ = ()

    def __len__(self) -> int:
        return len(self._body)  # type: ignore[arg-type]


class Closed:
    """A body that was closed: it has no parts."""

    __slots__ = ("_body", "_work")

    def __iter__(self) -> Iterator[bytes]:
        return iter(())

    def close(self) -> None:
        """Do nothing."""
