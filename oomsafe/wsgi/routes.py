"""The names under which requests of WSGI apps are counted: ``GET /api/items/<item_id>``, including the path of mounts.

Flask (werkzeug) leaves its request in environ, with the rule that it chose; our Django middleware reports Django's route. SCRIPT_NAME
holds the path at which an app is mounted (werkzeug's DispatcherMiddleware), but also prefixes that a client may have sent: only the
app's known mounts count.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from oomsafe.http.carrier import KEY
from oomsafe.log import attempt
from oomsafe.policy.routes import METHODS, label
from oomsafe.scoreboard.layout import UNMATCHED
from oomsafe.worker.meter import Work

#: Attributes in which a WSGI app keeps the app that it wraps.
WRAPPED = ("app", "wsgi_app", "application", "wrap_app", "__wrapped__")

#: How many levels of wrappers are searched for mounts.
DEPTH = 10

_listens = False


class Mounts(frozenset[str]):
    """The paths at which an app mounts other apps, as SCRIPT_NAME shows them below the server's own."""

    def __new__(cls, app: Any) -> Mounts:
        """The mounts of `app` that can be found."""
        found: set[str] = set()
        attempt("the mounts of the app", "the server", lambda: _find_mounts(app, "", 0, found))
        return super().__new__(cls, found)

    def starting(self, start_response: Any, environ: dict[str, Any], work: Work) -> Any:
        """A start_response that adds the mount to the route, for a request that has not reached its mount yet."""
        above = environ.get("SCRIPT_NAME", "")

        def start(*arguments: Any) -> Any:
            written = start_response(*arguments)
            script = environ.get("SCRIPT_NAME", "")
            if script != above and script.startswith(above) and script[len(above) :] in self:
                work.route = _below(script[len(above) :], environ, work.route)
            return written

        return start


class Views:
    """The view functions of the Flask apps in a WSGI app."""

    def __init__(self, app: Any) -> None:
        self._app = app

    def called(self) -> Iterator[tuple[Any, str]]:
        """(view, route) for each of their rules."""
        for flask, prefix in _flasks(self._app, "", 0):
            for rule in flask.url_map.iter_rules():
                view = flask.view_functions.get(rule.endpoint)
                for method in getattr(rule, "methods", None) or METHODS if callable(view) else ():
                    name = _name_of(rule, method)
                    yield view, name if not prefix or name is UNMATCHED else f"{method} {prefix}{name[len(method) + 1 :]}"


def _flasks(app: Any, prefix: str, depth: int) -> Iterator[tuple[Any, str]]:
    """The Flask apps in `app`, and the path at which each is mounted."""
    own = getattr(app, "__dict__", None)
    if depth > DEPTH or not isinstance(own, dict):
        return
    if "url_map" in own and isinstance(own.get("view_functions"), dict):
        yield app, prefix
    mounts = own.get("mounts")
    for path, mounted in mounts.items() if isinstance(mounts, dict) else ():
        if isinstance(path, str):
            yield from _flasks(mounted, prefix + path, depth + 1)
    for name in WRAPPED:
        wrapped = own.get(name)
        if callable(wrapped):
            # of a method, such as Flask's own wsgi_app, it is the object that counts
            inner = getattr(wrapped, "__self__", wrapped)
            if inner is not app:
                yield from _flasks(inner, prefix, depth + 1)


def _below(mount: str, environ: dict[str, Any], route: str) -> str:
    """The name of a route of an app that is mounted at `mount`."""
    method = environ.get("REQUEST_METHOD", "")
    if route is UNMATCHED:  # an app with routes found none that matches
        return route if "werkzeug.request" in environ else label(method, f"{mount}/<path>") or UNMATCHED
    within = f"{method} {mount}/"
    return route if route.startswith(within) or not route.startswith(f"{method} /") else within + route[len(method) + 2 :]


def _find_mounts(app: Any, prefix: str, depth: int, found: set[str]) -> None:
    own = getattr(app, "__dict__", None)
    if depth > DEPTH or not isinstance(own, dict):
        return
    mounts = own.get("mounts")
    for path, mounted in mounts.items() if isinstance(mounts, dict) else ():
        if isinstance(path, str) and path.startswith("/"):
            found.add(prefix + path)
            _find_mounts(mounted, prefix + path, depth + 1, found)
    for name in WRAPPED:
        if callable(own.get(name)):
            _find_mounts(own[name], prefix, depth + 1, found)


def route_of(environ: dict[str, Any], known: str) -> str:
    """The name of a werkzeug request whose response starts; `known` is its name so far, or UNMATCHED."""
    request = environ["werkzeug.request"]
    if request is None and known is UNMATCHED:
        _listen_to_flask()
    rule = getattr(request, "url_rule", None)
    return known if rule is None else _name_of(rule, environ.get("REQUEST_METHOD", ""))


def _name_of(rule: Any, method: str) -> str:
    return label(method, rule.rule, getattr(rule, "methods", None)) or UNMATCHED


def _listen_to_flask() -> None:
    """Have Flask report its route before the response starts.

    Some wrappers (newrelic's agent) start the response only with its first part, when Flask has removed the request from environ.
    """
    global _listens
    if not _listens:
        _listens = True
        attempt("listening to Flask", "the server", lambda: sys.modules["flask"].request_started.connect(_note, weak=False))


def _note(_sender: Any, **_: Any) -> None:
    request = sys.modules["flask"].request
    work, rule = request.environ.get(KEY), request.url_rule
    if work is not None and rule is not None:
        work.route = _name_of(rule, request.environ.get("REQUEST_METHOD", ""))
