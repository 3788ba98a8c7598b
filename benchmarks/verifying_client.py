"""One client that misses nothing: it verifies every answer, names every failure, and knows what became of its connection.

Over a raw socket: an HTTP library would reconnect and retry behind our back, and could not say what the server did.
"""

from __future__ import annotations

import errno
import selectors
import socket
import time
from collections import Counter
from collections.abc import Callable
from typing import Protocol

from http_response import MalformedError, Response, parse

clock = time.perf_counter

#: Seconds before the next try after a failure: a server that refuses must not be asked a million times.
RETRY = 0.05


class Load(Protocol):
    """What all clients of one run share: where they ask, who asks when, and what became of it."""

    port: int
    timeout: float
    selector: selectors.BaseSelector
    clients: list[Client]
    waiting: set[Client]
    asked: Counter[str]
    failures: Counter[str]
    connections: int
    announced: int
    closed_idle: int

    def wake(self, due: float, client: Client) -> None:
        """Have `client` ask when it is `due`."""

    def answered(self, who: str, seconds: float) -> None:
        """An answer was right."""

    def failed(self, who: str, kind: str, seconds: float) -> None:
        """A request was not answered as it should be, after so long."""


class Client:
    """One of the clients: asks, waits for the whole answer, asks again when it is due; a new connection when there is none.

    `who` is what it is counted as; `pause` says how long after the last request the next is due, in seconds; None: that was the last.
    """

    def __init__(self, load: Load, who: str, path: str, pause: Callable[[], float | None], due: float) -> None:
        self._load, self._who, self._path, self._pause = load, who, path, pause
        self._number = len(load.clients)
        self._asked = self._on_connection = 0
        self._socket: socket.socket | None = None
        self._unsent = self._expected = self._received = b""
        self._due = self.since = due
        self.timeout = load.timeout
        load.wake(due, self)

    def ask(self) -> None:
        """Send the next request. A connection that has ended by now, before anything was asked on it, is replaced: no failure."""
        self._asked += 1
        if self._socket is not None and self._something_came():
            self.ready()
        self.since = clock()
        self._expected = b"c%dr%d" % (self._number, self._asked)
        # every other of the one-shot requests says that it is the last; behind the rest, the client just closes
        close = b"Connection: close\r\n" if self._who == "one-shot" and self._asked % 2 else b""
        self._unsent = b"GET %s?%s HTTP/1.1\r\nHost: localhost\r\n%s\r\n" % (self._path.encode(), self._expected, close)
        self._load.asked[self._who] += 1
        self._load.waiting.add(self)
        if self._socket is None and not self._connect():
            return
        self._on_connection += 1
        self._send()

    def ready(self) -> None:
        """Its socket has something to say."""
        assert self._socket is not None
        if self._unsent:
            self._send()
            return
        try:
            came = self._socket.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            came, ended = b"", "reset"
        else:
            ended = "" if came else "closed"
        if not self._expected:
            self._unasked(came)
        elif ended:
            self.fail("cut short" if self._received else f"{ended} unanswered")
        else:
            self._received += came
            self._read()

    def fail(self, kind: str) -> None:
        """The request on its way has failed. The next one goes over a new connection."""
        first = " (first request)" if self._on_connection <= 1 and self._who in ("busy", "idle") else ""
        self._load.failed(self._who, f"{kind}{first}", clock() - self.since)
        self.close()
        self._next(RETRY)

    def _connect(self) -> bool:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._socket.setblocking(False)
        self._on_connection = 0
        self._load.connections += 1
        self._load.selector.register(self._socket, selectors.EVENT_READ, self)
        error = self._socket.connect_ex(("127.0.0.1", self._load.port))
        if error in (0, errno.EINPROGRESS):
            return True
        self.fail(f"no connection ({errno.errorcode.get(error, error)})")
        return False

    def _send(self) -> None:
        assert self._socket is not None
        try:
            sent = self._socket.send(self._unsent)
        except BlockingIOError:  # not connected yet: try again when it can be written to
            self._load.selector.modify(self._socket, selectors.EVENT_WRITE, self)
            return
        except ConnectionRefusedError:
            self.fail("refused")
            return
        except OSError:
            self.fail("reset unanswered")
            return
        assert sent == len(self._unsent), "a request is smaller than any socket's buffer"
        self._unsent = b""
        if self._load.selector.get_key(self._socket).events != selectors.EVENT_READ:
            self._load.selector.modify(self._socket, selectors.EVENT_READ, self)

    def _read(self) -> None:
        try:
            response = parse(self._received)
        except MalformedError as error:
            self.fail(f"malformed: {error}")
            return
        if response is not None:
            self._verify(response)

    def _verify(self, response: Response) -> None:
        if response.status != 200:
            self.fail(f"status {response.status}")
        elif not self._is_right(response.body):
            self.fail("wrong body")
        else:
            self._load.answered(self._who, clock() - self.since)
            if not response.keeps and self._who != "one-shot":
                self._load.announced += 1
            if not response.keeps or self._who == "one-shot":
                self.close()
            self._next(0)

    def _is_right(self, body: bytes) -> bool:
        return body == self._expected

    def _unasked(self, came: bytes) -> None:
        """A close that nobody waits behind is the server's right; bytes that nobody asked for are not."""
        if came:
            self._load.failures[f"{self._who}: unasked bytes"] += 1
        else:
            self._load.closed_idle += 1
        self.close()

    def _something_came(self) -> bool:
        assert self._socket is not None
        try:
            self._socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            pass  # reset: ready() will see it too
        return True

    def close(self) -> None:
        """End its connection, if it has one."""
        if self._socket is not None:
            self._load.selector.unregister(self._socket)
            self._socket.close()
        self._socket = None

    def _next(self, least: float) -> None:
        self._load.waiting.discard(self)
        self._unsent = self._expected = self._received = b""
        pause = self._pause()
        if pause is not None:
            self._due = max(self._due + pause, clock() + least)
            self._load.wake(self._due, self)
