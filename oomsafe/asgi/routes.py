"""The names under which requests of Starlette and FastAPI are counted: ``GET /api/items/{item_id}``, including the path of mounts.

A router records which route it chose, but for a mount only the path that the client sent. So the names are built in advance:
the app's routers are walked once, and each route is later found by the identity of its object.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, MutableMapping
from typing import Any, NamedTuple

from oomsafe.log import attempt
from oomsafe.policy.routes import METHODS
from oomsafe.scoreboard.layout import UNMATCHED

#: How often the routers are walked, again for each route that was not found before; and how many objects are remembered.
WALKS, KEPT = 16, 20_000

#: How many levels of routers in routers, and of middleware in middleware, are searched.
DEPTH = 8

#: Stands for the rest of a path for which a mounted app gave no name.
REST = "/{path}"


class Leaf(NamedTuple):
    """Something that a router can choose, with its full path from outside."""

    taken: tuple[Any, ...]
    """The objects that the scope may hold for it: the route, and its endpoint."""
    path: str
    methods: frozenset[str]


class RouteNames(dict[int, dict[str, str]]):
    """The name of a request, by the id of the chosen route or endpoint and by method. find() adds missing ones."""

    def __init__(self) -> None:
        super().__init__()
        self._several: dict[int, list[tuple[re.Pattern[str], Leaf]]] = {}
        """Objects with more than one path, such as an app that is mounted twice."""
        self._walks = 0
        self._kept: list[Any] = []
        """References that keep the objects alive, so that no other object gets their ids."""

    __hash__ = object.__hash__  # type: ignore[assignment]  # each is one of its own

    def called(self) -> Iterator[tuple[Any, str]]:
        """(function or class, route) for each route that was found: its endpoint, and FastAPI's dependencies of it."""
        for taken in {id(kept): kept for kept in self._kept}.values():
            names = list(self.get(id(taken), {}).values())
            names += [f"{method} {leaf.path}" for _, leaf in self._several.get(id(taken), ()) for method in leaf.methods]
            endpoint = getattr(taken, "endpoint", None)
            if endpoint is None and getattr(taken, "routes", None) is None:
                endpoint = taken
            dependencies = _dependencies(getattr(taken, "dependant", None), 0)
            yield from ((called, name) for called in filter(callable, [endpoint, *dependencies]) for name in names)

    def find(self, scope: MutableMapping[str, Any], taken: Any, inner: str) -> str:
        """The name of a request whose router chose `taken`; `inner` is the name that a mounted app found, or UNMATCHED. Never raises.

        A method that the route does not have gives UNMATCHED, because a client could send any.
        """
        return attempt("the name of a route", "the server", lambda: self._find(scope, taken, inner)) or inner

    def _find(self, scope: MutableMapping[str, Any], taken: Any, inner: str) -> str:
        if id(taken) not in self and id(taken) not in self._several:
            self._meet(scope.get("router"), taken)
        method = scope.get("method", "")
        name = self.get(id(taken), {}).get(method)
        if name is None:
            path, root = scope.get("path", ""), scope.get("app_root_path", scope.get("root_path", ""))
            path = path[len(root) :] if path.startswith(root) else path
            leaves = self._several.get(id(taken), ())
            leaf = next((leaf for pattern, leaf in leaves if method in leaf.methods and pattern.fullmatch(path)), None)
            name = UNMATCHED if leaf is None else f"{method} {leaf.path}"
        if inner is UNMATCHED:
            return name
        # the mounted app named the rest of the path
        return f"{name[: -len(REST)]}{inner[len(method) + 1 :]}" if name.endswith(REST) and inner.startswith(f"{method} /") else inner

    def _meet(self, router: Any, taken: Any) -> None:
        """Learn the name of an object that is new here. One that is in no router gets its own path, without the mounts before it."""
        if len(self._kept) > KEPT:
            return
        self._walks += 1
        if self._walks <= WALKS:
            self._learn(_leaves(getattr(router, "routes", ()), "", 0))
        if id(taken) not in self and id(taken) not in self._several:
            path, methods = getattr(taken, "path", None), getattr(taken, "methods", None) or METHODS
            self._learn([Leaf((taken,), path, frozenset(methods)) if type(path) is str else Leaf((taken,), "", frozenset())])

    def _learn(self, leaves: Iterable[Leaf]) -> None:
        found: dict[int, list[Leaf]] = {}
        for leaf in leaves:
            for taken in leaf.taken:
                self._kept.append(taken)
                found.setdefault(id(taken), []).append(leaf)
        for key, named in found.items():
            if len({leaf.path for leaf in named}) == 1:
                self[key] = {method: f"{method} {leaf.path}" for leaf in named for method in leaf.methods}
            else:
                self.pop(key, None)
                self._several[key] = [(_pattern(leaf.path), leaf) for leaf in named]


def _leaves(routes: Any, prefix: str, depth: int) -> Iterator[Leaf]:
    for route in tuple(routes or ()) if depth < DEPTH else ():
        included = getattr(route, "effective_route_contexts", None)  # FastAPI's include_router, since 0.13x
        for context in included() if included is not None else ():
            yield from _leaf(context.original_route, getattr(context, "starlette_route", None) or context, prefix, depth)
        if included is None:
            yield from _leaf(route, route, prefix, depth)


def _leaf(taken: Any, route: Any, prefix: str, depth: int) -> Iterator[Leaf]:
    """The leaves of one route. `route` has the effective path, `taken` is the object that the scope will hold."""
    own = getattr(route, "path", "")  # a Host has none
    path = f"{prefix}{own}" if type(own) is str else prefix
    app = getattr(route, "app", None)
    inner = _routes_of(route, app) if not hasattr(route, "endpoint") else None
    if inner is None:
        endpoint, methods = getattr(route, "endpoint", None), getattr(route, "methods", None)
        yield Leaf((taken, endpoint) if endpoint is not None else (taken,), path or "/", frozenset(methods or METHODS))
    else:
        yield Leaf((taken, app), path + REST, frozenset(METHODS))
        yield from _leaves(inner, path, depth + 1)


def _dependencies(dependant: Any, depth: int) -> Iterator[Any]:
    """What FastAPI calls before an endpoint, in whatever thread."""
    for one in getattr(dependant, "dependencies", ()) if depth < DEPTH else ():
        yield getattr(one, "call", None)
        yield from _dependencies(one, depth + 1)


def _routes_of(mount: Any, app: Any) -> Any:
    """The routes of a mounted app, inside its middleware; empty if it has none."""
    routes = getattr(mount, "routes", None)
    for _ in range(DEPTH):
        if routes or app is None:
            break
        routes = getattr(app, "routes", None)
        app = getattr(app, "app", None)
    return routes or ()


def _pattern(template: str) -> re.Pattern[str]:
    """A pattern that matches the paths of this template: ``{name}``, ``{name:path}``."""
    parts = re.split(r"(\{[^}]*\})", template)
    return re.compile("".join(_part(part) for part in parts), re.DOTALL)


def _part(part: str) -> str:
    if not part.startswith("{"):
        return re.escape(part)
    return ".*" if part.endswith(":path}") or part == REST[1:] else "[^/]+"
