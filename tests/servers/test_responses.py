"""Responses of all kinds through each worker class: their headers, their content, and what is in flight afterwards."""

from __future__ import annotations

import re
import socket

import pytest
from servers.apps import PART
from serving import CLASSES, WSGI_CLASSES, Gunicorn, ask, ask_until_the_last, until

SECRET = "a secret of more than sixteen characters"


def settled(gunicorn: Gunicorn, requests: int) -> bool:
    """Nothing is in flight, by the cells and by the published figures, and so many requests have been counted."""
    pool = gunicorn.pool()
    idle = all(not worker.in_flight and worker.figures.in_flight == 0 for worker in pool.workers)
    return idle and pool.totals.work == requests


@pytest.fixture
def one(serve):
    """One worker that publishes its figures at least once in two seconds: one(worker_class, **policy)."""

    def start(worker_class: str, **policy: object) -> Gunicorn:
        return serve(worker_class, 1, settings="timeout = 4", **{"soft_limit": "200MiB", **policy}).serving(1)

    return start


@pytest.mark.parametrize("worker_class", CLASSES)
def test_headers_tell_the_memory(one, worker_class):
    """Real figures, in bytes, and Server-Timing for a browser."""
    gunicorn = one(worker_class, headers=True, jitter=0)
    _, headers, _ = gunicorn.get("/leak?kib=8192")
    rss, delta = int(headers["x-memory-rss"]), int(headers["x-memory-delta"])
    assert 20 << 20 < rss < 120 << 20
    assert 8 << 20 <= delta < 10 << 20
    assert headers["x-memory-limit"] == str(200 << 20)
    assert re.fullmatch(r'mem;desc="[\d.]+ MiB, \+[89]\.\d MiB"', headers["server-timing"])


@pytest.mark.parametrize("worker_class", CLASSES)
def test_headers_need_the_secret(one, worker_class):
    """Nobody else sees them; without the setting nobody does."""
    gunicorn = one(worker_class, headers=SECRET)
    for token, shown in ((None, False), ("wrong", False), (SECRET, True)):
        _, headers, body = gunicorn.get("/", **({"X_Memory_Token": token} if token else {}))
        assert ("x-memory-rss" in headers, "server-timing" in headers) == (shown, shown)
        assert body == b"/?"


@pytest.mark.parametrize("worker_class", CLASSES)
def test_streams_and_errors_are_counted_and_over(one, worker_class):
    """A stream in 40 parts comes through whole; what the app raises is a 500; nothing stays in flight."""
    gunicorn = one(worker_class)
    assert "x-memory-rss" not in gunicorn.get("/")[1]
    for _ in range(3):
        status, _, body = gunicorn.get("/stream")
        assert status == 200
        assert body == 40 * PART
        assert gunicorn.get("/raise")[0] == 500
    until(lambda: settled(gunicorn, 7), "7 requests, none in flight")


@pytest.mark.parametrize("worker_class", WSGI_CLASSES)
def test_files_come_through_whole(one, worker_class, tmp_path):
    """By wsgi.file_wrapper, for which the server calls sendfile."""
    content = b"".join(n.to_bytes(4, "big") for n in range(500_000))
    (tmp_path / "file").write_bytes(content)
    gunicorn = one(worker_class)
    for _ in range(3):
        assert gunicorn.get(f"/file?{tmp_path / 'file'}")[2] == content
    until(lambda: settled(gunicorn, 3), "3 requests, none in flight")


@pytest.mark.parametrize("worker_class", CLASSES)
def test_a_client_that_goes_away_leaves_nothing_in_flight(one, worker_class):
    """In the middle of the response, and before it has begun."""
    gunicorn = one(worker_class)
    for path in ("/drip", "/slow?s=0.5"):
        with socket.create_connection(("127.0.0.1", gunicorn.port), 20) as client:
            client.sendall(f"GET {path} HTTP/1.1\r\nHost: here\r\n\r\n".encode())
            until(lambda: gunicorn.pool().workers[0].in_flight, f"{path} is in flight")
            if path == "/drip":
                assert client.recv(1000).startswith(b"HTTP/1.1 200 OK")
    until(lambda: settled(gunicorn, 2), "2 requests, none in flight")
    assert gunicorn.get("/")[2] == b"/?"


@pytest.mark.parametrize("worker_class", ["gthread", "gevent"])
def test_a_kept_alive_connection_is_told_of_the_end(serve, worker_class):
    """The worker drains: the next answer on an idle connection of its own is served, and announces the close."""
    gunicorn = serve(worker_class, 1, soft_limit="80MiB", min_lifetime=0).serving(1)
    (pid,) = gunicorn.workers()
    kept = gunicorn.connect()
    assert ask(kept, "/pid") == (200, None, b"%d" % pid)

    gunicorn.get("/fill?mib=84")
    gunicorn.wait_for(f"worker {pid} (slot 0) recycling: ")

    assert ask_until_the_last(kept, "/pid") == (200, "close", b"%d" % pid)
    assert kept.sock is None
    kept.close()
