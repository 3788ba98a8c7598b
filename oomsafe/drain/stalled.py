"""Clients that a draining server need not wait for: what has not sent a whole request is not work.

A client can open connections and send half a request on each at no cost. Waited for, they would keep
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
    """Nothing: the connection is kept alive and idle, and its client may send another request at any time, or none."""
    BODY = enum.auto()
    """More of a body, for which the app waits before it answers."""
    CLOSE = enum.auto()
    """Its own end of a connection on which everything is sent: over TLS, a server waits for it."""


class Wait(NamedTuple):
    """A wait for a client: equal to the one before as long as it is the same, so a new one begins with each part of a body."""

    owed: Owed
    begun: bool = True
    """Whether any of the request has come."""
    token: Any = None
    """Another object each time."""


#: How a client is told that its request was not taken, and may be sent again (RFC 9110, 15.5.9).
TIMED_OUT = b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class Stalled:
    """The clients of one draining server that owe it something: since when, and who has had the time for it.

    `connections()` are the protocols of those that are open, `wait_of` says what one waits for from its client, and is
    not asked once its transport is closing; `moments` are the seconds for each. An idle one is closed only in a hurry, and when
    nothing has come on it: a request that its client sends at that very moment is lost, as on any server that closes what it kept alive.
    """

    def __init__(self, connections: Callable[[], Iterable[Any]], wait_of: Callable[[Any], Wait | None], moments: dict[Owed, float]) -> None:
        self._connections = connections
        self._wait_of = wait_of
        self._moments = moments
        self._since: dict[Any, tuple[Wait, float]] = {}
        self.closed = 0
        """Connections that were closed before they had sent a whole request."""

    def close_overdue(self, now: float, hurry: bool = False) -> None:
        """To be called now and then, by the server's own loop; in a `hurry`, those that are idle go as well."""
        before, self._since = self._since, {}
        for protocol in list(self._connections()):
            try:
                self._close_if_overdue(protocol, before.get(protocol), now, hurry)
            except Exception as error:  # then it is waited for
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
    """What a connection waits for that its server has closed: None where something is still to be sent."""
    return None if transport.get_write_buffer_size() else Wait(Owed.CLOSE)


def _has_come(transport: Any) -> bool:
    """Whether anything has come on this connection that its server has not read yet, or its client's end of it."""
    sock = transport.get_extra_info("socket")
    poll = select.poll()
    poll.register(sock.fileno(), select.POLLIN)
    return bool(poll.poll(0))
