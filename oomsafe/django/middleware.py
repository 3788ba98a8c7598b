"""Django middleware: a request is in flight until its response is closed, and is counted under its URL pattern.

Under oomsafe's WSGI or ASGI middleware, which gunicorn's adapter puts around the app, the request is
counted already. Then this middleware only adds what Django alone knows: the route.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

from asgiref.sync import iscoroutinefunction, markcoroutinefunction
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured

from oomsafe.errors import ConfigError
from oomsafe.http.carrier import KEY, carried
from oomsafe.http.headers import TOKEN_WSGI, announces, headers_of
from oomsafe.log import failed, log, once
from oomsafe.policy.routes import label
from oomsafe.policy.settings import Policy, load_policy, misplaced
from oomsafe.scoreboard.layout import UNMATCHED
from oomsafe.worker.current import guard_for, knows_routes
from oomsafe.worker.guard import Guard
from oomsafe.worker.meter import Work

if TYPE_CHECKING:
    from django.http import HttpRequest
    from django.http.response import HttpResponseBase

#: How to give a setting.
INSTEAD = 'write OOMSAFE = {{"{field}": ...}}, or set {variable} in the environment of the server'


class MemoryMiddleware:
    """Measures each request, names its route, and puts memory headers on its response if the policy says so.

    The setting OOMSAFE is a dict of Policy's keywords. If a server adapter has made this process's
    guard, only `headers` is used and the others are ignored. Raises ImproperlyConfigured. List this middleware first:
    middleware before it is not measured, and a cache before it would store its headers.
    """

    sync_capable = True
    async_capable = True

    def __init__(self, get_response: Callable[[HttpRequest], Any]) -> None:
        self._keywords, policy = _configured()
        for line in misplaced(dir(settings), "the settings", INSTEAD):
            log.warning("%s", line)
        self._headers = policy.headers
        self._ignored = sorted(set(self._keywords) - {"headers"})
        self._guard: Guard | None = None
        knows_routes(self)
        self.get_response = get_response
        self._async = bool(iscoroutinefunction(get_response))
        if self._async:
            markcoroutinefunction(self)

    def __call__(self, request: HttpRequest) -> HttpResponseBase | Awaitable[HttpResponseBase]:
        if self._async:
            return self._later(request)
        work, ours = self._begin(request)
        response = None
        try:
            response = self.get_response(request)
        finally:
            self._answered(request, response, work, ours)
        return response

    def called(self) -> Iterable[tuple[Any, str]]:
        """(view, route) for each URL pattern."""
        from oomsafe.django.views import views  # imported here, because only a worker that is probed needs it

        return views()

    async def _later(self, request: HttpRequest) -> HttpResponseBase:
        work, ours = self._begin(request)
        response = None
        try:
            response = await self.get_response(request)
        finally:
            self._answered(request, response, work, ours)
        return response

    def _begin(self, request: HttpRequest) -> tuple[Work | None, bool]:
        """The request's Work (None if it can't be measured here), and whether this middleware must end it."""
        try:
            carrier = _carrier(request)
            work = carrier.get(KEY) or carried(carrier)
            if work is not None:
                self._say_ignored(work)
                return work, False
            guard = self._guard
            if guard is None or not guard.here:
                guard = self._guard = guard_for(self._keywords, "requests")
            if guard is None or guard.at_the_door:  # the request came over a bridge that hides its scope
                return None, False
            work = carrier[KEY] = guard.meter.begin(f"{request.method} {request.path}".encode("utf-8", "replace"))
            return work, True
        except Exception as error:
            self._failed("begin", error)
            return None, False

    def _answered(self, request: HttpRequest, response: Any, work: Work | None, ours: bool) -> None:
        """The view has returned, or raised if `response` is None; the body may not have been sent yet."""
        if work is None:
            return
        try:
            match = request.resolver_match
            if match is not None:  # the pattern, never the path: a client could make up any number
                work.route = label(request.method or "", f"/{match.route.removeprefix('/')}") or UNMATCHED
            if response is not None:
                if ours:
                    response._resource_closers.append(End(work))
                    ours = False
                self._announce(request, response, work)
        except Exception as error:
            self._failed("response", error)
        if ours:
            work.end()

    def _announce(self, request: HttpRequest, response: HttpResponseBase, work: Work) -> None:
        """Add the memory headers, once, if the client may see them."""
        if not announces(self._headers, work, lambda: request.META.get(TOKEN_WSGI)):
            return
        headers = response.headers
        for name, figure in headers_of(work).text:
            # Server-Timing is a list that other code may have begun, and Django keeps one header for each name
            theirs = headers.get(name) if name == "Server-Timing" else None
            headers[name] = f"{theirs}, {figure}" if theirs else figure

    def _say_ignored(self, work: Work) -> None:
        """Log which settings are ignored: a limit without effect must not go unnoticed."""
        if self._ignored:
            ignored, self._ignored = ", ".join(self._ignored), []
            once("keywords", logging.WARNING, "OOMSAFE: %s ignored, because this process is guarded already", ignored)

    def _failed(self, what: str, error: Exception) -> None:
        failed(what, "Django", error)


class End:
    """Ends the work when the response is closed or garbage-collected.

    Django's ASGI handler does not close a response whose body fails, and a middleware that answers
    with another response does not close the first one.
    """

    __slots__ = ("_work",)

    def __init__(self, work: Work | None) -> None:
        self._work = work

    def __call__(self) -> None:
        if self._work is not None:
            self._work.end()

    __del__ = __call__

    def __reduce__(self) -> tuple[type[End], tuple[None]]:
        # Django's cache pickles responses with their closers: a copy that is served later must not end anything
        return End, (None,)


def _configured() -> tuple[dict[str, Any], Policy]:
    """The setting OOMSAFE, and the policy that it gives together with the environment."""
    given = getattr(settings, "OOMSAFE", {})
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise ImproperlyConfigured("oomsafe: the setting OOMSAFE must be a dict of settings by name, such as {'soft_limit': '300MiB'}")
    keywords = dict(given)
    try:
        policy, _ = load_policy(os.environ, keywords)
    except ConfigError as error:
        raise ImproperlyConfigured(f"oomsafe: {error}") from None
    return keywords, policy


def _carrier(request: HttpRequest) -> MutableMapping[str, Any]:
    """What the request shares with the middleware around Django: the WSGI environ, or the ASGI scope."""
    carrier: MutableMapping[str, Any] = request.META if hasattr(request, "environ") else getattr(request, "scope", request.META)
    return carrier
