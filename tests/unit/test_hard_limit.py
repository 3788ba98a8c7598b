"""A MemoryError under a hard limit becomes 503, for WSGI and ASGI; everything else stays what it is."""

from __future__ import annotations

import asyncio
import sys
import time
import weakref
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from unit.scripted import CGROUP, MIB, Memory

from oomsafe import Guard, Policy
from oomsafe.asgi import MemoryMiddleware as ASGI
from oomsafe.http.refusal import REFUSED, TOO_LARGE, mark
from oomsafe.kernel import rlimit
from oomsafe.kernel.rlimit import NOBODY, Enforcement, Outside, Reading
from oomsafe.policy.limits import Capacity
from oomsafe.scoreboard import layout
from oomsafe.scoreboard.slot import Cap
from oomsafe.worker import exemptions, hard_limit
from oomsafe.worker.hard_limit import let_go, where_of
from oomsafe.wsgi import MemoryMiddleware as WSGI

BODY = TOO_LARGE.body("GET")
ENVIRON = {"REQUEST_METHOD": "GET", "PATH_INFO": "/x"}
REFUSAL = "GET /x has asked for more memory than its hard limit 300 MiB leaves in "


class Limit:
    """What stands for the kernel's limit: it notes what it is told."""

    theirs: int | None = None

    def __init__(self, measure: Callable[[], Reading | None], outside: Callable[[], Outside]) -> None:
        self.measure = measure
        self.outside = outside
        self.told: list[Any] = []
        made.append(self)

    def follow(self, now: Reading) -> int | None:
        """Until now, nothing lower was there, or that is returned once."""
        self.told.append(now.room)
        theirs, Limit.theirs = Limit.theirs, None
        return theirs

    @property
    def soft(self) -> int:
        """What may be mapped."""
        return self.leaves + 2 * self.measured

    leaves, measured = 250 * MIB, 50 * MIB

    def grant(self, size: int) -> None:
        """For a moment."""
        self.told.append(f"+{size >> 20}")

    def withdraw(self, size: int) -> None:
        """And back."""
        self.told.append(f"-{size >> 20}")

    def release(self) -> None:
        """What was kept for this moment."""
        self.told.append("released")

    def lift(self) -> None:
        """No limit."""
        self.told.append("lifted")

    def leave(self) -> None:
        """In a fork."""
        self.told.append("left")


made: list[Limit] = []


@pytest.fixture(autouse=True)
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process keeps its own limits."""
    made.clear()
    monkeypatch.setattr(rlimit, "DataLimit", Limit)
    monkeypatch.setattr(rlimit, "enforcement", lambda data: Enforcement(True, ""))
    monkeypatch.setattr(exemptions, "install", lambda limit: [])
    monkeypatch.setattr(hard_limit, "peak_rss_of", lambda pid: 310 * MIB)
    yield
    Limit.theirs = None


class Mapped(Memory):
    """With what is mapped."""

    def mapped(self) -> tuple[int, int, int] | None:
        """Twice as much as is resident."""
        return None if self.now is None else (self.now, 0, 2 * self.now)


@pytest.fixture
def memory() -> Mapped:
    """What the guard sees."""
    return Mapped(50 * MIB)


def guarded(memory: Mapped, recycle: Callable[[], None] | None = None, **policy: Any) -> Guard:
    """With a hard limit."""
    limits: dict[str, Any] = {"hard_limit": "300MiB", "soft_limit": "200MiB", "draining_oom_score_adj": 0, **policy}
    return Guard(Policy(**limits), recycle=recycle, unit="requests", capacity=Capacity(1000 * MIB, CGROUP), memory=memory)


class Big:
    """What a request has allocated."""


@pytest.mark.parametrize("reported", [False, True])
def test_what_an_error_holds_is_let_go(reported: bool) -> None:
    """Also by the one that it came from, and where somebody has read its variables; the place is where memory ran out first."""
    held: list[weakref.ref[Big]] = []

    def balloon() -> None:
        kept, inner = Big(), Big()
        held.extend([weakref.ref(kept), weakref.ref(inner)])

        def read() -> Big:
            return inner

        raise MemoryError(bool(kept and read()))

    def handler() -> None:
        kept = Big()
        held.append(weakref.ref(kept))
        try:
            balloon()
        except MemoryError as error:
            trace = error.__traceback__
            while reported and trace is not None:
                assert trace.tb_frame.f_locals
                trace = trace.tb_next
            [][bool(kept)]

    def framework() -> None:
        try:
            handler()
        except IndexError:
            raise MemoryError from None

    try:
        framework()
    except MemoryError as error:
        assert where_of(error).startswith(" in balloon (unit/test_hard_limit.py:")
        assert [one() is not None for one in held] == [True] * 3
        let_go(error)
        assert [one() for one in held] == [None] * 3


def test_it_is_set_and_followed(memory: Mapped) -> None:
    """To what is left of it: when the worker serves, and at each measurement."""
    guard = guarded(memory)
    memory.be(120 * MIB)
    guard.meter.publish_at = 0
    guard.tick()

    assert [limit.told for limit in made] == [[250 * MIB, 180 * MIB]]
    assert made[0].measure() == Reading(240 * MIB, 120 * MIB, 180 * MIB)


@pytest.mark.parametrize("policy", [{"hard_limit": None}, {"dry_run": True}])
def test_without_one(memory: Mapped, policy: dict[str, Any]) -> None:
    """Nothing is set, and a MemoryError is the app's."""
    guard = guarded(memory, **policy)
    app = WSGI(raising(MemoryError()), guard=guard)

    with pytest.raises(MemoryError):
        app(dict(ENVIRON), print)
    assert made == []
    assert not guard.hard_limit.enforced


@pytest.mark.parametrize("reason", ["only Linux holds RLIMIT_DATA against what a process maps; this is darwin"])
def test_where_the_kernel_does_not(memory: Mapped, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, reason: str) -> None:
    """It says so once, and why, and tries no more."""
    tried: list[int] = []
    monkeypatch.setattr(rlimit, "enforcement", lambda data: tried.append(data) or Enforcement(False, reason))
    guard = guarded(memory)
    guard.meter.publish_at = 0
    guard.tick()

    assert tried == [100 * MIB]
    assert f"hard limit 300 MiB: the kernel does not refuse memory beyond it ({reason})" in caplog.text
    assert not guard.hard_limit.enforced


def test_an_unreadable_figure_lifts_it(memory: Mapped) -> None:
    """A limit that can't be followed would be a wrong one; it is back with the figure."""
    guard = guarded(memory)
    for rss in (None, 60 * MIB):
        memory.now = rss
        guard.meter.publish_at = 0
        guard.tick()

    assert [limit.told for limit in made] == [[250 * MIB, "lifted", 240 * MIB]]


def test_what_the_application_has_set(memory: Mapped, caplog: pytest.LogCaptureFixture) -> None:
    """If it is lower, it stays."""
    Limit.theirs = 100 * MIB
    guarded(memory)

    assert "this application has set its own RLIMIT_DATA, 100 MiB, which is lower than what the hard limit 300 MiB comes to" in caplog.text


def test_a_failure_leaves_the_worker_alone(memory: Mapped, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Of whatever kind."""
    monkeypatch.setattr(exemptions, "install", lambda limit: 1 / 0)
    guard = guarded(memory)

    assert "oomsafe failed in the hard limit" in caplog.text
    assert not guard.hard_limit.enforced


def test_a_fork_has_no_part_in_it(memory: Mapped) -> None:
    """It has its application's own limit, and its MemoryErrors are its own."""
    guard = guarded(memory)
    guard.leave()

    assert made[0].told[-1] == "left"
    assert not guard.hard_limit.refuses(None, MemoryError(), "")


def raising(error: BaseException, *parts: bytes) -> Any:
    """A WSGI app that answers, or fails."""

    def app(environ: dict[str, Any], start_response: Any) -> Any:
        kept = bytearray(MIB)
        if not parts:
            raise error
        start_response("200 OK", [("Content-Length", "9")])
        return failing(kept)

    def failing(kept: bytearray) -> Iterator[bytes]:
        yield from parts
        raise error

    return app


class Server:
    """What a WSGI server does with a response."""

    def __init__(self) -> None:
        self.status = ""
        self.headers: dict[str, str] = {}
        self.sent: list[bytes] = []

    def start(self, status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> None:
        """Headers that are sent can't be changed."""
        if exc_info is not None and self.sent:
            raise exc_info[1]
        self.status, self.headers = status, dict(headers)

    def run(self, app: Any, **environ: str) -> Server:
        """One request."""
        body = app({**ENVIRON, **environ}, self.start)
        try:
            for part in body:
                if part:
                    self.sent.append(part)
        finally:
            if hasattr(body, "close"):
                body.close()
        return self


def test_a_refused_request(memory: Mapped, caplog: pytest.LogCaptureFixture) -> None:
    """503, a line, a count; what it held is given up before anything else is done, with a little more memory for that."""
    guard = guarded(memory)
    error = MemoryError()
    server = Server().run(WSGI(raising(error), guard=guard))

    assert (server.status, server.sent) == ("503 Service Unavailable", [BODY])
    assert server.headers["Retry-After"] == "10"
    assert server.headers["Content-Length"] == str(len(BODY))
    (line,) = [line for line in caplog.messages if REFUSAL in line]
    assert "app (unit/test_hard_limit.py:" in line
    assert line.endswith(
        "it had grown by 0 B, and the worker held 50.0 MiB (rss 310 MiB at its peak since its start); "
        "its client got 503; have it take less at a time, or raise hard_limit"
    )
    assert guard.meter.counters.aborts_by_reason["hard_limit"] == 1
    assert (guard.meter.counters.work, guard.meter.clock.in_flight) == (1, 0)
    trace = error.__traceback__
    while trace is not None:
        assert "kept" not in trace.tb_frame.f_locals
        trace = trace.tb_next
    assert made[0].told[1:] == ["released", "+8", 250 * MIB, 250 * MIB, "-8"]


@pytest.mark.parametrize(
    ("ends", "most", "reason"),
    [
        pytest.param(0.4, 60 * MIB, "pool", id="it is in force"),
        pytest.param(-0.5, 60 * MIB, "pool", id="it has just ended"),
        pytest.param(-1.5, 60 * MIB, "hard_limit", id="it has ended long ago"),
        pytest.param(0.4, 900 * MIB, "hard_limit", id="the worker's own limit is lower"),
    ],
)
def test_refused_because_of_others(memory: Mapped, caplog: pytest.LogCaptureFixture, ends: float, most: int, reason: str) -> None:
    """The supervisor has capped this worker, because the pool's memory was about to run out: that is what is said and counted."""
    guard = guarded(memory)
    assert made[0].outside() == NOBODY
    cap = Cap(most, 333 * MIB, 40 * MIB, time.monotonic() + ends)
    layout.write(guard.slot._memory, layout.CAP_AT, layout.CAP, *cap)
    assert made[0].outside() == Outside(most if ends > 0 else None, 333 * MIB)

    server = Server().run(WSGI(raising(MemoryError()), guard=guard))

    assert (server.status, server.sent) == ("503 Service Unavailable", [BODY])
    assert guard.meter.counters.aborts_by_reason[reason] == 1
    why = "its pool has left (40.0 MiB up to the limit, and this worker held most of those that grew)"
    assert (f"GET /x has asked for more memory than {why} in app (" in caplog.text) is (reason == "pool")
    assert ("or lower hard_limit, have fewer workers, or more memory" in caplog.text) is (reason == "pool")


@pytest.mark.parametrize(("leaves", "spent"), [(120 * MIB, True), (130 * MIB, False)])
def test_a_worker_without_room_is_replaced(memory: Mapped, monkeypatch: pytest.MonkeyPatch, leaves: int, spent: bool) -> None:
    """If less than half of the 250 MiB that it had after boot has come back; and not any more once it has."""
    recycled: list[str] = []
    guard = guarded(memory, recycle=lambda: recycled.append("now"), min_lifetime=0)
    monkeypatch.setattr(Limit, "leaves", leaves)
    Server().run(WSGI(raising(MemoryError()), guard=guard))
    assert guard.hard_limit.spent is spent
    guard.meter.publish_at = 0
    guard.tick()

    assert recycled == ["now"] * spent
    monkeypatch.setattr(Limit, "leaves", 126 * MIB)
    guard.meter.publish_at = 0
    guard.tick()
    assert not guard.hard_limit.spent


def test_head_has_no_body(memory: Mapped) -> None:
    """As for any response."""
    server = Server().run(WSGI(raising(MemoryError()), guard=guarded(memory)), REQUEST_METHOD="HEAD")

    assert (server.status, server.sent) == ("503 Service Unavailable", [])


@pytest.mark.parametrize("parts", [(), (b"part",)])
def test_another_error_is_the_app_s(memory: Mapped, parts: tuple[bytes, ...]) -> None:
    """Whatever it is."""
    guard = guarded(memory)
    with pytest.raises(ValueError, match="mine"):
        Server().run(WSGI(raising(ValueError("mine"), *parts), guard=guard))

    assert guard.meter.counters.aborts_by_reason["hard_limit"] == 0
    assert guard.meter.clock.in_flight == 0


def test_parts_that_fail_at_once(memory: Mapped) -> None:
    """Nothing has been sent: 503."""
    server = Server().run(WSGI(raising(MemoryError(), b""), guard=guarded(memory)))

    assert (server.status, server.sent) == ("503 Service Unavailable", [BODY])


def test_parts_that_fail_late(memory: Mapped, caplog: pytest.LogCaptureFixture) -> None:
    """The server gets the error, and closes the connection."""
    server = Server()
    with pytest.raises(MemoryError):
        server.run(WSGI(raising(MemoryError(), b"a part"), guard=guarded(memory)))

    assert (server.status, server.sent) == ("200 OK", [b"a part"])
    assert "its response had begun, so the connection is closed" in caplog.text


@pytest.mark.parametrize(("marked", "status"), [(MemoryError(), "503 Service Unavailable"), (ValueError(), "500 Oops"), (None, "500 Oops")])
def test_a_framework_s_500(memory: Mapped, marked: BaseException | None, status: str) -> None:
    """It is replaced if it tells of a MemoryError, with its body, which is closed."""
    closed: list[str] = []

    class Answer(list[bytes]):
        def close(self) -> None:
            closed.append("closed")

    def app(environ: dict[str, Any], start_response: Any) -> Any:
        mark(environ, marked)
        start_response("500 Oops", [("Content-Length", "4")])
        return Answer([b"oops"])

    server = Server().run(WSGI(app, guard=guarded(memory)))

    assert (server.status, server.sent) == (status, [BODY if status[0:3] == "503" else b"oops"])
    assert closed == ["closed"]


def run_out(kept: list[weakref.ref[Big]]) -> MemoryError:
    """The error of a request that has allocated something."""

    def balloon() -> None:
        big = Big()
        kept.append(weakref.ref(big))
        raise MemoryError

    try:
        balloon()
    except MemoryError as error:
        return error
    raise AssertionError


def test_who_reports_an_error_runs_out_of_memory_too(memory: Mapped, caplog: pytest.LogCaptureFixture) -> None:
    """The second error comes without the first one (Python 3.12 and newer), which the framework has told of."""
    kept: list[weakref.ref[Big]] = []
    told: list[BaseException] = []  # as the report has it

    def app(environ: dict[str, Any], start_response: Any) -> Any:
        told.append(run_out(kept))
        mark(environ, told[0])
        raise MemoryError

    assert Server().run(WSGI(app, guard=guarded(memory))).status == "503 Service Unavailable"
    assert kept[0]() is None
    assert "in balloon (unit/test_hard_limit.py:" in caplog.text

    def told_twice(environ: dict[str, Any], start_response: Any) -> Any:
        told[:] = [run_out(kept), MemoryError()]
        for error in (*told, told[0]):
            mark(environ, error)
        start_response("500 Oops", [])
        return [b"oops"]

    assert Server().run(WSGI(told_twice, guard=guarded(memory))).status == "503 Service Unavailable"
    assert kept[1]() is None


def test_an_error_that_is_answered_otherwise_is_not_kept(memory: Mapped) -> None:
    """An app that has a page of its own for it: the environ lives as long as the request."""
    for status in ("507 Insufficient Storage", "200 OK"):
        environ = {**ENVIRON}

        def app(environ: dict[str, Any], start_response: Any, status: str = status) -> Any:
            mark(environ, MemoryError())
            start_response(status, [])
            return [b"sorry"]

        seen: list[str] = []
        WSGI(app, guard=guarded(memory))(environ, lambda status, *_, seen=seen: seen.append(status))

        assert seen == [status]
        assert REFUSED not in environ


def test_sized_bodies_stay_sized(memory: Mapped) -> None:
    """Some servers set Content-Length by that; a file that the server sends by itself is passed through."""

    class Sized:
        def __iter__(self) -> Iterator[bytes]:
            return iter([b"one"])

        def __len__(self) -> int:
            return 1

        content_type = "text/x"

    class File:
        def __init__(self, given: Any) -> None:
            self.given = given

        def __iter__(self) -> Iterator[bytes]:
            return iter([])

    limited = WSGI(lambda environ, start: environ["body"], guard=guarded(memory))
    limited._find_guard()
    inner = limited._hot[0]
    body = inner({**ENVIRON, "body": Sized()}, print)
    file = File(None)

    assert (len(body), body.content_type, list(body)) == (1, "text/x", [b"one"])  # type: ignore[arg-type,attr-defined]
    assert inner({**ENVIRON, "body": file, "wsgi.file_wrapper": File}, print) is file


Message = dict[str, Any]


def called(app: Callable[..., Awaitable[Any]], guard: Guard, **scope: Any) -> list[Message]:
    """What an ASGI app behind the middleware has sent."""
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def main() -> None:
        await ASGI(app, guard=guard)({"type": "http", "method": "GET", "path": "/x", "headers": [], **scope}, receive, send)  # type: ignore[arg-type]

    asyncio.run(main())
    return sent


def is_503(sent: list[Message], body: bytes = BODY) -> bool:
    """And nothing else."""
    return [message["type"] for message in sent] == ["http.response.start", "http.response.body"] and (
        sent[0]["status"],
        sent[1]["body"],
        dict(sent[0]["headers"])[b"retry-after"],
    ) == (503, body, b"10")


async def fails(scope: Any, receive: Any, send: Any) -> None:
    """Before anything is sent."""
    raise MemoryError


async def fails_late(scope: Any, receive: Any, send: Any) -> None:
    """After a part."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"part", "more_body": True})
    raise MemoryError


async def answers(scope: Any, receive: Any, send: Any) -> None:
    """As Starlette does: with 500 inside of `except`, and then the error again."""
    try:
        await fails(scope, receive, send)
    except Exception as error:
        await respond(send)
        raise error  # noqa: TRY201


async def tells(scope: Any, receive: Any, send: Any) -> None:
    """As Django does: it tells of it, and answers later."""
    scope[REFUSED] = MemoryError()
    await respond(send)


async def respond(send: Any) -> None:
    """With 500."""
    await send({"type": "http.response.start", "status": 500, "headers": []})
    await send({"type": "http.response.body", "body": b"oops"})


async def tells_and_fails(scope: Any, receive: Any, send: Any) -> None:
    """As Django does where its report of the error finds no memory."""
    mark(scope, run_out([]))
    raise MemoryError


async def has_a_page_of_its_own(scope: Any, receive: Any, send: Any) -> None:
    """For this error."""
    mark(scope, MemoryError())
    await send({"type": "http.response.start", "status": 507, "headers": []})
    await send({"type": "http.response.body", "body": b"sorry"})
    assert REFUSED not in scope


def test_asgi_answered_otherwise(memory: Mapped) -> None:
    """It stays what it is, and the scope, which lives as long as the request, does not keep the error."""
    assert [message.get("status") for message in called(has_a_page_of_its_own, guarded(memory))] == [507, None]


@pytest.mark.parametrize("app", [fails, answers, tells, tells_and_fails])
def test_asgi(memory: Mapped, app: Any, caplog: pytest.LogCaptureFixture) -> None:
    """One 503, one line, one count, whatever the app makes of it."""
    guard = guarded(memory)

    assert is_503(called(app, guard))
    assert len([line for line in caplog.messages if "GET /x has asked for more memory" in line]) == 1
    assert guard.meter.counters.aborts_by_reason["hard_limit"] == 1
    assert is_503(called(app, guard, method="HEAD"), b"")


def test_asgi_too_late(memory: Mapped) -> None:
    """The server gets the error."""
    with pytest.raises(MemoryError):
        called(fails_late, guarded(memory))


async def fails_otherwise(scope: Any, receive: Any, send: Any) -> None:
    """With 500, for another reason."""
    await respond(send)
    raise ValueError("mine")


def test_asgi_another_error(memory: Mapped) -> None:
    """Stays what it is."""
    guard = guarded(memory)
    with pytest.raises(ValueError, match="mine"):
        called(fails_otherwise, guard)
    assert guard.meter.counters.aborts_by_reason["hard_limit"] == 0


def test_a_websocket(memory: Mapped, caplog: pytest.LogCaptureFixture) -> None:
    """Its server closes it; a line says why."""
    with pytest.raises(MemoryError):
        called(fails, guarded(memory), type="websocket")
    assert "WEBSOCKET /x has asked for more memory" in caplog.text


def test_it_is_imported_only_with_a_limit() -> None:
    """A worker without a hard limit holds nothing of it."""
    code = (
        "import sys, oomsafe.wsgi, oomsafe.asgi\nfrom oomsafe import Guard, Policy\nguard = Guard(Policy(soft_limit='900MiB'))\n"
        "oomsafe.wsgi.MemoryMiddleware(lambda e, s: [], guard=guard)({'REQUEST_METHOD': 'GET'}, print)\n"
        "guard.meter.publish_at = 0\nguard.tick()\n"
        "print([m for m in ('oomsafe.kernel.rlimit', 'oomsafe.worker.exemptions', 'oomsafe.wsgi.limited', 'resource') if m in sys.modules])"
    )
    import subprocess

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['resource']"
