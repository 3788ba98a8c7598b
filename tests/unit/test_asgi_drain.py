"""The end of an asyncio server that loses no connection."""

from __future__ import annotations

import asyncio
import socket

from oomsafe.asgi.drain import Drain


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
