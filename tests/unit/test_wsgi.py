"""WSGI middleware, called as a server calls it: in flight until the body is closed, and otherwise not there."""

from __future__ import annotations

import gc
import io
from collections.abc import Callable, Iterator
from typing import Any
from wsgiref.util import FileWrapper, setup_testing_defaults
from wsgiref.validate import validator

import flask
import pytest
from unit.scripted import CGROUP, MIB, Memory

from oomsafe.errors import ConfigError
from oomsafe.policy.limits import Capacity
from oomsafe.policy.settings import Policy
from oomsafe.worker import current, door
from oomsafe.worker.guard import Guard
from oomsafe.wsgi import MemoryMiddleware

SECRET = "correct horse battery"
Headers = list[tuple[str, str]]


@pytest.fixture
def guard() -> Guard:
    """One that measures."""
    return Guard(Policy(soft_limit="900MiB"), unit="requests", capacity=Capacity(1000 * MIB, CGROUP), memory=Memory(50 * MIB))


def environ(path: str = "/", **more: Any) -> dict[str, Any]:
    """A request."""
    request = {"REQUEST_METHOD": "GET", "SCRIPT_NAME": "", "PATH_INFO": path, **more}
    setup_testing_defaults(request)
    return request


class Server:
    """The server's side of one request."""

    def __init__(self) -> None:
        self.started: list[tuple[Any, ...]] = []
        self.written: list[bytes] = []

    def start_response(self, *arguments: Any) -> Callable[[bytes], None]:
        """PEP 3333's."""
        self.started.append(arguments)
        return self.written.append

    def get(self, app: Any, request: dict[str, Any] | None = None) -> bytes:
        """The whole request."""
        body = app(request or environ(), self.start_response)
        try:
            return b"".join(body)
        finally:
            if hasattr(body, "close"):
                body.close()

    @property
    def headers(self) -> Headers:
        """Of the last start_response."""
        return self.started[-1][1]


def hello(request: dict[str, Any], start_response: Any) -> list[bytes]:
    """The plainest app."""
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"hello"]


class Body:
    """A body that counts how often it is closed."""

    def __init__(self, parts: list[bytes]) -> None:
        self.parts = iter(parts)
        self.closed = 0

    def __iter__(self) -> Iterator[bytes]:
        return self.parts

    def close(self) -> None:
        """PEP 3333: once."""
        self.closed += 1


@pytest.mark.parametrize("opens", [True, False])
def test_a_request_waits_for_memory(guard: Guard, monkeypatch: pytest.MonkeyPatch, opens: bool) -> None:
    """Before it begins; it goes on when there is room, or after as long as one may wait."""
    monkeypatch.setattr(door, "WAITS_FOR", 0.1)
    looks = []

    def knock() -> None:
        looks.append(guard.meter.in_flight)
        guard.meter.crowded = not (opens and len(looks) == 3)

    monkeypatch.setattr(guard, "knock", knock)
    guard.meter.crowded = True

    assert Server().get(MemoryMiddleware(hello, guard=guard)) == b"hello"

    assert set(looks) == {0}
    assert len(looks) == 3 if opens else len(looks) > 3
    assert (guard.meter.counters.work, guard.meter.in_flight) == (1, 0)


def test_a_request_is_refused_where_there_is_no_memory(guard: Guard, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what its guard says of its path, mount included; the app does not see it, and it is no work."""
    asked: list[str] = []
    monkeypatch.setattr(guard, "knock", lambda: None)
    monkeypatch.setattr(type(guard), "sheds", property(lambda _: True))
    monkeypatch.setattr(guard, "refuses", lambda path: asked.append(path) or path != "/a/healthz")
    guard.meter.crowded = True
    app, server = MemoryMiddleware(hello, guard=guard), Server()

    refused = server.get(app, {**environ("/x"), "SCRIPT_NAME": "/a"})
    exempt = Server().get(app, {**environ("/healthz"), "SCRIPT_NAME": "/a"})

    assert (refused.split(b".")[0], exempt) == (b"This service is short of memory", b"hello")
    assert server.started[-1][0] == "503 Service Unavailable"
    assert asked == ["/a/x", "/a/healthz"]
    assert guard.meter.counters.work == 1


def test_in_flight_until_it_is_closed(guard: Guard) -> None:
    """Not only while the app is called: a body that streams makes memory grow as well."""
    body = MemoryMiddleware(hello, guard=guard)(environ("/x"), Server().start_response)
    in_flight = [piece.name for piece in guard.pool().workers[0].in_flight]
    sent = b"".join(body)
    before = guard.meter.counters.work

    body.close()  # type: ignore[attr-defined]

    assert (in_flight, sent, before) == (["GET /x"], b"hello", 0)
    assert (guard.meter.counters.work, guard.meter.clock.in_flight) == (1, 0)


def test_the_body_is_closed_once(guard: Guard) -> None:
    """However often the server closes."""
    theirs = Body([b"a", b"b"])
    body = MemoryMiddleware(lambda *_: theirs, guard=guard)(environ(), Server().start_response)

    assert b"".join(body) == b"ab"
    for _ in range(3):
        body.close()  # type: ignore[attr-defined]

    assert (theirs.closed, guard.meter.counters.work) == (1, 1)


def test_a_close_that_fails(guard: Guard) -> None:
    """It is the server's to see, and the request has ended."""
    theirs = Body([])
    theirs.close = lambda: 1 // 0  # type: ignore[method-assign, return-value]

    with pytest.raises(ZeroDivisionError):
        MemoryMiddleware(lambda *_: theirs, guard=guard)(environ(), Server().start_response).close()  # type: ignore[attr-defined]

    assert guard.meter.clock.in_flight == 0


def test_a_generator(guard: Guard) -> None:
    """It runs in the server's own time, and its finally runs at close()."""
    steps = []

    def app(request: dict[str, Any], start_response: Any) -> Iterator[bytes]:
        steps.append("called")
        start_response("200 OK", [])
        try:
            yield b"1"
            yield b"2"
        finally:
            steps.append("closed")

    body = MemoryMiddleware(app, guard=guard)(environ(), Server().start_response)
    assert steps == []
    assert next(iter(body)) == b"1"
    body.close()  # type: ignore[attr-defined]

    assert (steps, guard.meter.counters.work) == (["called", "closed"], 1)


@pytest.mark.parametrize("error", [ZeroDivisionError, SystemExit, GeneratorExit], ids=lambda kind: kind.__name__)
def test_an_app_that_raises(guard: Guard, error: type[BaseException]) -> None:
    """The same exception, and the request has ended."""

    def app(*_: Any) -> list[bytes]:
        raise error

    with pytest.raises(error):
        Server().get(MemoryMiddleware(app, guard=guard))

    assert (guard.meter.counters.work, guard.meter.clock.in_flight) == (1, 0)


def test_a_body_that_raises(guard: Guard) -> None:
    """In the middle: the server closes, and the request has ended."""

    def app(*_: Any) -> Iterator[bytes]:
        yield b"1"
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Server().get(MemoryMiddleware(app, guard=guard))

    assert (guard.meter.counters.work, guard.meter.clock.in_flight) == (1, 0)


@pytest.mark.parametrize("body", [[b"a", b"b"], (b"a",), []], ids=["list", "tuple", "empty"])
def test_a_list_keeps_its_length(guard: Guard, body: Any) -> None:
    """Servers set Content-Length by themselves for a body of one part."""
    wrapped = MemoryMiddleware(lambda *_: body, guard=guard)(environ(), Server().start_response)

    assert len(body) == len(wrapped)  # type: ignore[arg-type]


def test_a_generator_has_no_length(guard: Guard) -> None:
    """Nor does the body that wraps it."""
    wrapped = MemoryMiddleware(lambda *_: (part for part in [b"a"]), guard=guard)(environ(), Server().start_response)

    assert not hasattr(wrapped, "__len__")


def test_a_file_wrapper_is_handed_on(guard: Guard) -> None:
    """The server must see its own class to use sendfile(); its close() is called, and ends the request."""
    file = io.BytesIO(b"content")
    theirs = FileWrapper(file)

    body = MemoryMiddleware(lambda *_: theirs, guard=guard)(environ(**{"wsgi.file_wrapper": FileWrapper}), Server().start_response)
    before = guard.meter.counters.work
    body.close()  # type: ignore[attr-defined]

    assert body is theirs
    assert (before, guard.meter.counters.work, file.closed) == (0, 1, True)


def test_a_file_wrapper_that_takes_no_attribute(guard: Guard) -> None:
    """A built-in class, as uWSGI's: handed on, and counted."""

    class Slots:
        __slots__ = ()

        def __iter__(self) -> Iterator[bytes]:
            return iter(())

    theirs = Slots()

    body = MemoryMiddleware(lambda *_: theirs, guard=guard)(environ(**{"wsgi.file_wrapper": Slots}), Server().start_response)

    assert body is theirs
    assert guard.meter.clock.in_flight == 0


def test_already_handled(guard: Guard) -> None:
    """gevent's mark for an app that has answered by itself is no body, and is compared by identity."""
    mark = object()

    assert MemoryMiddleware(lambda *_: mark, guard=guard)(environ(), Server().start_response) is mark  # type: ignore[arg-type, return-value]
    assert (guard.meter.counters.work, guard.meter.clock.in_flight) == (1, 0)


class Streamed:
    """A body of parts that come one by one, with an attribute of its own, and a close() that says when it was called."""

    status = "its own"

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def __iter__(self) -> Iterator[bytes]:
        yield b"1"
        self.log.append("between")
        yield b"2"

    def close(self) -> None:
        """PEP 3333's."""
        self.log.append("closed")


BODIES = pytest.mark.parametrize(
    "make", [lambda: [b"1", b"2"], lambda: iter([b"1", b"2"]), lambda: Streamed([]), lambda: (part for part in (b"1", b"2"))],
    ids=["list", "iterator", "object", "generator"],
)  # fmt: skip


@BODIES
def test_a_body_that_nobody_closes(guard: Guard, make: Callable[[], Any]) -> None:
    """A bridge from ASGI does not: in flight until it is sent, and no longer."""
    app = MemoryMiddleware(lambda *_: make(), guard=guard)

    during, parts = [], []
    for part in app(environ(), Server().start_response):
        parts.append(part)
        during.append(guard.meter.in_flight)

    assert (b"".join(parts), guard.meter.in_flight, guard.meter.counters.work) == (b"12", 0, 1)
    assert during in ([1, 1], [0, 0])  # of a list all is there before it is sent
    assert during == [1, 1] or type(make()) is list


@BODIES
@pytest.mark.parametrize("parts", [0, 1])
def test_a_body_that_is_forgotten(guard: Guard, make: Callable[[], Any], parts: int) -> None:
    """Before it is sent, or in the middle."""
    body: Any = MemoryMiddleware(lambda *_: make(), guard=guard)(environ(), Server().start_response)
    iterator = iter(body)
    for _ in range(parts):
        next(iterator)
    before = guard.meter.in_flight
    del body, iterator

    assert (before, guard.meter.in_flight, guard.meter.counters.work) == (1, 0, 1)


def test_what_is_done_at_its_close_is_the_requests_own(guard: Guard) -> None:
    """A framework runs there what is to be done after the response."""
    log: list[str] = []
    streamed = Streamed(log)
    streamed.close = lambda: log.append(f"closed with {guard.meter.in_flight} in flight")  # type: ignore[method-assign]
    body: Any = MemoryMiddleware(lambda *_: streamed, guard=guard)(environ(), Server().start_response)

    assert b"".join(body) == b"12"
    body.close()
    body.close()

    assert log == ["between", "closed with 1 in flight"]
    assert (guard.meter.in_flight, guard.meter.counters.work) == (0, 1)


def test_a_file_wrapper_that_is_forgotten(guard: Guard) -> None:
    """It ends when it is collected."""
    body: Any = MemoryMiddleware(lambda *_: FileWrapper(io.BytesIO(b"x")), guard=guard)(
        environ(**{"wsgi.file_wrapper": FileWrapper}), Server().start_response
    )
    del body
    gc.collect()

    assert (guard.meter.in_flight, guard.meter.counters.work) == (0, 1)


def test_it_is_transparent(guard: Guard) -> None:
    """What the app has and what its body has can be seen on what is served; exc_info may be named."""

    class App:
        config = "the app's"

        def __call__(self, _: Any, start_response: Any) -> Streamed:
            start_response("200 OK", [], exc_info=None)
            return Streamed([])

    app = MemoryMiddleware(App(), guard=guard)
    body: Any = app(environ(), Server().start_response)

    assert (app.config, body.status, hasattr(app, "nothing"), hasattr(body, "nothing")) == ("the app's", "its own", False, False)


def test_an_environ_of_a_tests_own(guard: Guard) -> None:
    """With no more in it than its app looks at: gunicorn's tests have such."""
    app = MemoryMiddleware(hello, guard=guard)

    assert list(app({"wsgi.input": None}, Server().start_response)) == [b"hello"]


def test_the_content_of_a_response_object(guard: Guard) -> None:
    """Django's is a body too, and bytes() of it what is in it: its own tests, and their likes, look at that."""

    class Response(Streamed):
        def __bytes__(self) -> bytes:
            return b"content"

    app = MemoryMiddleware(lambda _environ, _start_response: Response([]), guard=guard)

    assert bytes(app(environ(), Server().start_response)) == b"content"  # type: ignore[call-overload]


NAMES = ["X-Memory-RSS", "X-Memory-Delta", "Server-Timing", "X-Memory-Limit"]


@pytest.mark.parametrize(
    ("setting", "token", "shown"),
    [
        (False, None, False),
        (False, SECRET, False),
        (True, None, True),
        (SECRET, SECRET, True),
        (SECRET, None, False),
        (SECRET, "wrong horse battery..", False),
        (SECRET, "", False),
        (SECRET, "\xe9\xff", False),
    ],
    ids=["off", "off-with-token", "on", "right", "absent", "wrong", "empty", "non-ascii"],
)
def test_headers(setting: bool | str, token: str | None, shown: bool) -> None:
    """For everybody, for nobody, or for who knows the secret."""
    memory = Memory(50 * MIB)
    guard = Guard(Policy(soft_limit="900MiB", jitter=0, headers=setting), capacity=Capacity(1000 * MIB, CGROUP), memory=memory)

    def app(request: dict[str, Any], start_response: Any) -> list[bytes]:
        memory.be(52 * MIB)
        return hello(request, start_response)

    server = Server()
    server.get(MemoryMiddleware(app, guard=guard), environ(**({} if token is None else {"HTTP_X_MEMORY_TOKEN": token})))

    figures = [str(52 * MIB), str(2 * MIB), 'mem;desc="52.0 MiB, +2.0 MiB"', str(900 * MIB)]
    expected = list(zip(NAMES, figures, strict=True)) if shown else []
    assert [("Content-Type", "text/plain"), *expected] == server.headers


def test_headers_are_not_heaped_up() -> None:
    """An app that gives the same list every time has the same list after a thousand requests."""
    constant = [("Content-Type", "text/plain")]
    app = MemoryMiddleware(lambda _, start: (start("200 OK", constant) and []) or [], headers=True)
    server = Server()

    for _ in range(1000):
        server.get(app)

    assert constant == [("Content-Type", "text/plain")]
    assert {5} == {len(headers) for _, headers in server.started}


def test_wrapped_twice() -> None:
    """Counted once, and headers once, whichever is the outer."""
    app = MemoryMiddleware(MemoryMiddleware(hello, headers=True), headers=True)
    server = Server()

    server.get(app)

    guard = current.get_guard()
    assert guard is not None
    assert (guard.meter.counters.work, len(server.headers)) == (1, 5)


def test_the_inner_one_adds_headers_where_the_outer_may_not() -> None:
    """gunicorn's own middleware is outside, with headers off; the app's own is inside, with headers on."""
    app = MemoryMiddleware(MemoryMiddleware(hello, headers=True))
    server = Server()

    server.get(app)

    assert len(server.headers) == 5


def test_a_second_start_response() -> None:
    """An app that fails while it starts may replace its headers: the server gets both calls, with exc_info."""
    guard = Guard(Policy(soft_limit="900MiB", headers=True), capacity=Capacity(1000 * MIB, CGROUP))
    error = (ZeroDivisionError, ZeroDivisionError(), None)

    def app(request: dict[str, Any], start_response: Any) -> list[bytes]:
        start_response("200 OK", [])
        start_response("500 Oh no", [], error)
        return []

    server = Server()
    server.get(MemoryMiddleware(app, guard=guard))

    first, second = server.started
    assert (first[0], len(first[1])) == ("200 OK", 4)
    assert ("500 Oh no", 4, error) == (second[0], len(second[1]), second[2])


def test_write(guard: Guard) -> None:
    """The old way to answer: what start_response returns is the server's own write()."""

    def app(request: dict[str, Any], start_response: Any) -> list[bytes]:
        start_response("200 OK", [])(b"written")
        return []

    server = Server()
    server.get(MemoryMiddleware(app, guard=guard))

    assert server.written == [b"written"]


@pytest.mark.filterwarnings("ignore::wsgiref.validate.WSGIWarning")
def test_keeps_to_pep_3333(guard: Guard) -> None:
    """Between a checked server and a checked app nothing is found."""
    app = validator(MemoryMiddleware(validator(hello), guard=guard))

    assert Server().get(app, environ(**{"wsgi.input": io.BytesIO(), "QUERY_STRING": ""})) == b"hello"
    assert guard.meter.counters.work == 1


def test_flask_routes(guard: Guard) -> None:
    """A route's label is its rule, never the path; what is no route is unmatched."""
    app = flask.Flask("test")
    app.add_url_rule("/users/<int:user>", view_func=lambda user: f"{user}", endpoint="user")
    wrapped = MemoryMiddleware(app, guard=guard)

    answers = [Server().get(wrapped, environ(path)) for path in ("/users/1", "/users/2", "/users/x", "/nothing")]

    assert answers[:2] == [b"1", b"2"]
    assert {name: sum(row[1:]) for name, row in guard.meter.counters.routes.items()} == {"GET /users/<int:user>": 2, "unmatched": 2}


def test_a_path_from_outside(guard: Guard) -> None:
    """Whatever bytes a client sends: printable where it is shown, and no failure."""
    body = MemoryMiddleware(hello, guard=guard)(environ("/\r\n\x1b[2J\xff\udcff\u4e2d", SCRIPT_NAME="/app"), Server().start_response)

    (piece,) = guard.pool().workers[0].in_flight
    body.close()  # type: ignore[attr-defined]
    assert piece.name == "GET /app/???[2J???"


def test_a_guard_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a server's adapter the keywords are the policy; a wrong one fails where it is written."""
    with pytest.raises(ConfigError):
        MemoryMiddleware(hello, soft_limt="300MiB")

    Server().get(MemoryMiddleware(hello, soft_limit="900MiB", jitter=0))

    guard = current.get_guard()
    assert guard is not None
    assert guard.policy.soft_limit == 900 * MIB
    assert guard.meter.counters.work == 1
