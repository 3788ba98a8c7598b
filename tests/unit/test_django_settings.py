"""Django's middleware beside others: oomsafe's own, a cache; its headers, its settings, and its failures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from django.core.cache import cache
from django.core.exceptions import ImproperlyConfigured
from django.core.handlers.asgi import ASGIHandler
from django.core.handlers.wsgi import WSGIHandler
from django.core.signals import request_finished
from django.test.utils import override_settings
from unit.django_project import OURS, async_get, call, get, look, new_guard, routes, scope, seen, serve
from unit.scripted import MIB

from oomsafe.asgi import MemoryMiddleware as AsgiMiddleware
from oomsafe.worker import current
from oomsafe.worker.guard import Guard
from oomsafe.wsgi import MemoryMiddleware as WsgiMiddleware

SECRET = "correct horse battery"
CACHE = "django.middleware.cache"
NAMES = ["X-Memory-RSS", "X-Memory-Delta", "Server-Timing", "X-Memory-Limit"]
BOTH = pytest.mark.parametrize("client", [get, async_get], ids=["sync", "async"])


@pytest.fixture(autouse=True)
def guard() -> Guard:
    """This process's, as a server's adapter would have made it."""
    return new_guard()


@override_settings(OOMSAFE={"headers": True})
@pytest.mark.parametrize("outer", [True, False], ids=["both", "inner-only"])
def test_under_the_wsgi_middleware(guard: Guard, outer: bool) -> None:
    """gunicorn's adapter has counted the request: it gets its route, and headers if it has none."""
    headers = serve(WsgiMiddleware(WSGIHandler(), headers=outer), "/users/1/")

    assert routes(guard) == {"GET /users/<int:user>/": 1}
    assert sorted(name for name, _ in headers if name in NAMES) == sorted(NAMES)


@override_settings(OOMSAFE={"headers": True})
@pytest.mark.parametrize("outer", [True, False], ids=["both", "inner-only"])
@pytest.mark.parametrize("url", ["/users/1/", "/coroutines/1/"], ids=["sync-view", "async-view"])
def test_under_the_asgi_middleware(guard: Guard, outer: bool, url: str) -> None:
    """The same under ASGI."""
    sent = call(AsgiMiddleware(ASGIHandler(), headers=outer), scope(url))

    assert routes(guard) == {f"GET {url}".replace("1", "<int:user>"): 1}
    assert sorted(name.lower() for name, _ in sent[0]["headers"] if b"mem" in name.lower()) == [
        b"x-memory-delta", b"x-memory-limit", b"x-memory-rss",
    ]  # fmt: skip


def test_a_stream_under_the_wsgi_middleware(guard: Guard) -> None:
    """It ends where it has begun: what Django does at its own end is part of it."""

    def finished(**_: Any) -> None:
        look()

    request_finished.connect(finished)
    try:
        serve(WsgiMiddleware(WSGIHandler()), "/stream")
    finally:
        request_finished.disconnect(finished)

    assert (seen, routes(guard), guard.meter.clock.in_flight) == (["GET /stream"] * 3, {"GET /stream": 1}, 0)


@BOTH
@pytest.mark.parametrize(
    ("setting", "token", "shown"),
    [
        (False, None, False),
        (False, SECRET, False),
        (True, None, True),
        (SECRET, SECRET, True),
        (SECRET, None, False),
        (SECRET, "wrong horse battery..", False),
        (SECRET, "\xe9", False),
    ],
    ids=["off", "off-with-token", "on", "right", "absent", "wrong", "non-ascii"],
)
def test_headers(client: Callable[..., Any], setting: bool | str, token: str | None, shown: bool) -> None:
    """For everybody, for nobody, or for who knows the secret."""
    with override_settings(OOMSAFE={"headers": setting}):
        response = client("/", **({} if token is None else {"X-Memory-Token": token}))

    figures = [str(52 * MIB), str(2 * MIB), 'mem;desc="52.0 MiB, +2.0 MiB"', str(900 * MIB)]
    assert [response.headers.get(name) for name in NAMES] == (figures if shown else [None] * 4)


@override_settings(OOMSAFE={"headers": True})
def test_a_header_of_the_views_own() -> None:
    """What the view says about its time stays."""
    assert get("/timed").headers["Server-Timing"] == 'db;dur=3, mem;desc="50.0 MiB, +0 B"'


@override_settings(MIDDLEWARE=[f"{CACHE}.UpdateCacheMiddleware", OURS, f"{CACHE}.FetchFromCacheMiddleware"])
def test_a_cache_before_us(guard: Guard) -> None:
    """Django pickles the response with what is to be closed: ours goes with it, and each request ends once."""
    cache.clear()

    answers = [get("/").content for _ in range(3)]

    assert (answers, seen) == ([b"hello"] * 3, ["GET /"])
    assert guard.meter.counters.work == 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"soft_limt": "300MiB"}, "oomsafe: unknown setting soft_limt"),
        ({"soft_limit": "300 apples"}, "oomsafe: soft_limit='300 apples'"),
        (["soft_limit"], "oomsafe: the setting OOMSAFE must be a dict"),
        ({1: 2}, "oomsafe: the setting OOMSAFE must be a dict"),
    ],
    ids=["unknown", "value", "list", "name"],
)
def test_bad_settings(given: Any, message: str) -> None:
    """Django does not start: one line that names the setting, as Django says such things."""
    with override_settings(OOMSAFE=given), pytest.raises(ImproperlyConfigured) as raised:
        WSGIHandler()

    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


def test_a_guard_of_its_own(monkeypatch: pytest.MonkeyPatch, said: Callable[[], list[str]]) -> None:
    """Without a server's adapter the setting is the policy, over the environment; a variable that nobody knows is a warning."""
    monkeypatch.setattr(current, "_guard", None)
    monkeypatch.setenv("OOMSAFE_SOFT_LIMIT", "800MiB")
    monkeypatch.setenv("OOMSAFE_SOFT_LIMT", "800MiB")
    with override_settings(OOMSAFE={"soft_limit": "900MiB", "jitter": 0}):
        get("/")

    guard = current.get_guard()
    assert guard is not None
    assert (guard.policy.soft_limit, guard.meter.counters.work) == (900 * MIB, 1)
    assert [line for line in said() if "OOMSAFE_SOFT_LIMT" in line]


@override_settings(OOMSAFE={"soft_limit": "300MiB"})
@pytest.mark.parametrize("wrap", [lambda app: app, WsgiMiddleware], ids=["alone", "under-wsgi"])
def test_a_limit_that_does_not_hold(said: Callable[[], list[str]], wrap: Callable[[Any], Any]) -> None:
    """Where the server's adapter has set the limits, ours is ignored, which is said once."""
    app = wrap(WSGIHandler())
    for _ in range(2):
        serve(app, "/")

    assert len([line for line in said() if "soft_limit ignored" in line]) == 1


@BOTH
@pytest.mark.parametrize("part", ["begin", "present"])
def test_a_failure_of_ours(guard: Guard, monkeypatch: pytest.MonkeyPatch, said: Any, client: Callable[..., Any], part: str) -> None:
    """The app does not notice it, the log does, and nothing stays in flight."""

    def fail(*_: Any) -> None:
        raise RuntimeError

    monkeypatch.setattr(guard.meter, part, fail)
    with override_settings(OOMSAFE={"headers": True}):
        response = client("/")

    assert (response.content, guard.meter.clock.in_flight) == (b"hello", 0)
    assert len([line for line in said() if line.startswith("oomsafe failed in")]) == 1


def test_a_failure_is_said_once(guard: Guard, monkeypatch: pytest.MonkeyPatch, said: Callable[[], list[str]]) -> None:
    """Not at each request of a server that serves thousands."""
    monkeypatch.setattr(guard.meter, "begin", None)
    app = WSGIHandler()
    for _ in range(3):
        serve(app, "/")

    assert len([line for line in said() if line.startswith("oomsafe failed in")]) == 1


@override_settings(OOMSAFE={"jitter": 0}, OOMSAFE_SOFT_LIMIT="80MiB")
def test_a_setting_by_the_variable_s_name(said: Callable[[], list[str]]) -> None:
    """Nobody reads it, and a line says how to write it."""
    WSGIHandler()

    assert said() == [
        'OOMSAFE_SOFT_LIMIT in the settings does nothing: write OOMSAFE = {"soft_limit": ...}, '
        "or set OOMSAFE_SOFT_LIMIT in the environment of the server"
    ]
