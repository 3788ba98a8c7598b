"""WSGI middleware: a request is in flight from the call until the server closes its body (PEP 3333), or forgets it.

What an app does in its body's close() is part of the request, so its end is not when the last part is sent. But bridges from
ASGI (uvicorn's own, Starlette's) never close a body: for them it ends when they are done with it.
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
from oomsafe.worker.current import guard_for
from oomsafe.worker.door import Waiting
from oomsafe.worker.guard import Guard
from oomsafe.worker.meter import Work
from oomsafe.wsgi.routes import Mounts, route_of

Environ = dict[str, Any]
WSGIApp = Callable[[Environ, Any], Iterable[bytes]]


class MemoryMiddleware:
    """Measures each request, and puts memory headers on its response where the policy says so.

    Keywords are those of Policy. They hold where no server adapter has made this process's guard;
    where one has, only `headers` does. Raises ConfigError.
    """

    def __init__(self, app: WSGIApp, *, guard: Guard | None = None, **policy: Any) -> None:
        self.app = app
        self._keywords = policy
        self._headers = (guard.policy if guard is not None else load_policy(os.environ, policy)[0]).headers
        self._given = guard
        # read at once: with __getattr__, an attribute costs a request three times as much
        self._hot: tuple[Guard | None, bool | str, Mounts] = (None, self._headers, Mounts(app))

    def __call__(self, environ: Environ, start_response: Any) -> Iterable[bytes]:
        app, (guard, headers, mounts) = self.app, self._hot
        work = environ.get(KEY)
        if work is not None:  # wrapped twice, counted once
            return app(environ, _starting(headers, environ, start_response, work))
        if guard is None or not guard.here:
            work = carried(environ, start_response)
            if work is not None:  # inside of an ASGI app that is wrapped
                environ[KEY] = work
                return app(environ, _starting(headers, environ, start_response, work))
            guard = self._find_guard()
            if guard is None:
                return app(environ, start_response)
        if guard.meter.crowded:
            _room(guard)
        # PEP 3333 wants a method; an app's own tests may leave out what the app does not look at
        name = f"{environ.get('REQUEST_METHOD', '')} {environ.get('SCRIPT_NAME', '')}{environ.get('PATH_INFO', '')}"
        work = environ[KEY] = guard.meter.begin(name.encode("latin-1", "replace"))
        start = _starting(headers, environ, start_response, work)
        try:
            body = app(environ, mounts.starting(start, environ, work) if mounts else start)
        except BaseException:
            work.end()
            raise
        kind = type(body)
        # most frameworks give a list
        return ListBody(body, work) if kind is list or kind is tuple else _ending(body, work, environ)

    def __getattr__(self, name: str) -> Any:
        """What the app has, for who looks for it on what is served."""
        if name == "app" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.app, name)

    def _find_guard(self) -> Guard | None:
        """None where nothing can be measured, or the request was counted before it came here."""
        given = self._given
        guard = given if given is not None and given.here else guard_for(self._keywords, "requests")
        if guard is None or guard.at_the_door:
            return None
        self._hot = guard, self._headers, self._hot[2]
        return guard


def _room(guard: Guard) -> None:
    """Wait until there is memory for one more request, or as long as one may wait."""
    waiting = Waiting(guard)
    while seconds := waiting.seconds():
        time.sleep(seconds)  # by its name: gevent replaces it


def _starting(shown: bool | str, environ: Environ, start_response: Any, work: Work) -> Any:
    """start_response that notes the route, and adds the memory headers, once, for who may see them."""
    announce = shown and announces(shown, work, lambda: environ.get(TOKEN_WSGI))

    def start(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
        if "werkzeug.request" in environ:
            work.route = route_of(environ, work.route)
        if announce:  # a new list: an app may give the same one every time
            headers = [*headers, *headers_of(work).text]
        return start_response(status, headers) if exc_info is None else start_response(status, headers, exc_info)

    return start


def _ending(body: Iterable[bytes], work: Work, environ: Environ) -> Iterable[bytes]:
    """`body`, ending the work when it is closed. What the server must recognise is handed on as it is."""
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
    """A file wrapper, for which the server calls sendfile: only its close() is replaced, on the instance."""
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
        work.end()  # a built-in type: sent after the work has ended for us


class End:
    """Ends the work when it is called or forgotten."""

    __slots__ = ("_work",)

    def __init__(self, work: Work) -> None:
        self._work = work

    def __call__(self) -> None:
        self._work.meter.end(self._work)

    __del__ = __call__


class _Ending:
    """A response body that ends the work when it is closed, or forgotten: bridges from ASGI let go of a body when it is sent."""

    __slots__ = ("_body", "_work")

    def __init__(self, body: Iterable[bytes], work: Work) -> None:
        self._body, self._work = body, work

    def close(self) -> None:
        """Close the body, once, and end the work."""
        body, work = self._body, self._work
        self.__class__ = Closed  # type: ignore[assignment]  # which has no __del__: to call that would cost twice as much
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
    """Of parts that are there already: while they are sent, it need not be."""

    __slots__ = ()

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._body)

    def __len__(self) -> int:
        return len(self._body)  # type: ignore[arg-type]


class Body(_Ending):
    """Of parts that come one by one. For the rest it is the app's own."""

    __slots__ = ()

    def __iter__(self) -> Iterator[bytes]:
        # who iterates may keep the iterator alone: it has this body until the last part, and is C's, so a part costs nothing more
        return chain(self._body, repeat(self, 0))  # type: ignore[arg-type]

    def __bytes__(self) -> bytes:
        return bytes(self._body)  # type: ignore[arg-type]  # of a response object (Django's), its content

    def __getattr__(self, name: str) -> Any:
        if name in ("_body", "_work"):
            raise AttributeError(name)
        return getattr(self._body, name)


class SizedBody(Body):
    """A body that says how many parts it has: some servers set Content-Length when it is one."""

    __slots__ = ()

    def __len__(self) -> int:
        return len(self._body)  # type: ignore[arg-type]


class Closed:
    """A body that is closed: nothing is left of it."""

    __slots__ = ("_body", "_work")

    def __iter__(self) -> Iterator[bytes]:
        return iter(())

    def close(self) -> None:
        """Changes nothing."""
