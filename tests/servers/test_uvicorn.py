"""uvicorn's workers, leaking: recycled with their replacement first, and clients see nothing of it."""

from __future__ import annotations

import threading
from http.client import HTTPException

import pytest
from clients import Load, Watch
from recycling_lines import recycling_line
from serving import ask, ask_until_the_last, until
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect as websocket

RECYCLING = recycling_line("130 MiB", "requests", "GET /leak", "GET /leak")


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_leaking_workers_are_recycled_under_load(serve_uvicorn, loop):
    """Five recycles or more, told the same by log and scoreboard, by one supervisor; no request is lost."""
    uvicorn = serve_uvicorn("--loop", loop, soft_limit="130MiB", min_lifetime=0).serving()

    with Load(uvicorn, "/leak?kib=256") as load:
        uvicorn.wait_for(" recycling: ", times=5, seconds=90)

    assert load.failed == []
    assert load.served > 100
    assert uvicorn.serving().pool().supervisor == uvicorn.pid
    until(lambda: uvicorn.pool().totals.recycles[0] == len(uvicorn.lines(" recycling: ")), "the scoreboard agrees with the log")
    assert [line for line in uvicorn.lines(" recycling: ") if not RECYCLING.search(line)] == []
    assert len(uvicorn.lines("lifespan.shutdown")) == len(uvicorn.lines(" recycling: "))
    assert uvicorn.lines("oomsafe failed") == []


def test_the_replacement_comes_first(serve_uvicorn):
    """With a slow leak two workers serve at any moment, and never are there more than twice as many."""
    uvicorn = serve_uvicorn(soft_limit="120MiB", min_lifetime=0, reclaim=False).serving()

    def look():
        states = [worker.state for worker in uvicorn.pool().workers]
        return sum(state in ("serving", "waiting") for state in states), len(uvicorn.workers())

    with Watch(look) as watch, Load(uvicorn, "/leak?kib=32&s=0.01") as load:
        uvicorn.wait_for(" recycling: ", times=3, seconds=90)
        until(lambda: len(uvicorn.workers()) == 2, "the third has gone")

    assert load.failed == []
    serving, running = zip(*watch.seen, strict=True)
    assert min(serving) == 2
    assert max(running) in (3, 4)


def test_what_a_worker_has_taken_is_answered(serve_uvicorn):
    """A request of 6 s is; so is one that comes on an idle connection, and its answer says that it is the last."""
    uvicorn = serve_uvicorn(soft_limit="130MiB", min_lifetime=0).serving()
    pid = uvicorn.workers()[0]
    idle, busy = uvicorn.connect_to(pid), uvicorn.connect_to(pid)
    busy.request("GET", "/slow?s=6")
    until(lambda: [piece.name for piece in uvicorn.worker(pid).in_flight] == ["GET /slow"], "the long one is in flight")

    assert ask(idle, "/fill?mib=134")[:2] == (200, None)
    uvicorn.wait_for(f"worker {pid} (slot ")
    until(lambda: uvicorn.worker(pid).state == "draining", "it drains")
    last = ask_until_the_last(idle, "/pid")
    response = busy.getresponse()

    assert last == (200, "close", b"%d" % pid)
    assert (response.status, response.read()) == (200, b"/slow?s=6")
    busy.close()
    until(lambda: pid not in uvicorn.workers(), "it ends")
    assert uvicorn.lines(f"[{pid}] lifespan.shutdown")
    uvicorn.serving()


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_what_never_ends_is_ended_when_the_grace_period_is_over(serve_uvicorn, loop):
    """A websocket is told that the service restarts, a stream breaks off, and lifespan shuts down all the same."""
    uvicorn = serve_uvicorn("--loop", loop, soft_limit="130MiB", min_lifetime=0, grace_period=2).serving()
    pid = uvicorn.workers()[0]
    stream = uvicorn.connect_to(pid)
    stream.request("GET", "/sse")
    events = stream.getresponse()
    with pytest.raises(ConnectionClosed) as closed, websocket(f"ws://127.0.0.1:{uvicorn.port}/") as socket:
        until(lambda: sum(len(worker.in_flight) for worker in uvicorn.pool().workers) == 2, "both are in flight")
        owner = next(worker.pid for worker in uvicorn.pool().workers if "WEBSOCKET /" in [piece.name for piece in worker.in_flight])
        for worker in {pid, owner}:
            uvicorn.grow(worker, 134)
        socket.send("hello")
        assert socket.recv(10) == "hello"
        socket.recv(30)

    assert closed.value.rcvd is not None
    assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (1012, "service restart")
    assert b"data: event\n\n" in drained(events)
    uvicorn.wait_for(f"[{pid}] lifespan.shutdown")
    assert uvicorn.lines("the grace period of 2 s is over with ")
    until(lambda: pid not in uvicorn.workers(), "it ends")
    uvicorn.serving()


def drained(response):
    """What a stream has sent until it broke off."""
    got = []

    def read():
        try:
            while part := response.read1(65536):
                got.append(part)
        except (OSError, HTTPException):
            pass  # broken off

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive(), "the stream goes on"
    return b"".join(got)
