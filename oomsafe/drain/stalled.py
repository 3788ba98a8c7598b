"""Clients that a draining server need not wait for: an incomplete request is not work.

A client can open connections and send half a request on each at no cost. Waiting for them would keep
a worker that should end for its whole grace period.
"""

from __future__ import annotations

import enum
import logging
import select
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from oomsafe.log import log


class Owed(enum.Enum):
    """What a server waits for from a client."""

    HEAD = enum.auto()
    """The first byte of a request, or the rest of its head."""
    NEXT = enum.auto()
    """Nothing: the connection is kept alive and idle, and its client may send another request at any time, or never."""
    BODY = enum.auto()
    """More of a body, which the app needs before it answers."""
    CLOSE = enum.auto()
    """The client's side of closing a connection on which everything was sent: over TLS, a server waits for it."""


class Wait(NamedTuple):
    """A wait for a client. While the same wait lasts, it compares equal; each part of a body begins a new one."""

    owed: Owed
    begun: bool = True
    """Whether any part of the request has arrived."""
    token: Any = None
    """An object that differs for each wait; None if the other fields are enough."""


#: Tells a client that its request was not processed, and may be sent again (RFC 9110, 15.5.9).
TIMED_OUT = b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class Stalled:
    """The clients of one draining server that owe it something, and since when; closes the connections that are overdue.

    `connections()` returns the protocols of the open connections. `wait_of` says what one of them waits for from its client; it is
    not called once the transport is closing. `moments` are the seconds for each kind. An idle connection is closed only in a hurry, and
    only if no data has arrived on it: a request that its client sends at that very moment is lost, as on any server that closes
    kept-alive connections.
    """

    def __init__(self, connections: Callable[[], Iterable[Any]], wait_of: Callable[[Any], Wait | None], moments: dict[Owed, float]) -> None:
        self._connections = connections
        self._wait_of = wait_of
        self._moments = moments
        self._since: dict[Any, tuple[Wait, float]] = {}
        self.closed = 0
        """Connections that were closed before they had sent a whole request."""

    def close_overdue(self, now: float, hurry: bool = False) -> None:
        """Close overdue connections; in a `hurry`, also idle ones. The server's own loop calls this regularly."""
        before, self._since = self._since, {}
        for protocol in list(self._connections()):
            try:
                self._close_if_overdue(protocol, before.get(protocol), now, hurry)
            except Exception as error:  # keep waiting for this connection
                log.log(logging.DEBUG, "what a connection waits for can't be known: %r", error)

    def _close_if_overdue(self, protocol: Any, known: tuple[Wait, float] | None, now: float, hurry: bool) -> None:
        transport = protocol.transport
        wait = _closing(transport) if transport.is_closing() else self._wait_of(protocol)
        if wait is None:
            return
        since = now if known is None or known[0] != wait else known[1]
        self._since[protocol] = (wait, since)
        if wait.owed is Owed.NEXT and (not hurry or _has_come(transport)):
            return
        if now - since >= self._moments[wait.owed]:
            self._close(transport, wait)

    def _close(self, transport: Any, wait: Wait) -> None:
        if wait.owed is Owed.CLOSE:
            transport.abort()
            return
        if wait.owed is Owed.NEXT:
            transport.close()
            return
        self.closed += 1
        if wait.begun:
            transport.write(TIMED_OUT)
        transport.close()


def _closing(transport: Any) -> Wait | None:
    """What a connection that its server has closed waits for: None if it still has data to send."""
    return None if transport.get_write_buffer_size() else Wait(Owed.CLOSE)


def _has_come(transport: Any) -> bool:
    """Whether this connection has data that its server has not read yet, or its client has closed it."""
    sock = transport.get_extra_info("socket")
    poll = select.poll()
    poll.register(sock.fileno(), select.POLLIN)
    return bool(poll.poll(0))
