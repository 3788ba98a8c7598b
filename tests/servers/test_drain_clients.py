"""A drain and clients that have not sent a whole request: those it waits for, and those it does not."""

from __future__ import annotations

import socket
import threading
from contextlib import ExitStack

import pytest
from draining import ASYNCIO, alone, drain, ended

#: Adds a path that reads its request's body.
UPLOADS = """
import apps

async def asgi(scope, receive, send):
    if scope.get("path") != "/upload":
        return await apps.asgi(scope, receive, send)
    size, more = 0, True
    while more:
        message = await receive()
        size, more = size + len(message.get("body", b"")), message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(b"%d" % size))]})
    await send({"type": "http.response.body", "body": b"%d" % size})
"""

#: What a client has sent of its request when the drain begins, and sends no more of.
HALF_SENT = {
    "nothing": b"",
    "half a head": b"POST /upload HTTP/1.1\r\nHost: localhost\r\nContent-Le",
    "half a second head": b"GET /pid HTTP/1.1\r\nHost: localhost\r\n\r\nGET /pi",
    "half a body": b"POST /upload HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n12345",
}

#: A body that does not come for a second has stalled: nobody waits for five.
IMPATIENT = "import oomsafe.drain.drain\noomsafe.drain.drain.BODY_MOMENT = 1.0"

POST = b"POST /upload HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"


@pytest.mark.parametrize(("worker_class", "settings"), ASYNCIO)
def test_what_has_not_sent_a_whole_request_is_not_waited_for(serve, worker_class, settings):
    """A worker ends long before its grace period is over, and a client that has begun is told that it may ask again."""
    gunicorn = alone(serve, worker_class, f"{settings}\n{IMPATIENT}", app="uploads:asgi", files={"uploads.py": UPLOADS})
    with ExitStack() as stack:
        clients = {what: stack.enter_context(socket.create_connection(("127.0.0.1", gunicorn.port), 20)) for what in HALF_SENT}
        for what, client in clients.items():
            client.sendall(HALF_SENT[what])
        assert clients["half a second head"].recv(4096).startswith(b"HTTP/1.1 200 ")

        pid = drain(gunicorn)

        told = {what for what, client in clients.items() if b"HTTP/1.1 408 Request Timeout" in _rest(client)}
        ended(gunicorn, pid, seconds=10)
    assert told == set(HALF_SENT) - {"nothing"}
    assert gunicorn.lines(f"worker {pid} closed 4 connections that had not sent a whole request")


@pytest.mark.parametrize(("worker_class", "settings"), ASYNCIO)
def test_a_slow_upload_is_waited_for(serve, worker_class, settings):
    """One that keeps sending, for three times as long as a body may stall."""
    gunicorn = alone(serve, worker_class, f"{settings}\n{IMPATIENT}", app="uploads:asgi", files={"uploads.py": UPLOADS})
    with socket.create_connection(("127.0.0.1", gunicorn.port), 20) as client:
        client.sendall(POST % 15)
        client.sendall(b"x")
        pid = drain(gunicorn)
        for _ in range(14):
            threading.Event().wait(0.2)  # it is slow
            client.sendall(b"x")
        head, _, body = _rest(client).partition(b"\r\n\r\n")

    assert (head.split(b"\r\n")[0], body) == (b"HTTP/1.1 200 OK", b"15")
    ended(gunicorn, pid)


@pytest.mark.parametrize(("worker_class", "settings"), ASYNCIO)
def test_who_is_in_its_tls_handshake_is_answered(serve, worker_class, settings, certificate):
    """Its connection was accepted before the drain began, which the server itself does not know until the handshake is done."""
    patient = "import oomsafe.drain.drain\noomsafe.drain.drain.HEAD_MOMENT = 10"
    gunicorn = alone(serve, worker_class, f"{settings}\n{patient}\n{certificate.settings}")
    gunicorn.tls = certificate.client
    with ExitStack() as stack:
        clients = [stack.enter_context(socket.create_connection(("127.0.0.1", gunicorn.port), 20)) for _ in range(3)]
        pid = drain(gunicorn)  # on a connection that came after these
        threading.Event().wait(0.3)  # they are slow
        for client in clients:
            with certificate.client.wrap_socket(client) as secure:
                secure.sendall(b"GET /pid HTTP/1.1\r\nHost: localhost\r\n\r\n")
                head, _, body = _rest(secure).partition(b"\r\n\r\n")
            assert (head.split(b"\r\n")[0], int(body)) == (b"HTTP/1.1 200 OK", pid)
            assert b"connection: close" in head.lower()
    ended(gunicorn, pid)


@pytest.mark.parametrize(("worker_class", "settings"), ASYNCIO)
def test_a_tls_handshake_that_does_not_go_on_is_not_waited_for(serve, worker_class, settings, certificate):
    """Nor is a client that never closes its end of what is answered."""
    gunicorn = alone(serve, worker_class, f"{settings}\n{certificate.settings}")
    gunicorn.tls = certificate.client
    address = ("127.0.0.1", gunicorn.port)
    with socket.create_connection(address, 20) as silent, socket.create_connection(address, 20) as half:
        half.sendall(b"\x16\x03\x01\x02\x00")  # the head of a ClientHello
        with certificate.client.wrap_socket(socket.create_connection(address, 20)) as answered:
            pid = drain(gunicorn)
            answer = b""
            while b"connection: close" not in answer.lower():  # its line says so a moment before it drains
                answered.sendall(b"GET /pid HTTP/1.1\r\nHost: localhost\r\n\r\n")
                answer = answered.recv(4096)
            ended(gunicorn, pid, seconds=10)
        assert (silent.recv(1), half.recv(1)) == (b"", b"")


def _rest(client: socket.socket) -> bytes:
    """All that still comes."""
    with client.makefile("rb") as answer:
        return answer.read()
