"""The end of an HTTP/2 connection of gunicorn's asgi class that loses no request.

Unless it is told, a client uses its connection for as long as there is one. GOAWAY tells it, and names
the last stream that was taken: later ones were not, and are sent again elsewhere (RFC 9113, 6.8). A client
that is built on h2, as httpx is, gives up the streams that are being answered, too, when it reads GOAWAY. So
the streams that come once a worker drains are not begun, and GOAWAY is sent when those that were have
ended. It waits for these for a second; who takes longer goes on behind the GOAWAY.
"""

from __future__ import annotations

import struct
from typing import Any

from oomsafe.drain.stalled import Owed, Wait

#: Seconds for which streams are not begun before their client is told so.
HOLD = 1.0

#: Seconds between the end of the last stream and the GOAWAY, and the PINGs in them. In httpcore one thread reads for all, and while it
#: waits for its own stream no other is told what it has read; whoever has not been told by the GOAWAY has failed. A PING wakes them.
PAUSE, PINGS = 0.2, 4

#: A frame of 8 bytes of the type GOAWAY, for the connection: the last stream, NO_ERROR (RFC 9113, 6.8).
GOAWAY = struct.Struct(">xBBBBIII")

#: "Any stream": none is refused by RST_STREAM, which h2 takes for an error behind a GOAWAY.
ANY = (1 << 31) - 1


def end_http2(protocol: Any) -> Wait | None:
    """Have an HTTP/2 connection come to its end; a later call changes nothing. What it waits for from its client, or None.

    For a protocol that serves each stream by a task, since gunicorn 27. One that has had no stream yet waits for the first.
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
    """Where every stream that is served waits for more of its body."""
    events = [stream._body_event for stream in connection.streams.values() if not stream._body_complete]
    waiting = [waiters[0] for event in events if (waiters := getattr(event, "_waiters", None))]
    if not waiting or len(waiting) < len(protocol._h2_tasks):
        return None
    return Wait(Owed.BODY, begun=False, token=tuple(waiting))


class _End:
    """One connection's. All of it happens in the server's loop."""

    def __init__(self, protocol: Any, connection: Any) -> None:
        self._protocol = protocol
        self._connection = connection
        self._start = protocol._start_http2_stream
        self._close = connection.close
        self._held: int | None = None
        self._last: int | None = None
        protocol._start_http2_stream = self._start_or_hold
        for task in list(protocol._h2_tasks):
            task.add_done_callback(lambda _: self._say_when_done())
        self._say_when_done()
        protocol.worker.loop.call_later(HOLD, self._say)

    def _start_or_hold(self, request: Any, *args: Any) -> None:
        stream = request.stream.stream_id
        if self._last is not None and stream <= self._last:  # it was on its way here while the GOAWAY was written
            self._start(request, *args)
            return
        self._connection.streams.pop(stream, None)
        self._held = stream if self._held is None else self._held
        if self._last is not None:
            self._drain()

    def _say_when_done(self) -> None:
        if not self._protocol._h2_tasks:
            loop = self._protocol.worker.loop
            for number in range(PINGS):
                loop.call_later(number * PAUSE / PINGS, self._ping)
            loop.call_later(PAUSE, self._say)

    def _ping(self) -> None:
        if self._last is None and not self._connection.is_closed:
            self._connection.h2_conn.ping(b"oomsafe!")
            self._connection._write_pending_nowait()

    def _say(self) -> None:
        if self._last is not None or self._connection.is_closed:
            return
        received = self._connection.h2_conn.highest_inbound_stream_id
        self._last = received if self._held is None else self._held - 2  # a client's streams have odd numbers
        self._connection.writer.write(GOAWAY.pack(0, 8, 7, 0, 0, self._last, 0))
        self._connection.close = self._close_behind
        # a client that is idle may read it only when it asks again: as over HTTP/1.1, it has what is its keep-alive time
        linger = 0 if self._protocol._h2_tasks or self._held is not None else self._protocol._keepalive or 1
        self._protocol.worker.loop.call_later(linger, self._drain)

    def _drain(self) -> None:
        """What gunicorn does when its peer says GOAWAY: the connection ends when no stream is left."""
        self._connection.peer_last_stream_id = ANY
        self._connection.draining = True

    async def _close_behind(self, error_code: int = 0, last_stream_id: int | None = None) -> None:
        """Its close() would name another last stream."""
        await self._close(error_code, self._last if last_stream_id is None else last_stream_id)
        self._protocol._closed = True  # it would close its transport again, and asyncio's can't be aborted then
