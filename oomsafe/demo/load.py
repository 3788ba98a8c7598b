"""Real HTTP load from this process: kept-alive connections, every response checked, every failure counted."""

from __future__ import annotations

import http.client
import threading
import time


class Load:
    """`connections` clients that together send `rate` requests a second until stop(). Loopback only."""

    def __init__(self, port: int, connections: int = 8, rate: float = 400) -> None:
        self.requests = 0
        """How many requests were sent; each is answered or failed."""
        self.failed = 0
        self.failures: dict[str, int] = {}
        """The number of failures of each kind."""
        self._port = port
        self._pause = connections / rate
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
            problem = _ask(connection, f"c{number}r{asked}")
            self._count(problem)
            if problem:
                connection.close()
                connection = None

    def _count(self, problem: str | None) -> None:
        with self._lock:
            self.requests += 1
            if problem:
                self.failed += 1
                self.failures[problem] = self.failures.get(problem, 0) + 1


def _ask(connection: http.client.HTTPConnection, mark: str) -> str | None:
    """Send one request. None if it was answered correctly, else what went wrong.

    If a server sends `Connection: close`, http.client reconnects for the next request. A server that closes a connection
    unannounced while a request is on its way has lost that request.
    """
    try:
        connection.request("GET", f"/leak?{mark}")
        response = connection.getresponse()
        body = response.read()
    except (OSError, http.client.HTTPException) as error:
        return type(error).__name__
    if response.status != 200:
        return f"status {response.status}"
    return None if body == mark.encode() else "wrong body"
