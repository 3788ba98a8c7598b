"""ASGI middleware, called as a server calls it: in flight until the app returns, and otherwise not there."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import replace
from typing import Any

import asgiref.sync
import pytest
import trio
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Mount, Route
from unit.scripted import CGROUP, MIB, Memory
from versions import names_routes

from oomsafe.asgi import MemoryMiddleware
from oomsafe.policy.limits import Capacity
from oomsafe.policy.settings import Policy
from oomsafe.worker import current, door
from oomsafe.worker.guard import Guard

SECRET = "correct horse battery"
Message = MutableMapping[str, Any]
App = Callable[..., Awaitable[None]]


@pytest.fixture
def memory() -> Memory:
    """What the guard sees."""
    return Memory(50 * MIB)


@pytest.fixture
def guard(memory: Memory) -> Guard:
    """One that measures."""
    return Guard(Policy(soft_limit="900MiB"), unit="requests", capacity=Capacity(1000 * MIB, CGROUP), memory=memory)


def scope(path: str = "/", kind: str = "http", headers: list[tuple[bytes, bytes]] | None = None) -> dict[str, Any]:
    """A request."""
    return {
        "type": kind,
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": headers or [],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }


def call(app: App, request: dict[str, Any]) -> list[Message]:
    """What the app sends."""
    sent: list[Message] = []
    unread: list[Message] = [{"type": "http.request", "body": b"", "more_body": False}]

    async def receive() -> Message:
        if not unread:
            await asyncio.Event().wait()  # the client stays
        return unread.pop()

    async def send(message: Message) -> None:
        sent.append(message)

    asyncio.run(app(request, receive, send))  # type: ignore[arg-type]
    return sent


def headers_of(sent: list[Message]) -> list[tuple[bytes, bytes]]:
    """Of the response."""
    (start,) = [message for message in sent if message["type"] == "http.response.start"]
    return list(start.get("headers", []))


START = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]}
END = {"type": "http.response.body", "body": b"hello"}


async def hello(request: Any, receive: Any, send: Any) -> None:
    """The plainest app: it sends the same messages every time."""
    await send(START)
    await send(END)


def test_in_flight_until_it_returns(guard: Guard) -> None:
    """With its name; what comes after the last part of the response is its own too."""
    seen = []

    async def app(request: Any, receive: Any, send: Any) -> None:
        await hello(request, receive, send)
        seen.append(([piece.name for piece in guard.pool().workers[0].in_flight], guard.meter.counters.work))

    sent = call(MemoryMiddleware(app, guard=guard), scope("/x"))

    assert (sent, seen) == ([START, END], [(["GET /x"], 0)])
    assert (guard.meter.counters.work, guard.meter.clock.in_flight) == (1, 0)


def test_background_work_is_its_own(guard: Guard, memory: Memory) -> None:
    """A Starlette background task runs after the response, and its growth goes to the request."""
    app = Starlette(routes=[Route("/x", lambda _: PlainTextResponse("x", background=BackgroundTask(memory.be, 58 * MIB)))])

    call(MemoryMiddleware(app, guard=guard), scope("/x"))

    assert [row[0] for row in guard.meter.counters.routes.values()] == [8 * MIB]


def test_streaming(guard: Guard) -> None:
    """Each part goes through as it is."""

    async def parts() -> Any:
        for number in range(3):
            assert guard.meter.clock.in_flight == 1
            yield str(number).encode()

    app = Starlette(routes=[Route("/x", lambda _: StreamingResponse(parts()))])

    sent = call(MemoryMiddleware(app, guard=guard), scope("/x"))

    assert b"".join(message.get("body", b"") for message in sent) == b"012"
    assert guard.meter.counters.work == 1


@pytest.mark.parametrize("kind", ["http", "websocket"])
@pytest.mark.parametrize("error", [ZeroDivisionError, asyncio.CancelledError])
def test_an_app_that_raises(guard: Guard, kind: str, error: type[BaseException]) -> None:
    """The same exception, and the request has ended."""

    async def app(*_: Any) -> None:
        raise error

    with pytest.raises(error):
        call(MemoryMiddleware(app, guard=guard), scope(kind=kind))

    assert (guard.meter.counters.work, guard.meter.clock.in_flight) == (1, 0)


def test_lifespan_passes_untouched(guard: Guard) -> None:
    """The app gets the server's own objects, and nothing is counted."""
    seen: list[Any] = []

    async def app(*arguments: Any) -> None:
        seen.extend(arguments)

    given: list[Any] = [{"type": "lifespan"}, lambda: None, lambda message: None]

    asyncio.run(MemoryMiddleware(app, guard=guard)(*given))

    assert all(got is gave for got, gave in zip(seen, given, strict=True))
    assert (given[0], guard.meter.counters.work) == ({"type": "lifespan"}, 0)


@pytest.mark.parametrize("kind", ["http", "websocket", "lifespan"])
def test_trio(kind: str) -> None:
    """Where trio runs the app (Hypercorn, a test client) there is no loop of asyncio's: it is measured all the same."""
    seen: list[str] = []

    async def app(request: Any, receive: Any, send: Any) -> None:
        await trio.sleep(0)
        seen.append(request["type"])

    trio.run(MemoryMiddleware(app), scope(kind=kind) if kind != "lifespan" else {"type": "lifespan"}, None, lambda message: None)

    guard = current.get_guard()
    assert seen == [kind]
    assert (guard.meter.counters.work if guard else 0) == (kind != "lifespan")


@pytest.mark.parametrize("setting", [True, SECRET])
@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_a_scope_of_a_tests_own(kind: str, setting: bool | str) -> None:
    """With no more in it than its app looks at."""
    guard = Guard(Policy(headers=setting))
    sent: list[Message] = []

    async def app(request: Any, receive: Any, send: Any) -> None:
        guard.meter.leaving = True
        await send({"type": f"{kind}.response.start", "status": 200})

    async def send(message: Message) -> None:
        sent.append(message)

    request: Any = {"type": kind}
    asyncio.run(MemoryMiddleware(app, guard=guard)(request, None, send))  # type: ignore[arg-type]

    assert [message["status"] for message in sent] == [200]


def test_receive_is_the_servers_own(guard: Guard) -> None:
    """And send too, where no headers are added."""
    seen: list[Any] = []

    async def app(*arguments: Any) -> None:
        seen.extend(arguments)

    given: list[Any] = [scope(), lambda: None, lambda message: None]
    asyncio.run(MemoryMiddleware(app, guard=guard)(*given))

    assert all(got is gave for got, gave in zip(seen, given, strict=True))


def test_a_websocket_is_in_flight_while_it_is_open(guard: Guard) -> None:
    """Under its own name, and counted once when it closes. What the process grows by meanwhile is not said to be its growth."""
    seen = []

    async def app(request: Any, receive: Any, send: Any) -> None:
        seen.extend((piece.name, piece.rss) for piece in guard.pool().workers[0].in_flight)

    request = scope("/chat", kind="websocket")
    del request["method"]
    call(MemoryMiddleware(MemoryMiddleware(app, guard=guard), guard=guard), request)

    assert (seen, guard.meter.counters.work, guard.meter.clock.in_flight) == ([("WEBSOCKET /chat", None)], 1, 0)


def test_growth_beside_an_idle_websocket(guard: Guard, memory: Memory) -> None:
    """What an open websocket makes the process grow by is the background's: it takes no share of a request beside it."""
    growth = []

    async def http(request: Any, receive: Any, send: Any) -> None:
        memory.be(58 * MIB)

    async def websocket(request: Any, receive: Any, send: Any) -> None:
        await MemoryMiddleware(http, guard=guard)(scope("/x"), receive, send)
        growth.append(guard.meter.first)
        memory.be(61 * MIB)

    call(MemoryMiddleware(websocket, guard=guard), scope("/chat", kind="websocket"))

    assert growth == [(8 * MIB, b"GET /x")]
    assert (guard.meter.first, guard.meter.clock.background) == ((8 * MIB, b"GET /x"), 3 * MIB)


@pytest.mark.parametrize(
    ("setting", "token", "shown"),
    [
        (False, None, False),
        (False, SECRET.encode(), False),
        (True, None, True),
        (SECRET, SECRET.encode(), True),
        (SECRET, None, False),
        (SECRET, b"wrong", False),
        (SECRET, b"", False),
        (SECRET, "é中".encode(), False),
        (SECRET, b"\xff\xfe", False),
    ],
    ids=["off", "off-with-token", "on", "right", "absent", "wrong", "empty", "non-ascii", "no-text"],
)
def test_headers(memory: Memory, setting: bool | str, token: bytes | None, shown: bool) -> None:
    """For everybody, for nobody, or for who knows the secret; names in lower case, as ASGI wants them."""
    guard = Guard(Policy(soft_limit="900MiB", jitter=0, headers=setting), capacity=Capacity(1000 * MIB, CGROUP), memory=memory)

    async def app(request: Any, receive: Any, send: Any) -> None:
        memory.be(52 * MIB)
        await hello(request, receive, send)

    sent = call(MemoryMiddleware(app, guard=guard), scope(headers=[] if token is None else [(b"x-memory-token", token)]))

    figures = [
        (b"x-memory-rss", b"%d" % (52 * MIB)),
        (b"x-memory-delta", b"%d" % (2 * MIB)),
        (b"server-timing", b'mem;desc="52.0 MiB, +2.0 MiB"'),
        (b"x-memory-limit", b"%d" % (900 * MIB)),
    ]
    assert [(b"content-type", b"text/plain"), *(figures if shown else [])] == headers_of(sent)


def test_headers_are_not_heaped_up() -> None:
    """An app that sends the same message every time has the same message after a thousand requests."""
    app = MemoryMiddleware(hello, headers=True)
    sent: list[Message] = []

    async def many() -> None:
        async def send(message: Message) -> None:
            sent.append(message)

        for _ in range(1000):
            await app(scope(), lambda: None, send)  # type: ignore[arg-type, return-value]

    asyncio.run(many())

    assert START == {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]}
    assert {5} == {len(message["headers"]) for message in sent if "headers" in message}


@pytest.mark.parametrize("start", [{"headers": ()}, {}, {"headers": iter([(b"a", b"b")])}], ids=["tuple", "none", "iterator"])
def test_headers_of_any_kind(start: dict[str, Any]) -> None:
    """ASGI: an iterable, and optional."""

    async def app(request: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, **start})
        await send(END)

    sent = call(MemoryMiddleware(app, headers=True), scope())

    assert (headers_of(sent)[-4][0], headers_of(sent)[-1][0]) == (b"x-memory-rss", b"x-memory-limit")


@pytest.mark.parametrize("outer", [True, False], ids=["both", "inner-only"])
def test_wrapped_twice(outer: bool) -> None:
    """Counted once, and headers once."""
    sent = call(MemoryMiddleware(MemoryMiddleware(hello, headers=True), headers=outer), scope())

    guard = current.get_guard()
    assert guard is not None
    assert (guard.meter.counters.work, len(headers_of(sent))) == (1, 5)


@pytest.mark.parametrize(("outer", "inner"), [(False, True), (True, False), (True, True), ("a secret of some length", True)])
def test_wrapped_twice_in_a_worker_that_leaves(guard: Guard, outer: bool | str, inner: bool) -> None:
    """The outer one says that the connection is closed; who of them shows memory figures does not change."""
    guard.meter.leaving = True

    sent = call(MemoryMiddleware(MemoryMiddleware(hello, headers=inner), guard=guard_with(guard, outer)), scope())

    names = [name for name, _ in headers_of(sent)]
    assert (names.count(b"x-memory-rss"), names.count(b"connection")) == (1, 1)


@pytest.mark.parametrize("opens", [True, False])
def test_a_request_waits_for_memory(guard: Guard, monkeypatch: pytest.MonkeyPatch, opens: bool) -> None:
    """Not begun, and beside others on its loop; it goes on when there is room, or after as long as one may wait."""
    monkeypatch.setattr(door, "WAITS_FOR", 0.1)
    looks = []

    def knock() -> None:
        looks.append(guard.meter.in_flight)
        guard.meter.crowded = not (opens and len(looks) == 3)

    monkeypatch.setattr(guard, "knock", knock)
    guard.meter.crowded = True

    sent = call(MemoryMiddleware(hello, guard=guard), scope())

    assert sent[0]["status"] == 200
    assert set(looks) == {0}
    assert len(looks) == 3 if opens else len(looks) > 3
    assert (guard.meter.counters.work, guard.meter.in_flight) == (1, 0)


def test_a_request_is_refused_where_there_is_no_memory(guard: Guard, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what its guard says of its path; the app does not see it, and it is no work."""
    monkeypatch.setattr(guard, "knock", lambda: None)
    monkeypatch.setattr(type(guard), "sheds", property(lambda _: True))
    monkeypatch.setattr(guard, "refuses", lambda path: path != "/healthz")
    guard.meter.crowded = True
    app = MemoryMiddleware(hello, guard=guard)

    refused, exempt = call(app, scope()), call(app, {**scope(), "path": "/healthz"})

    assert [message["type"] for message in refused] == ["http.response.start", "http.response.body"]
    assert (refused[0]["status"], exempt[0]["status"]) == (503, 200)
    assert guard.meter.counters.work == 1


def test_without_asyncio_s_loop_nothing_waits(guard: Guard, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no supervisor of ours above trio's servers: nobody who leaves would be seen."""
    monkeypatch.setattr(guard, "knock", lambda: pytest.fail("it waits"))
    guard.meter.crowded = True
    sent = []

    async def send(message: Message) -> None:
        sent.append(message)

    trio.run(MemoryMiddleware(hello, guard=guard), scope(), None, send)

    assert sent[0]["status"] == 200


def guard_with(guard: Guard, headers: bool | str) -> Guard:
    """The same guard with another policy for its headers, made this process's."""
    guard.policy = replace(guard.policy, headers=headers)
    current.set_guard(guard)
    return guard


def _starlette() -> App:
    return Starlette(
        routes=[
            Route("/users/{user:int}", lambda request: PlainTextResponse("x")),
            Mount("/sub", routes=[Route("/deep/{name}", lambda request: PlainTextResponse("x"))]),
        ]
    )


def _fastapi() -> App:
    app = FastAPI()

    @app.get("/users/{user}")
    def user(user: int) -> int:
        return user

    return app


@pytest.mark.parametrize(
    ("make", "path", "expected"),
    [
        pytest.param(_starlette, "/users/1", "GET /users/{user:int}", id="starlette"),
        pytest.param(_starlette, "/nothing", "unmatched", id="starlette-404"),
        pytest.param(_fastapi, "/users/1", "GET /users/{user}", id="fastapi"),
        pytest.param(_fastapi, "/nothing", "unmatched", id="fastapi-404"),
    ],
)
def test_routes(guard: Guard, make: Callable[[], App], path: str, expected: str) -> None:
    """A route's label is its template, never the path; what is no route is unmatched."""
    if make is _starlette and expected != "unmatched":
        names_routes()
    call(MemoryMiddleware(make(), guard=guard), scope(path))

    assert [expected] == list(guard.meter.counters.routes)


def test_routes_stay_few(guard: Guard) -> None:
    """A thousand paths of one route below a mount are at most one label."""
    app = MemoryMiddleware(_starlette(), guard=guard)

    for number in range(50):
        call(app, scope(f"/sub/deep/{number}"))

    assert len(guard.meter.counters.routes) == 1
    assert "49" not in next(iter(guard.meter.counters.routes))


def test_a_mounted_app_is_not_lost(guard: Guard) -> None:
    """What is counted below a mount at the root is read back as well."""
    app = Starlette(routes=[Mount("/", app=hello)])

    call(MemoryMiddleware(app, guard=guard), scope("/x"))
    guard.retire()

    assert sum(sum(row[1:]) for row in guard.pool().totals.routes.values()) == 1


def test_a_path_from_outside(guard: Guard) -> None:
    """Whatever a client sends: printable where it is shown, and no failure."""
    seen = []

    async def app(request: Any, receive: Any, send: Any) -> None:
        seen.extend(piece.name for piece in guard.pool().workers[0].in_flight)

    call(MemoryMiddleware(app, guard=guard), scope("/\r\n\x1b[2J\udcff中"[:7] + "é") | {"raw_path": b"/"})

    assert len(seen) == 1
    assert seen[0].startswith("GET /???[2J")
    assert seen[0].isprintable()


@pytest.mark.parametrize("kind", ["http", "websocket", "lifespan"])
@pytest.mark.parametrize("wraps", [1, 2])
def test_what_the_app_returns_is_the_servers(guard: Guard, kind: str, wraps: int) -> None:
    """uvicorn says that an app should return nothing: it can't, of one whose result is swallowed."""

    async def app(request: Any, receive: Any, send: Any) -> Any:
        return "something"

    wrapped: Any = app
    for _ in range(wraps):
        wrapped = MemoryMiddleware(wrapped, guard=guard)
    request: Any = scope(kind=kind) if kind != "lifespan" else {"type": "lifespan"}

    assert asyncio.run(wrapped(request, None, None)) == "something"


def test_what_the_app_has_can_be_seen(guard: Guard) -> None:
    """For who has wrapped it himself, and goes on with it."""
    app: Any = MemoryMiddleware(Starlette(), guard=guard)

    assert app.state is app.app.state
    assert not hasattr(app, "nothing")


def test_send_passes_for_a_coroutine_function() -> None:
    """As the server's own does: asgiref warns of what is none."""

    async def app(request: Any, receive: Any, send: Any) -> None:
        assert asgiref.sync.iscoroutinefunction(send)
        await hello(request, receive, send)

    assert len(headers_of(call(MemoryMiddleware(app, headers=True), scope()))) == 5
