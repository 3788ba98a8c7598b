"""The names under which requests are counted: a method and a route, with all mounts before it, and never what a client sent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flask
import pytest
from a2wsgi import WSGIMiddleware
from django.core.handlers.asgi import ASGIHandler
from django.core.handlers.wsgi import WSGIHandler
from fastapi import APIRouter, FastAPI
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.middleware.gzip import GZipMiddleware
from starlette.responses import PlainTextResponse
from starlette.routing import Host, Mount, Route, Router
from starlette.staticfiles import StaticFiles
from unit.django_project import new_guard
from unit.test_asgi import call, hello, scope
from unit.test_wsgi import Server, environ
from versions import names_routes
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.middleware.proxy_fix import ProxyFix

import oomsafe.asgi
import oomsafe.wsgi
from oomsafe.policy.routes import METHODS, label
from oomsafe.worker.guard import Guard

HERE = Path(__file__)


@pytest.fixture
def guard() -> Guard:
    """This process's."""
    return new_guard()


def names(guard: Guard) -> list[str]:
    """What was counted since the last call."""
    found = list(guard.meter.counters.routes)
    guard.meter.counters.routes.clear()
    guard.meter._routes.clear()
    return found


def said(request: Any) -> PlainTextResponse:
    """An endpoint."""
    return PlainTextResponse("x")


def starlette(guard: Guard) -> Any:
    """Mounts of all kinds."""
    deep = Mount("/more", routes=[Route("/{x:int}", said)])
    sub = Starlette(routes=[Route("/deep/{name}", said), Route("/", said, methods=["GET", "POST"]), deep])
    return Starlette(
        routes=[
            Route("/users/{user:int}", said),
            Mount("/sub/{tenant}", app=sub),
            Mount("/a", app=sub),
            Mount("/wrapped", app=GZipMiddleware(GZipMiddleware(Starlette(routes=[Route("/in/{x}", said)])))),
            Mount("/static", StaticFiles(directory=HERE.parent)),
            Mount("/flask", app=WSGIMiddleware(oomsafe.wsgi.MemoryMiddleware(flask_app(), guard=guard))),
            Mount("/django", app=ASGIHandler()),
            Mount("/plain", app=hello),
            Host("{tenant}.example.org", app=Router(routes=[Route("/hosted/{x}", said)])),
        ]
    )


def fastapi(guard: Guard) -> Any:
    """Routers that are included, and apps that are mounted, one of them twice."""
    items = APIRouter(prefix="/items")

    @items.get("/{item_id}")
    def get_item(item_id: int) -> int:
        return item_id

    @items.post("/{item_id}")
    def set_item(item_id: int) -> int:
        return item_id

    versioned = APIRouter(prefix="/v1")
    versioned.include_router(items)
    below = FastAPI()

    @below.get("/x/{y}")
    def y(y: int) -> int:
        return y

    app = FastAPI()
    for prefix in ("/api", "/latest"):
        app.include_router(versioned, prefix=prefix)
        app.mount(f"{prefix}-below", below)
    app.mount("/static", StaticFiles(directory=HERE.parent))
    return app


def flask_app() -> flask.Flask:
    """With a blueprint."""
    app = flask.Flask("test")
    blueprint = flask.Blueprint("users", "users", url_prefix="/users")
    blueprint.add_url_rule("/<int:user>", view_func=lambda user: f"{user}", methods=["GET", "PUT"], endpoint="user")
    app.register_blueprint(blueprint)
    return app


OF_STARLETTE = [
    ("GET", "/users/1", "GET /users/{user:int}"),
    ("HEAD", "/users/1", "HEAD /users/{user:int}"),
    ("POST", "/users/1", "unmatched"),
    ("BREW", "/users/1", "unmatched"),
    ("GET", "/nothing", "unmatched"),
    ("GET", "/sub/acme/deep/x", "GET /sub/{tenant}/deep/{name}"),
    ("POST", "/sub/acme/", "POST /sub/{tenant}/"),
    ("GET", "/sub/acme/more/3", "GET /sub/{tenant}/more/{x:int}"),
    ("GET", "/a/deep/x", "GET /a/deep/{name}"),
    ("GET", "/a/more/3", "GET /a/more/{x:int}"),
    ("BREW", "/a/deep/x", "unmatched"),
    ("GET", "/sub/acme/nothing", "GET /sub/{tenant}/{path}"),
    ("GET", "/wrapped/in/x", "GET /wrapped/in/{x}"),
    ("GET", f"/static/{HERE.name}", "GET /static/{path}"),
    ("GET", "/static/nothing", "GET /static/{path}"),
    ("BREW", "/static/nothing", "unmatched"),
    ("PUT", "/flask/users/7", "PUT /flask/users/<int:user>"),
    ("GET", "/flask/nothing", "GET /flask/{path}"),
    ("GET", "/django/users/1/", "GET /django/users/<int:user>/"),
    ("PATCH", "/plain/x", "PATCH /plain/{path}"),
]
OF_FASTAPI = [
    ("GET", "/api/v1/items/3", "GET /api/v1/items/{item_id}"),
    ("POST", "/latest/v1/items/3", "POST /latest/v1/items/{item_id}"),
    ("GET", "/api/v1/items/x", "GET /api/v1/items/{item_id}"),
    ("DELETE", "/api/v1/items/3", "unmatched"),
    ("GET", "/api/v1/nothing", "unmatched"),
    ("GET", "/api-below/x/1", "GET /api-below/x/{y}"),
    ("GET", "/latest-below/x/1", "GET /latest-below/x/{y}"),
    ("GET", f"/static/{HERE.name}", "GET /static/{path}"),
    ("GET", "/openapi.json", "GET /openapi.json"),
]


@pytest.mark.parametrize("root", ["", "/proxied"])
@pytest.mark.parametrize(("make", "expected"), [(starlette, OF_STARLETTE), (fastapi, OF_FASTAPI)])
def test_asgi(guard: Guard, make: Callable[[Guard], Any], expected: list[tuple[str, str, str]], root: str) -> None:
    """Each twice: when its route is met for the first time, and when it is known. What is before the app itself is not the app's."""
    app = oomsafe.asgi.MemoryMiddleware(make(guard), guard=guard)

    for method, path, name in [*expected, *reversed(expected)]:
        call(app, {**scope(f"{root}{path}"), "method": method, "root_path": root})
        assert (method, path, names(guard)) == (method, path, [name])


def test_a_host_and_a_route_that_comes_later(guard: Guard) -> None:
    """A host is no part of the name. Routes that are added while the app serves are found."""
    names_routes()  # all of them have one endpoint
    inner: Any = starlette(guard)
    app = oomsafe.asgi.MemoryMiddleware(inner, guard=guard)

    call(app, scope("/hosted/1", headers=[(b"host", b"a.example.org")]))
    assert names(guard) == ["GET /hosted/{x}"]
    for number in range(40):
        inner.router.routes.insert(0, Mount(f"/late-{number}", routes=[Route("/{x}", said)]))
        call(app, scope(f"/late-{number}/x"))
        # at the end without its mount: routers are not walked for ever
        assert names(guard) == [f"GET /late-{number}/{{x}}" if number < 15 else "GET /{x}"]


def dispatched() -> Any:
    """Apps mounted in apps, the usual way and with others between."""
    two = flask_app()
    two.wsgi_app = DispatcherMiddleware(two.wsgi_app, {"/deeper": flask_app()})  # type: ignore[method-assign]
    mounts = {"/two": ProxyFix(two, x_prefix=1), "/plain": plain, "/django": WSGIHandler()}
    return ProxyFix(DispatcherMiddleware(flask_app(), mounts), x_prefix=1)


def plain(_: Any, start_response: Any) -> list[bytes]:
    """An app without routes."""
    start_response("200 OK", [])
    return [b"x"]


@pytest.mark.parametrize("script", ["", "/served"])
def test_wsgi(guard: Guard, script: str) -> None:
    """What is before the app itself, and what a client says that is, is not the app's; what is no mount is not taken for one."""
    app = oomsafe.wsgi.MemoryMiddleware(dispatched(), guard=guard)

    for method, path, name in (
        ("GET", "/users/1", "GET /users/<int:user>"),
        ("PUT", "/users/1", "PUT /users/<int:user>"),
        ("DELETE", "/users/1", "unmatched"),
        ("GET", "/two/users/1", "GET /two/users/<int:user>"),
        ("GET", "/two/deeper/users/1", "GET /two/deeper/users/<int:user>"),
        ("GET", "/two/nothing", "unmatched"),
        ("GET", "/plain/x", "GET /plain/<path>"),
        ("BREW", "/plain/x", "unmatched"),
        ("GET", "/django/users/1/", "GET /django/users/<int:user>/"),
    ):
        Server().get(app, environ(path, SCRIPT_NAME=script, REQUEST_METHOD=method))
        assert (path, names(guard)) == (path, [name])
    Server().get(app, environ("/users/1", SCRIPT_NAME=script, HTTP_X_FORWARDED_PREFIX="/made-up"))
    assert names(guard) == ["GET /users/<int:user>"]


def test_a_response_that_starts_late(guard: Guard) -> None:
    """As under an agent that starts it with its first part: after the first such request Flask says its route in time."""

    def late(app: Any) -> Any:
        def agent(request: Any, start_response: Any) -> Iterator[bytes]:
            started: list[Any] = []
            body = app(request, lambda *arguments: started.append(arguments))
            start_response(*started[0])
            yield from body
            body.close()

        return agent

    mounted = late(DispatcherMiddleware(flask_app(), {"/two": flask_app()}))
    app = oomsafe.wsgi.MemoryMiddleware(late(flask_app()), guard=guard)
    Server().get(app, environ("/users/1"))
    names(guard)

    Server().get(app, environ("/users/1"))
    assert names(guard) == ["GET /users/<int:user>"]
    Server().get(app, environ("/nothing"))
    assert names(guard) == ["unmatched"]
    Server().get(oomsafe.wsgi.MemoryMiddleware(mounted, guard=guard), environ("/two/users/1"))
    assert names(guard) == ["GET /users/<int:user>"]  # a mount that stands in a closure can't be seen


@given(st.text(), st.sampled_from(["/", "/items/{id}"]), st.one_of(st.none(), st.frozensets(st.sampled_from(sorted(METHODS)))))
def test_no_client_makes_a_name(method: str, path: str, methods: frozenset[str] | None) -> None:
    """Law: whatever it sends for a method, a route has at most as many names as methods."""
    name = label(method, path, methods)

    assert name in {None, *(f"{known} {path}" for known in (METHODS if methods is None else methods))}


def test_a_request_without_a_method(guard: Guard) -> None:
    """As an app's own tests may send it to what does not look at it: served, and counted without a name."""

    async def app(request: Any, receive: Any, send: Any) -> None:
        request["route"] = Route("/x", said)
        await hello(request, receive, send)

    bare = {name: value for name, value in scope("/x").items() if name not in ("method", "path")}
    call(oomsafe.asgi.MemoryMiddleware(app, guard=guard), bare)
    mounts = DispatcherMiddleware(plain, {"/plain": plain})
    request = {name: value for name, value in environ("/plain/x").items() if name != "REQUEST_METHOD"}

    assert Server().get(oomsafe.wsgi.MemoryMiddleware(mounts, guard=guard), request) == b"x"
    assert names(guard) == ["unmatched"]
