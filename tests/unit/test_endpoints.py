"""Which lines belong to which route: functions behind decorators, classes, FastAPI's dependencies, Flask's mounts, Django's includes."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from oomsafe.asgi.routes import RouteNames
from oomsafe.worker.endpoints import endpoints_of
from oomsafe.wsgi.routes import Views


def logged(function: Any) -> Any:
    @functools.wraps(function)
    def around(*arguments: Any) -> Any:
        return function(*arguments)

    return around


@logged
@logged
def view() -> Any:
    """Behind two decorators."""

    def inner() -> int:
        return 1

    return [inner() for _ in range(2)]


class Resource:
    """By method."""

    def get(self) -> int:
        """GET."""
        return self.shared()

    def post(self) -> int:
        """POST."""
        return 2

    def shared(self) -> int:
        """Of both."""
        return 3


class Child(Resource):
    """It has one of its own."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """An ASGI app."""


def lines_of(*pairs: tuple[Any, str]) -> dict[str, set[str]]:
    """The route, and what the lines of its functions are."""
    text = Path(__file__).read_text().splitlines()
    found: dict[str, set[str]] = {}
    for endpoint in endpoints_of(pairs):
        assert endpoint.file == __file__
        found.setdefault(endpoint.route, set()).update(text[endpoint.first - 1 : endpoint.last])
    return found


def test_a_function_with_what_is_inside_of_it() -> None:
    """Not its decorators, which serve other routes, too."""
    (lines,) = lines_of((view, "GET /")).values()

    assert "    def inner() -> int:" in lines
    assert "    return [inner() for _ in range(2)]" in lines
    assert "        return function(*arguments)" not in lines


def test_a_partial_and_a_method() -> None:
    """Each is its function."""
    assert "    return [inner() for _ in range(2)]" in lines_of((functools.partial(view), "GET /"))["GET /"]
    assert "        return 2" in lines_of((Resource().post, "POST /"))["POST /"]


def test_a_class_serves_a_method_by_the_function_of_its_name() -> None:
    """What is neither serves all."""
    found = lines_of((Resource, "GET /"), (Resource, "POST /"))

    assert "        return self.shared()" in found["GET /"] - found["POST /"]
    assert "        return 2" in found["POST /"] - found["GET /"]
    assert "        return 3" in found["GET /"] & found["POST /"]


def test_what_has_no_code_of_pythons() -> None:
    """A built-in, or nothing that can be called."""
    assert endpoints_of([(len, "GET /"), (3, "GET /"), (int, "GET /")]) == []


def test_fastapi() -> None:
    """Endpoints, in included routers and mounted apps, and dependencies; by the routes' whole names."""
    from fastapi import APIRouter, Depends, FastAPI

    def dependency() -> int:
        return 1

    def items(one: int = Depends(dependency)) -> int:
        return one

    async def mounted() -> int:
        return 2

    router, inner, app, names = APIRouter(), FastAPI(), FastAPI(), RouteNames()
    router.add_api_route("/items/{item}", items, methods=["GET", "POST"])
    inner.add_api_route("/in", mounted)
    app.include_router(router, prefix="/api")
    app.mount("/sub", inner)
    for path in ("/api/items/1", "/sub/in"):
        scope = {"type": "http", "method": "GET", "path": path, "root_path": "", "headers": [], "router": app.router}
        for route in app.router.routes:
            match, child = route.matches(scope)
            if match.value == 2:
                names.find({**scope, **child}, child.get("route") or child.get("endpoint") or route, "unmatched")

    called = {(getattr(function, "__name__", ""), route) for function, route in names.called()}
    assert {("items", "GET /api/items/{item}"), ("items", "POST /api/items/{item}"), ("dependency", "GET /api/items/{item}")} <= called
    assert ("mounted", "GET /sub/in") in called


def test_flask() -> None:
    """The views of the app, and of one that is mounted, inside of wrappers."""
    from flask import Flask
    from werkzeug.middleware.dispatcher import DispatcherMiddleware
    from werkzeug.middleware.proxy_fix import ProxyFix

    app, shop = Flask("app"), Flask("shop")
    app.add_url_rule("/items/<item>", "view", view)
    shop.add_url_rule("/cart", "cart", view, methods=["POST"])
    whole = ProxyFix(DispatcherMiddleware(app, {"/shop": shop}))

    called = {(getattr(function, "__wrapped__", function), route) for function, route in Views(whole).called()}
    routes = {route for _, route in called}
    assert {"GET /items/<item>", "POST /shop/cart"} <= routes
    assert "POST /items/<item>" not in routes
