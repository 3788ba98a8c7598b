"""The end of a worker that speaks HTTP/2: its clients are told, and lose no request."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Iterator

import httpx
import pytest
from draining import alone, drain, ended
from h2.connection import H2Connection
from serving import Gunicorn, until
from versions import serves_streams_at_once

LOOPS = ["asyncio", "uvloop"]

#: Types of frames (RFC 9113, 6).
DATA, HEADERS, GOAWAY = 0, 1, 7

#: A flag of DATA and HEADERS: the last of its stream.
END_STREAM = 1


@pytest.fixture(params=LOOPS)
def gunicorn(request, serve, certificate) -> Gunicorn:
    """A pool of one asgi worker that speaks it, and does not wait for long streams."""
    serves_streams_at_once()
    server = alone(serve, "asgi", f'asgi_loop = "{request.param}"\nhttp_protocols = "h2,h1"\nkeepalive = 2\n{certificate.settings}')
    server.tls = certificate.client
    return server


def test_a_client_of_many_streams_loses_none(gunicorn):
    """Four of its tasks ask on one connection, which it never closes: the worker ends long before its grace period is over."""

    async def ask(client: httpx.AsyncClient, path: str, pid: str) -> None:
        while (response := await client.get(path)).text == pid:  # until another worker answers
            assert (response.status_code, response.http_version) == (200, "HTTP/2")
        assert response.status_code == 200

    async def ask_while_it_drains(pid: int) -> None:
        async with httpx.AsyncClient(http2=True, verify=False, base_url=f"https://127.0.0.1:{gunicorn.port}", timeout=20) as client:
            await client.get("/")
            asking = [asyncio.create_task(ask(client, path, str(pid))) for path in ("/pid?s=0.3", *["/pid?s=0.02"] * 3)]
            assert await asyncio.to_thread(drain, gunicorn) == pid
            await asyncio.to_thread(ended, gunicorn, pid, 10)
            await asyncio.gather(*asking)

    asyncio.run(ask_while_it_drains(*gunicorn.workers()))


def test_an_idle_client_is_told_and_asks_elsewhere(gunicorn):
    """Its next request is answered by another worker, which it may have to wait for, and none fails.

    One that was on its way when the connection's end was announced was not processed, which the announcement says (RFC 9113, 6.8): a
    client sends it again, and httpx leaves that to its user.
    """

    def pid_now() -> str:
        try:
            return client.get("/pid").text
        except httpx.RemoteProtocolError as error:
            assert "ConnectionTerminated error_code:0, last_stream_id:0" in str(error)
            return client.get("/pid").text

    with httpx.Client(http2=True, verify=False, base_url=f"https://127.0.0.1:{gunicorn.port}", timeout=20) as client:
        assert client.get("/pid").status_code == 200
        pid = drain(gunicorn)
        until(lambda: pid_now() != str(pid), "another worker answers")
        ended(gunicorn, pid, seconds=10)


def test_a_client_that_asks_no_more_is_not_waited_for(gunicorn):
    """For longer than it would be kept alive."""
    with httpx.Client(http2=True, verify=False, base_url=f"https://127.0.0.1:{gunicorn.port}", timeout=20) as client:
        assert client.get("/pid").status_code == 200
        ended(gunicorn, drain(gunicorn), seconds=10)


def test_a_long_stream_is_finished_behind_the_goaway(gunicorn, certificate):
    """It names the last stream that is answered; a later one is not begun."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    with context.wrap_socket(socket.create_connection(("127.0.0.1", gunicorn.port), 20)) as client:
        connection = H2Connection()
        connection.initiate_connection()
        ask(connection, client, 1, "/slow?s=3")
        until(lambda: any(work.name == "GET /slow" for worker in gunicorn.pool().workers for work in worker.in_flight), "it is in flight")
        pid = drain(gunicorn)
        seen = []
        for kind, flags, stream, payload in frames(client):
            if kind == GOAWAY and GOAWAY not in (kind for kind, _ in seen):
                assert int.from_bytes(payload[:4], "big") == 1
                ask(connection, client, 3, "/pid")
            if kind in (GOAWAY, HEADERS, DATA):
                seen.append((kind, stream if kind != GOAWAY else int.from_bytes(payload[:4], "big")))
            if kind == DATA and stream == 1 and flags & END_STREAM:
                break
    ended(gunicorn, pid)
    assert seen[0] == (GOAWAY, 1)
    assert (HEADERS, 1) in seen
    assert 3 not in {number for _, number in seen}


def ask(connection: H2Connection, client: ssl.SSLSocket, stream: int, path: str) -> None:
    """A request without a body."""
    pairs = {":method": "GET", ":path": path, ":scheme": "https", ":authority": "localhost"}
    connection.send_headers(stream, list(pairs.items()), end_stream=True)
    client.sendall(connection.data_to_send())


def frames(client: ssl.SSLSocket) -> Iterator[tuple[int, int, int, bytes]]:
    """Type, flags, stream and payload of all that comes: h2 would take GOAWAY for the end."""
    with client.makefile("rb") as received:
        while len(head := received.read(9)) == 9:
            yield head[3], head[4], int.from_bytes(head[5:], "big"), received.read(int.from_bytes(head[:3], "big"))
