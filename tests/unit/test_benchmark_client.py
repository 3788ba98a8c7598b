"""The client of the benchmarks against a server that misbehaves as it is told: it misses nothing, and blames nobody wrongly."""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import verifying_client
from balloon_load import BalloonLoad, JsonClient, outcome, run
from http_response import MalformedError, Response, parse
from verifying_load import Load, unserved

Script = Callable[[socket.socket], None]


@contextmanager
def serving(*scripts: Script) -> Iterator[int]:
    """The port of a server that runs one script for each connection, the last one for all that follow."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=_serve, args=(listener, scripts))
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)  # ends its accept()
            thread.join(5)


def _serve(listener: socket.socket, scripts: tuple[Script, ...]) -> None:
    number = 0
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        with connection:
            connection.settimeout(2)
            scripts[min(number, len(scripts) - 1)](connection)
        number += 1


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verifying_client, "RETRY", 0.001)


def asked(connection: socket.socket) -> bytes:
    """The token of the next request; b"" when the client has closed."""
    request = b""
    while not request.endswith(b"\r\n\r\n"):
        if not (came := connection.recv(4096)):
            return b""
        request += came
    return request.split(b" ")[1].partition(b"?")[2]


def answer(body: bytes, *, status: str = "200 OK", length: int | None = None, more: str = "") -> bytes:
    """A response, honest or not."""
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body) if length is None else length}\r\n{more}\r\n".encode() + body


def good(connection: socket.socket) -> None:
    """Answers as long as it is asked."""
    while token := asked(connection):
        connection.sendall(answer(token))


def chunked(connection: socket.socket) -> None:
    """The same in chunks, which come one by one."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while token := asked(connection):
        head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        for piece in (head, b"1\r\n" + token[:1] + b"\r\n", b"%x\r\n" % len(token[1:]), token[1:] + b"\r\n", b"0\r\n\r\n"):
            connection.sendall(piece)


def announces(connection: socket.socket) -> None:
    """Answers once, says that it will close, and does."""
    connection.sendall(answer(asked(connection), more="Connection: close\r\n"))


def announces_http_1_0(connection: socket.socket) -> None:
    """HTTP/1.0 closes unless it says otherwise."""
    connection.sendall(answer(asked(connection)).replace(b"HTTP/1.1", b"HTTP/1.0"))


def closes_idle(connection: socket.socket) -> None:
    """Answers once, and closes before anything more is asked: its right."""
    connection.sendall(answer(asked(connection)))


def closes_unanswered(connection: socket.socket) -> None:
    """Takes a request and closes."""
    asked(connection)


def closes_on_the_second(connection: socket.socket) -> None:
    """Takes a second request, after an answer that announced nothing, and closes."""
    connection.sendall(answer(asked(connection)))
    asked(connection)


def resets(connection: socket.socket) -> None:
    """Takes a request and resets the connection."""
    asked(connection)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def truncates(connection: socket.socket) -> None:
    """Closes in the middle of the body; that it announced a close is no excuse."""
    connection.sendall(answer(asked(connection), length=100, more="Connection: close\r\n"))


def truncates_head(connection: socket.socket) -> None:
    """Closes in the middle of the headers."""
    connection.sendall(answer(asked(connection))[:20])


def another_token(connection: socket.socket) -> None:
    """Answers somebody else's request."""
    while token := asked(connection):
        connection.sendall(answer(bytes(reversed(token))))


def error(connection: socket.socket) -> None:
    """Answers 503."""
    while token := asked(connection):
        connection.sendall(answer(token, status="503 Service Unavailable"))


def without_length(connection: socket.socket) -> None:
    """A body that ends with the connection: it can't be told from one that was cut short."""
    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n" + asked(connection))


def talks_unasked(connection: socket.socket) -> None:
    """Sends a response that nobody asked for."""
    connection.sendall(answer(asked(connection)))
    threading.Event().wait(0.01)
    connection.sendall(answer(b"", status="408 Request Timeout"))


def silent(connection: socket.socket) -> None:
    """Never answers."""
    asked(connection)
    connection.recv(1)


WELL = [good, chunked, announces, announces_http_1_0, closes_idle]

BADLY = [
    (closes_unanswered, "busy: closed unanswered (first request)"),
    (closes_on_the_second, "busy: closed unanswered"),
    (resets, "busy: reset unanswered (first request)"),
    (truncates, "busy: cut short (first request)"),
    (truncates_head, "busy: cut short (first request)"),
    (another_token, "busy: wrong body (first request)"),
    (error, "busy: status 503 (first request)"),
    (without_length, "busy: malformed: neither Content-Length nor chunks (first request)"),
    (talks_unasked, "busy: unasked bytes"),
    (silent, "busy: timeout (first request)"),
]


def ask(port: int, *, requests: int = 3, timeout: float = 5, pause: float = 0.03) -> dict[str, Any]:
    """One client that keeps its connection, and asks so often, with pauses in which a server gets to close."""
    pauses = iter([pause] * (requests - 1))
    load = Load(port, timeout=timeout)
    load.add("busy", 1, "/", lambda: next(pauses, None))
    return load.run(10)


@pytest.mark.parametrize("script", WELL)
def test_a_server_that_keeps_the_rules_fails_nothing(script: Script) -> None:
    """Closing after an announcement, or while nothing is asked, is no failure."""
    with serving(script) as port:
        told = ask(port)

    assert told["failures"] == {}
    assert told["requests"] == 3


@pytest.mark.parametrize(("script", "kind"), BADLY)
def test_one_failure_is_one_and_is_named(script: Script, kind: str) -> None:
    """The first connection is treated badly, the others well: exactly one failure, and the clients go on."""
    with serving(script, good) as port:
        # what nobody asked for must come before something is
        told = ask(port, timeout=0.1 if script is silent else 5, pause=0.5 if script is talks_unasked else 0.03)

    assert told["failures"] == {kind: 1}
    assert told["requests"] == 3


def test_what_the_server_does_to_connections_is_counted() -> None:
    """Announcements and closed idle connections are told, apart from failures."""
    with serving(announces, closes_idle, good) as port:
        told = ask(port)

    assert (told["announced"], told["closed_idle"], told["connections"]) == (1, 1, 3)


def test_nobody_listens() -> None:
    """A refused connection is a failure."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

    assert ask(port, requests=1)["failures"] == {"busy: refused (first request)": 1}


def test_a_close_is_seen_right_before_the_next_request() -> None:
    """Also when nothing has waited on the socket since the answer: what has ended before it asks is no failure."""
    with serving(closes_idle, good) as port:
        load = Load(port)
        load.add("busy", 1, "/", lambda: None)
        (client,) = load.clients
        client.ask()
        _until_answered(load)
        threading.Event().wait(0.03)  # the server closes
        client.ask()
        _until_answered(load)
        client.close()

    assert (load.failures, load.closed_idle, load.connections) == ({}, 1, 2)


def _until_answered(load: Load) -> None:
    while load.waiting:
        for key, _ in load.selector.select(5):
            key.data.ready()


@pytest.mark.parametrize("cut", range(1, 40, 3))
def test_a_response_is_not_whole_before_its_end(cut: int) -> None:
    """Whatever is missing at the end, more must come."""
    whole = answer(b"body", more="Connection: close\r\n")

    assert parse(whole) == Response(200, b"body", keeps=False)
    assert parse(whole[:-cut]) is None


def test_bytes_after_the_end_are_malformed() -> None:
    """With a length and in chunks."""
    for whole in (answer(b"body"), b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"):
        with pytest.raises(MalformedError, match="after the end"):
            parse(whole + b"x")


@pytest.mark.parametrize(
    ("begin", "answers", "end", "expected"),
    [
        (0, [1, 2, 3], 4, (0, 0)),
        (0, [1, 5, 6], 7, (4, 4)),
        (0, [1, 5, 8], 9, (7, 4)),
        (0, [3, 4], 8, (7, 4)),
        (0, [], 6, (6, 6)),
        (0, [2], 4, (0, 0)),
    ],
    ids=["none", "one", "two", "before the first and after the last", "never", "not less than the least"],
)
def test_nobody_serves_while_no_answer_comes(begin: float, answers: list[float], end: float, expected: tuple[float, float]) -> None:
    """Pauses of more than two seconds, here, all of each."""
    assert unserved(begin, answers, end, 2) == expected


def test_the_longest_wait_is_also_that_of_a_failure() -> None:
    """Who gave up has waited, too; who asked for something slow has not."""
    load = Load(1)
    load.answered("busy", 0.5)
    load.failed("busy", "timeout", 3.0)
    load.answered("slow", 9.0)
    load.failed("slow", "timeout", 10.0)

    told = load.run(1)

    assert told["longest"] == 3.0
    assert told["failures"] == {"busy: timeout": 1, "slow: timeout": 1}


def test_a_failed_request_has_waited() -> None:
    """From when it was sent until the client gave it up."""
    with serving(silent, good) as port:
        told = ask(port, timeout=0.1)

    assert told["longest"] >= 0.1


@pytest.mark.parametrize(
    ("body", "path", "failures"),
    [
        ('{"token": "c0r1"}', "/small", {}),
        ('{"token": "c9r1"}', "/small", {"wrong body": 1}),
        ("[", "/small", {"wrong body": 1}),
        ('["c0r1"]', "/small", {"wrong body": 1}),
        ('{"token": "c0r1"}', "/work", {"wrong body": 1}),
        (json.dumps({"token": "c0r1", "size": 2 << 20, "numbers": list(range(10_000))}), "/work", {}),
    ],
)
def test_what_is_right_json(body: str, path: str, failures: dict[str, int]) -> None:
    """Whole, and this request's."""

    def script(connection: socket.socket) -> None:
        asked(connection)
        connection.sendall(answer(body.encode()))

    with serving(script) as port:
        load = BalloonLoad(port, timeout=5)
        load.add("busy", 1, path, lambda: None, kind=JsonClient)
        told = load.run(5)

    assert {kind.removeprefix("busy: "): count for kind, count in told["failures"].items()} == (
        {f"{kind} (first request)": count for kind, count in failures.items()}
    )


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("status 503", "503"),
        ("status 500 (first request)", "500"),
        ("closed unanswered (first request)", "reset"),
        ("reset unanswered", "reset"),
        ("cut short", "reset"),
        ("timeout", "timeout"),
    ],
)
def test_outcomes(kind: str, expected: str) -> None:
    """As the tables of balloons.py name them."""
    assert outcome(kind) == expected


def test_innocents_and_culprits_are_told_apart() -> None:
    """What a balloon gets is no failure of an innocent, and how long it waits is nobody's latency."""
    with serving(error) as port:
        told = run(port, "/blocks", 1.5, 40, 5)

    assert told["innocents"] == told["failed"]["503"] > 8
    assert told["culprits"] == told["outcomes"]["503"] == 2
