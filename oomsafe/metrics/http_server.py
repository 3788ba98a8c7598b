"""A small HTTP server: one answer per connection, one thread. The standard library's takes 9 MiB more (http.server imports email).

The number of connections, the size of a request and its duration are bounded. Nothing that a client sends is sent back.
"""

from __future__ import annotations

import selectors
import socket
import time
from collections.abc import Callable
from typing import NamedTuple

#: The most connections at once; for one more, the oldest is closed.
CONNECTIONS_MAX = 32

#: The most bytes of a request's line and headers.
REQUEST_MAX = 8192

#: Seconds for a request to arrive, for the answer to be read, and for the client to close.
READ_WITHIN, WRITE_WITHIN, CLOSE_WITHIN = 5.0, 10.0, 1.0

REASONS = {
    200: "OK", 400: "Bad Request", 401: "Unauthorized", 403: "Forbidden", 404: "Not Found", 405: "Method Not Allowed",
    431: "Request Header Fields Too Large", 500: "Internal Server Error", 503: "Service Unavailable",
}  # fmt: skip


class Request(NamedTuple):
    """A client's request."""

    method: str
    path: str
    """Without its query."""
    headers: dict[str, str]
    """By lower-case name."""


class Response(NamedTuple):
    """The answer to it."""

    status: int
    body: bytes
    content_type: str = "text/plain; charset=utf-8"
    headers: tuple[tuple[str, str], ...] = ()


Answer = Callable[[Request], Response]


class HttpServer:
    """One listener and its connections. Each socket is registered with the function to call when it is ready, as the key's data."""

    def __init__(self, selector: selectors.BaseSelector, listener: socket.socket, answer: Answer) -> None:
        self._selector, self._listener, self._answer = selector, listener, answer
        self._connections: dict[socket.socket, _Connection] = {}
        listener.setblocking(False)
        selector.register(listener, selectors.EVENT_READ, self._accept)

    def _accept(self) -> None:
        try:
            client, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError:  # the client is gone; or no descriptor is left (EMFILE), and the listener stays ready
            self._make_room(len(self._connections) - 1)
            time.sleep(0.05)
            return
        self._make_room(CONNECTIONS_MAX - 1)
        client.setblocking(False)
        connection = self._connections[client] = _Connection(client, self._answer)
        self._selector.register(client, connection.awaits, lambda: self._go_on(connection))

    def _make_room(self, most: int) -> None:
        while len(self._connections) > max(0, most):
            self._end(next(iter(self._connections.values())))  # the oldest

    def _go_on(self, connection: _Connection) -> None:
        connection.go_on()
        if connection.is_over:
            self._end(connection)
        else:
            self._selector.modify(connection.client, connection.awaits, lambda: self._go_on(connection))

    def _end(self, connection: _Connection) -> None:
        self._selector.unregister(connection.client)
        del self._connections[connection.client]
        connection.client.close()

    def expire(self) -> float | None:
        """Close the connections whose time is up; return the seconds until the next one's, or None if there is none."""
        now = time.monotonic()
        for connection in [one for one in self._connections.values() if one.deadline <= now]:
            self._end(connection)
        return min((one.deadline - now for one in self._connections.values()), default=None)


class _Connection:
    """One client. After the answer we wait until the client closes: closing first could reset the connection before it has read all."""

    def __init__(self, client: socket.socket, answer: Answer) -> None:
        self.client = client
        self.deadline = time.monotonic() + READ_WITHIN
        self.awaits = selectors.EVENT_READ
        self.is_over = False
        self._answer = answer
        self._received = b""
        self._left: memoryview | None = None
        """The part of the answer that is not sent yet; None before there is an answer."""
        self._closing = False

    def go_on(self) -> None:
        """Read or write as much as is possible without waiting."""
        try:
            if self._closing:
                self.is_over = not self.client.recv(65536)
            elif self._left is None:
                self._read()
            else:
                self._write()
        except BlockingIOError:
            pass
        except OSError:  # the client is gone
            self.is_over = True

    def _read(self) -> None:
        received = self.client.recv(REQUEST_MAX)
        self._received += received
        head, end, _ = self._received.replace(b"\r\n", b"\n").partition(b"\n\n")
        if len(head) > REQUEST_MAX or (not end and len(self._received) > REQUEST_MAX):
            self._respond(Response(431, b"the request is too long\n"), body=True)
        elif end:
            request = parse(head)
            response = Response(400, b"this is not an HTTP request\n") if request is None else self._answered(request)
            self._respond(response, body=request is None or request.method != "HEAD")
        else:
            self.is_over = not received

    def _answered(self, request: Request) -> Response:
        try:
            return self._answer(request)
        except Exception:  # no request may end the server
            return Response(500, b"the metrics can't be read\n")

    def _respond(self, response: Response, body: bool) -> None:
        headers = [
            ("Content-Type", response.content_type), ("Content-Length", str(len(response.body))), *response.headers,
            ("Cache-Control", "no-store"), ("X-Content-Type-Options", "nosniff"), ("Connection", "close"),
        ]  # fmt: skip
        head = "".join(f"{name}: {value}\r\n" for name, value in headers)
        status = f"HTTP/1.1 {response.status} {REASONS[response.status]}\r\n"
        self._left = memoryview(f"{status}{head}\r\n".encode() + (response.body if body else b""))
        self.deadline, self.awaits = time.monotonic() + WRITE_WITHIN, selectors.EVENT_WRITE
        self._write()

    def _write(self) -> None:
        assert self._left is not None
        self._left = self._left[self.client.send(self._left) :]
        if not self._left:
            self.client.shutdown(socket.SHUT_WR)
            self.deadline, self.awaits, self._closing = time.monotonic() + CLOSE_WITHIN, selectors.EVENT_READ, True


def parse(head: bytes) -> Request | None:
    """Parse a request's line and headers, separated by plain line feeds; None if `head` is not valid (RFC 9112)."""
    line, *fields = head.decode("latin-1").split("\n")
    words = line.split(" ")
    if len(words) != 3 or not words[2].startswith("HTTP/1."):
        return None
    headers: dict[str, str] = {}
    for field in fields:
        name, colon, value = field.partition(":")
        name = name.lower()
        # of two such headers, a proxy may honour one and we the other
        if not colon or not name or name != name.strip() or (name in headers and name in ("host", "authorization")):
            return None
        headers[name] = value.strip()
    return Request(words[0], words[1].partition("?")[0], headers)
