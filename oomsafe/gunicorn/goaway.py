"""End an HTTP/2 connection of gunicorn's asgi class without losing a request.

A client uses its connection as long as it is open, unless it gets a GOAWAY. GOAWAY names
the last stream that was accepted: later streams were not, and may be sent again elsewhere (RFC 9113, 6.8). A client
built on h2, such as httpx, also gives up the streams that are being answered when it reads a GOAWAY. So
streams that arrive after the drain has begun are held back, and GOAWAY is sent once the running streams have
ended, or after a second; streams that take longer continue after the GOAWAY.
"""

from __future__ import annotations

import struct
from typing import Any

from oomsafe.drain.stalled import Owed, Wait

#: The most seconds for which streams are held back before the GOAWAY.
HOLD = 1.0

#: Seconds between the end of the last stream and the GOAWAY, and the number of PINGs in between. In httpcore one thread reads for all
#: threads, and while it waits for its own stream the others do not get what it has read; a thread that still waits at the GOAWAY fails.
#: A PING wakes the reader.
PAUSE, PINGS = 0.2, 4

#: A GOAWAY frame with 8 bytes of payload, for the connection: the last stream, NO_ERROR (RFC 9113, 6.8).
GOAWAY = struct.Struct(">xBBBBIII")

#: "Any stream": so that none is refused by RST_STREAM, which h2 treats as an error after a GOAWAY.
ANY = (1 << 31) - 1


def end_http2(protocol: Any) -> Wait | None:
    """Begin to end an HTTP/2 connection; later calls change nothing. Returns what it waits for from its client, or None.

    Works with a protocol that serves each stream in a task, since gunicorn 27. A connection without any stream yet waits for the first.
    """
    connection = getattr(protocol, "_h2_conn", None)
    if connection is None or not hasattr(protocol, "_h2_tasks"):
        return None
    if not connection.h2_conn.highest_inbound_stream_id:
        return Wait(Owed.HEAD, begun=False)
    if "_start_http2_stream" not in vars(protocol):
        _End(protocol, connection)
    return _body_wait(protocol, connection)


def _body_wait(protocol: Any, connection: Any) -> Wait | None:
    """The wait for a body, if every stream that is served waits for more of its body; else None."""
    events = [stream._body_event for stream in connection.streams.values() if not stream._body_complete]
    waiting = [waiters[0] for event in events if (waiters := getattr(event, "_waiters", None))]
    if not waiting or len(waiting) < len(protocol._h2_tasks):
        return None
    return Wait(Owed.BODY, begun=False, token=tuple(waiting))


class _End:
    """The end of one connection. All of its code runs in the server's loop."""

    def __init__(self, protocol: Any, connection: Any) -> None:
        self._protocol = protocol
        self._connection = connection
        self._start = protocol._start_http2_stream
        self._close = connection.close
        self._held: int | None = None
        self._last: int | None = None
        protocol._start_http2_stream = self._start_or_hold
        for task in list(protocol._h2_tasks):
            task.add_done_callback(lambda _: self._go_away_when_done())
        self._go_away_when_done()
        protocol.worker.loop.call_later(HOLD, self._go_away)

    def _start_or_hold(self, request: Any, *args: Any) -> None:
        stream = request.stream.stream_id
        if self._last is not None and stream <= self._last:  # it was on its way while the GOAWAY was written
            self._start(request, *args)
            return
        self._connection.streams.pop(stream, None)
        self._held = stream if self._held is None else self._held
        if self._last is not None:
            self._drain()

    def _go_away_when_done(self) -> None:
        if not self._protocol._h2_tasks:
            loop = self._protocol.worker.loop
            for number in range(PINGS):
                loop.call_later(number * PAUSE / PINGS, self._ping)
            loop.call_later(PAUSE, self._go_away)

    def _ping(self) -> None:
        if self._last is None and not self._connection.is_closed:
            self._connection.h2_conn.ping(b"oomsafe!")
            self._connection._write_pending_nowait()

    def _go_away(self) -> None:
        if self._last is not None or self._connection.is_closed:
            return
        received = self._connection.h2_conn.highest_inbound_stream_id
        self._last = received if self._held is None else self._held - 2  # a client's streams have odd numbers
        self._connection.writer.write(GOAWAY.pack(0, 8, 7, 0, 0, self._last, 0))
        self._connection.close = self._close_behind
        # an idle client may only read it at its next request: as over HTTP/1.1, it has the keep-alive time for that
        linger = 0 if self._protocol._h2_tasks or self._held is not None else self._protocol._keepalive or 1
        self._protocol.worker.loop.call_later(linger, self._drain)

    def _drain(self) -> None:
        """Do what gunicorn does when its peer sends GOAWAY: end the connection once no stream is left."""
        self._connection.peer_last_stream_id = ANY
        self._connection.draining = True

    async def _close_behind(self, error_code: int = 0, last_stream_id: int | None = None) -> None:
        """The connection's close(), with our last stream: by itself it would name a different one."""
        await self._close(error_code, self._last if last_stream_id is None else last_stream_id)
        self._protocol._closed = True  # or it would close its transport again, after which asyncio's can't be aborted
