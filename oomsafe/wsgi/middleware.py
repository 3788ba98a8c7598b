"""WSGI middleware: a request is in flight from the call until the server closes its body (PEP 3333)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from oomsafe.policy.headers import TOKEN_WSGI, may_see
from oomsafe.policy.settings import load_policy
from oomsafe.pool.current import KEY, guard_for
from oomsafe.pool.guard import Guard
from oomsafe.pool.layout import UNMATCHED
from oomsafe.pool.meter import Work

Environ = dict[str, Any]
WSGIApp = Callable[[Environ, Any], Iterable[bytes]]


class MemoryMiddleware:
    """Measures each request, and puts memory headers on its response where the policy says so.

    Keywords are those of Policy. They hold where no server adapter has made this process's guard;
    where one has, only `headers` does. Raises ConfigError.
    """

    def __init__(self, app: WSGIApp, *, guard: Guard | None = None, **policy: Any) -> None:
        checked, _ = load_policy(os.environ, policy)
        self.app = app
        self._keywords = policy
        self._headers = guard.policy.headers if guard else checked.headers
        self._guard = guard

    def __call__(self, environ: Environ, start_response: Any) -> Iterable[bytes]:
        work = environ.get(KEY)
        if work is not None:  # wrapped twice, counted once
            return self.app(environ, self._starting(environ, start_response, work))
        guard = self._guard
        if guard is None or not guard.here:
            guard = self._guard = guard_for(self._keywords, "requests")
        if guard is None:
            return self.app(environ, start_response)
        name = f"{environ['REQUEST_METHOD']} {environ.get('SCRIPT_NAME', '')}{environ.get('PATH_INFO', '')}"
        work = environ[KEY] = guard.begin(name.encode("latin-1", "replace"))
        try:
            body = self.app(environ, self._starting(environ, start_response, work))
        except BaseException:
            work.end()
            raise
        return _ending(body, work, environ)

    def _starting(self, environ: Environ, start_response: Any, work: Work) -> Any:
        """start_response that notes the route, and adds the memory headers, once, for who may see them."""
        headers = self._headers
        announce = headers and not work.announced and (headers is True or may_see(headers, environ.get(TOKEN_WSGI)))
        if announce:
            work.announced = True

        def start(status: str, headers: list[tuple[str, str]], *exc_info: Any) -> Any:
            if "werkzeug.request" in environ:
                work.route = _route(environ["werkzeug.request"])
            # a new list: an app may give the same one every time
            return start_response(status, [*headers, *work.meter.headers(work)[0]] if announce else headers, *exc_info)

        return start


def _ending(body: Iterable[bytes], work: Work, environ: Environ) -> Iterable[bytes]:
    """`body`, ending the work when it is closed. What the server must recognise is handed on as it is."""
    kind = type(body)
    if kind is list or kind is tuple:  # what most frameworks give
        return SizedBody(body, work)
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
    close = getattr(body, "close", None)

    def closing() -> None:
        try:
            if close is not None:
                close()
        finally:
            work.end()

    try:
        body.close = closing
    except AttributeError:
        work.end()  # a built-in type: sent after the work has ended for us


class Body:
    """A response body whose close() ends the work. Iterating costs nothing more: the server gets the body's own iterator."""

    __slots__ = ("_body", "_work")

    def __init__(self, body: Iterable[bytes], work: Work) -> None:
        self._body, self._work = body, work

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._body)

    def close(self) -> None:
        """Close the body, once, and end the work."""
        body, self._body = self._body, ()
        try:
            close = getattr(body, "close", None)
            if close is not None:
                close()
        finally:
            self._work.meter.end(self._work)


class SizedBody(Body):
    """A body that says how many parts it has: some servers set Content-Length when it is one."""

    __slots__ = ()

    def __len__(self) -> int:
        return len(self._body)  # type: ignore[arg-type]


def _route(request: Any) -> str:
    """The route as Flask has it, with its parameters' names; never the path: a client could make up any number.

    It must be asked for while the response starts: Flask takes the request out of environ when it ends.
    """
    rule = getattr(getattr(request, "url_rule", None), "rule", None)
    return rule if type(rule) is str else UNMATCHED
