"""How a worker ends: what it has is finished, who is connected is answered, and there is a deadline."""

from __future__ import annotations

import os
import signal
import socket

import pytest
from draining import ASYNCIO, CONCURRENT, alone, drain, ended, kept, sent
from serving import APPS, CLASSES, until
from versions import has_class, loses_none
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect as websocket

#: The user's own hook.
WORKER_EXIT = 'def worker_exit(server, worker):\n    worker.log.info("[%d] the user\'s worker_exit", worker.pid)\n'

#: It waits for what is idle by itself, for some time.
LINGERS = "import gunicorn.workers.gthread\ngunicorn.workers.gthread.STOP_KEEPALIVE_LINGER = 30\ngraceful_timeout = 30"
GTHREAD = pytest.param("gthread", LINGERS, id="gthread")

REQUESTS = {
    "HTTP/1.1": b"GET /pid HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "HTTP/1.1, close": b"GET /pid HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    "HTTP/1.0": b"GET /pid HTTP/1.0\r\n\r\n",
}


@pytest.mark.parametrize(("worker_class", "settings"), CONCURRENT)
def test_a_kept_alive_connection_is_open_until_its_next_request_is_answered(serve, worker_class, settings):
    """By the worker that drains, which says `Connection: close`, and does not end before."""
    loses_none(worker_class)
    gunicorn = alone(serve, worker_class, settings)
    with kept(gunicorn) as idle, sent(gunicorn, "/slow?s=1") as busy:
        pid = drain(gunicorn)
        assert busy.getresponse().read() == b"/slow?s=1"  # it has been draining for some time then
        busy.close()
        idle.request("GET", "/pid")
        response = idle.getresponse()

        assert response.read().decode() == str(pid)
        assert response.getheader("Connection") == "close"
        ended(gunicorn, pid)


@pytest.mark.parametrize(("worker_class", "settings"), [GTHREAD, *ASYNCIO])
def test_an_idle_connection_is_closed_by_a_worker_whose_memory_holds_the_pool_up(serve, worker_class, settings):
    """Over the budget, no other worker can be had until it is gone: it ends long before its grace period."""
    has_class(worker_class)
    loses_none(worker_class)
    gunicorn = alone(serve, worker_class, f"{settings}\nkeepalive = 60", budget="120MiB")
    with kept(gunicorn) as idle:
        pid = drain(gunicorn)
        ended(gunicorn, pid, seconds=10)

        assert idle.sock.recv(1) == b""


@pytest.mark.parametrize(("worker_class", "settings"), CONCURRENT)
def test_who_has_connected_and_not_asked_yet_is_answered(serve, worker_class, settings):
    """Whatever is asked then, and however: one answer, `Connection: close` once, and the end of the connection."""
    loses_none(worker_class)
    patient = "import oomsafe.drain.drain\noomsafe.drain.drain.HEAD_MOMENT = 20"
    gunicorn = alone(serve, worker_class, f"{settings}\n{patient}")
    fresh = {form: socket.create_connection(("127.0.0.1", gunicorn.port), 20) for form in REQUESTS}

    pid = drain(gunicorn)  # on a connection that came after these

    for form, connection in fresh.items():
        with connection, connection.makefile("rb") as answer:
            connection.sendall(REQUESTS[form])
            head, _, body = answer.read().partition(b"\r\n\r\n")
        status, *headers = head.decode().lower().split("\r\n")
        assert (form, status.split()[1], body.decode()) == (form, "200", str(pid))
        assert [header for header in headers if header.startswith("connection:")] == ["connection: close"], form
    ended(gunicorn, pid)


@pytest.mark.parametrize("worker_class", CLASSES[1:])
def test_a_request_longer_than_the_timeout_is_answered(serve, worker_class):
    """gunicorn's `timeout` is for a worker that hangs, not for one that drains."""
    loses_none(worker_class)
    gunicorn = alone(serve, worker_class, "timeout = 3\ngraceful_timeout = 20")
    with sent(gunicorn, "/slow?s=5") as slow:
        pid = drain(gunicorn)
        assert slow.getresponse().read() == b"/slow?s=5"
    ended(gunicorn, pid)


@pytest.mark.parametrize(
    ("worker_class", "number", "settings"),
    [
        # while HUP waits for the old workers, for graceful_timeout, it sees no timeout; asgi ends its requests then, uvicorn does not
        ("uvicorn_worker.UvicornWorker", signal.SIGHUP, "timeout = 3\ngraceful_timeout = 1"),
        ("uvicorn_worker.UvicornWorker", signal.SIGTTOU, "timeout = 3"),
        ("asgi", signal.SIGTTOU, "timeout = 3\ngraceful_timeout = 20"),
    ],
    ids=["uvicorn-HUP", "uvicorn-TTOU", "asgi-TTOU"],
)
def test_a_request_longer_than_the_timeout_is_answered_by_a_worker_that_gunicorn_retires(serve, worker_class, number, settings):
    """By HUP, and by TTOU, which takes the oldest: without oomsafe it gets a SIGABRT."""
    gunicorn = alone(serve, worker_class, settings)
    (pid,) = gunicorn.workers()
    with sent(gunicorn, "/slow?s=5") as slow:
        if number == signal.SIGTTOU:
            gunicorn.signal(signal.SIGTTIN)
            gunicorn.serving(2)
        gunicorn.signal(number)
        assert slow.getresponse().read() == b"/slow?s=5"
    until(lambda: pid not in gunicorn.workers(), "the worker has ended")
    assert not gunicorn.lines("WORKER TIMEOUT")
    assert gunicorn.serving(1).get("/")[0] == 200


@pytest.mark.parametrize("worker_class", CLASSES[1:])
def test_a_response_that_has_begun_is_finished(serve, worker_class):
    """All of its 40 parts, of 64 KiB each, over two seconds."""
    gunicorn = alone(serve, worker_class)
    with sent(gunicorn, "/drip") as connection:
        response = connection.getresponse()
        begun = response.read(1)
        pid = drain(gunicorn)
        assert len(begun + response.read()) == 40 << 16
    ended(gunicorn, pid)


@pytest.mark.parametrize(("worker_class", "settings"), ASYNCIO)
def test_what_has_no_end_is_ended_after_the_grace_period(serve, worker_class, settings):
    """An endless stream of events, and a connection on which nobody asks any more."""
    gunicorn = alone(serve, worker_class, settings, grace_period=1)
    with kept(gunicorn), sent(gunicorn, "/sse") as connection, connection.getresponse() as events:
        assert events.readline() == b"data: event\n"

        pid = drain(gunicorn)

        gunicorn.wait_for("the grace period of 1 s is over with 2 connections open: they are closed")
        ended(gunicorn, pid, seconds=10)


@pytest.mark.parametrize(("worker_class", "settings"), ASYNCIO)
def test_a_websocket_is_told_to_come_again_after_the_grace_period(serve, worker_class, settings):
    """It works until then, and is closed with 1012, "Service Restart"."""
    gunicorn = alone(serve, worker_class, settings, grace_period=2)
    with websocket(f"ws://127.0.0.1:{gunicorn.port}/ws", proxy=None) as client:
        client.send("before")
        assert client.recv(20) == "before"

        pid = drain(gunicorn)

        client.send("while it drains")
        assert client.recv(20) == "while it drains"
        with pytest.raises(ConnectionClosed) as closed:
            client.recv(20)
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1012
    ended(gunicorn, pid, seconds=10)


@pytest.mark.parametrize(("worker_class", "settings"), ASYNCIO)
def test_a_worker_ends_when_all_is_done(serve, worker_class, settings):
    """First the work in the background of a response that its client has had; then the lifespan; then the user's worker_exit."""
    gunicorn = alone(serve, worker_class, f"{settings}\n{WORKER_EXIT}")
    assert gunicorn.get("/background", Connection="close")[0] == 200

    pid = drain(gunicorn)

    ended(gunicorn, pid)
    said = [line.partition(f"[{pid}] ")[2] for line in gunicorn.lines(f"[{pid}] ")]
    expected = ["background work is done", "lifespan's shutdown", "the user's worker_exit"]
    assert [line.rpartition("] ")[2] for line in said if line.endswith(tuple(expected))] == expected


@pytest.mark.parametrize(("worker_class", "settings"), ASYNCIO)
def test_a_worker_ends_where_asyncio_was_imported_twice(serve, worker_class, settings):
    """As by ddtrace-run: its server may know another CancelledError than the one that asyncio raises."""
    path = os.pathsep.join([str(APPS / "reloaded"), str(APPS)])
    gunicorn = alone(serve, worker_class, f"{settings}\n{WORKER_EXIT}", env={"PYTHONPATH": path})

    pid = drain(gunicorn)

    ended(gunicorn, pid)
    assert "Traceback" not in gunicorn.log()
    assert gunicorn.lines(f"[{pid}] lifespan's shutdown")
    assert gunicorn.lines(f"[{pid}] the user's worker_exit")
