"""Real HTTP load from this process: kept-alive connections, every response checked, every failure counted."""

from __future__ import annotations

import http.client
import threading
import time

from oomsafe.demo.app import BALLOON_PATH


class Load:
    """`connections` clients that together send `rate` requests a second until stop(). Loopback only.

    `renew`: after so many requests a client takes a new connection; 0: it keeps one for all. Kept ones stay with the worker that was first.
    """

    def __init__(self, port: int, connections: int = 8, rate: float = 400, path: str = "/leak", renew: int = 0) -> None:
        self.requests = 0
        """How many requests were sent; each is answered or failed."""
        self.failed = 0
        self.failures: dict[str, int] = {}
        """The number of failures of each kind."""
        self._port, self._path = port, path
        self._pause = connections / rate
        self._renew = renew
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._client, args=(n,), daemon=True) for n in range(connections)]

    def start(self) -> None:
        """Start the clients."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Stop the clients, after their last answers."""
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=15)

    def _client(self, number: int) -> None:
        connection: http.client.HTTPConnection | None = None
        asked, due = 0, time.monotonic() + self._pause * number / len(self._threads)
        while not self._stop.wait(max(0.0, due - time.monotonic())):
            due = max(due + self._pause, time.monotonic() - 1)
            asked += 1
            connection = connection or http.client.HTTPConnection("127.0.0.1", self._port, timeout=10)
            problem = _ask(connection, self._path, f"c{number}r{asked}")
            self._count(problem)
            if problem or (self._renew and asked % self._renew == 0):
                connection.close()
                connection = None

    def _count(self, problem: str | None) -> None:
        with self._lock:
            self.requests += 1
            if problem:
                self.failed += 1
                self.failures[problem] = self.failures.get(problem, 0) + 1


class BalloonLoad(Load):
    """Beside the same good requests, one client that asks for BALLOON_PATH each `every` seconds, one request after the other."""

    def __init__(self, port: int, every: float = 1.5) -> None:
        super().__init__(port, rate=200, path="/page", renew=10)
        self.balloons = 0
        """How many ballooning requests have ended."""
        self.ends: dict[str, int] = {}
        """The number of them by how they ended: ``status 503``, or the error that their client got."""
        self._every = every
        self._threads.append(threading.Thread(target=self._culprit, daemon=True))

    @property
    def refused(self) -> int:
        """How many ballooning requests got 503."""
        return self.ends.get("status 503", 0)

    def _culprit(self) -> None:
        due = time.monotonic() + self._every
        while not self._stop.wait(max(0.0, due - time.monotonic())):
            due = time.monotonic() + self._every
            connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=30)
            end = _ask(connection, BALLOON_PATH, "rows") or "status 200"
            connection.close()
            self.balloons += 1
            self.ends[end] = self.ends.get(end, 0) + 1


def _ask(connection: http.client.HTTPConnection, path: str, mark: str) -> str | None:
    """Send one request. None if it was answered correctly, else what went wrong.

    If a server sends `Connection: close`, http.client reconnects for the next request. A server that closes a connection
    unannounced while a request is on its way has lost that request.
    """
    try:
        connection.request("GET", f"{path}?{mark}")
        response = connection.getresponse()
        body = response.read()
    except (OSError, http.client.HTTPException) as error:
        return type(error).__name__
    if response.status != 200:
        return f"status {response.status}"
    return None if body == mark.encode() else "wrong body"
