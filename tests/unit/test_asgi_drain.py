"""The end of an asyncio server that loses no connection."""

from __future__ import annotations

import asyncio
import socket

import pytest

from oomsafe.drain.drain import Drain
from oomsafe.drain.stalled import Owed, Stalled, Wait


async def _serve_one(begin_before_accept: bool) -> tuple[bytes, list[bool]]:
    """What a client reads whose connection is accepted in the very turn of the loop in which the drain begins."""
    served: list[asyncio.StreamWriter] = []
    ended: list[bool] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        served.append(writer)
        writer.write(await reader.read(100))
        writer.close()
        served.remove(writer)

    loop = asyncio.get_running_loop()
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    drain = Drain(loop, 5, lambda: [server], lambda: len(served), ended.append)
    with socket.create_connection(server.sockets[0].getsockname()) as client:
        client.send(b"hello")
        if not begin_before_accept:
            await asyncio.sleep(0)
        drain.begin()
        client.setblocking(False)
        got = await asyncio.wait_for(loop.sock_recv(client, 100), 5)
        while not ended:
            await asyncio.sleep(0.01)
    return got, ended


def test_what_is_accepted_while_the_drain_begins_is_served() -> None:
    """asyncio drops it when its listener is closed in between."""
    for begin_before_accept in (True, False):
        assert asyncio.run(_serve_one(begin_before_accept)) == (b"hello", [False])


class Kept:
    """A connection that is kept alive and idle."""

    def __init__(self, sock: socket.socket) -> None:
        self.transport = self
        self._socket = sock
        self.closed = False

    def is_closing(self) -> bool:
        return self.closed

    def get_write_buffer_size(self) -> int:
        return 0

    def get_extra_info(self, name: str) -> socket.socket:
        assert name == "socket"
        return self._socket

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize(
    ("hurry", "sent", "seconds", "closed"),
    [
        pytest.param(True, b"", 0.5, True, id="in a hurry"),
        pytest.param(False, b"", 0.5, False, id="in no hurry"),
        pytest.param(True, b"G", 0.5, False, id="a request has come"),
        pytest.param(True, b"", 0.2, False, id="a moment ago it was not idle"),
    ],
)
def test_an_idle_connection_is_closed(hurry: bool, sent: bytes, seconds: float, closed: bool) -> None:
    """Only in a hurry, and only where nothing has come that the server has not read yet."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        kept = Kept(ours)
        stalled = Stalled(lambda: [kept], lambda _: Wait(Owed.NEXT), dict.fromkeys(Owed, 0.4))
        theirs.send(sent)
        stalled.close_overdue(0.0, hurry)
        stalled.close_overdue(seconds, hurry)

    assert kept.closed is closed
    assert stalled.closed == 0  # none of these had begun
