"""Clients that verify: every request gets its own answer, and none is lost."""

from __future__ import annotations

import http.client
import itertools
import threading
from collections.abc import Callable
from types import TracebackType

from serving import Server


class Load:
    """Threads that ask without a pause until the block ends; `failed` says what went wrong, `served` counts the rest.

    Half of the clients keep their connection. A connection that the server closes without an answer,
    and without having announced it on the answer before, is a failure; so is a wrong status or body.
    """

    def __init__(self, server: Server, path: str = "/leak?kib=256", clients: int = 4, least: int = 0) -> None:
        self.failed: list[str] = []
        self.served = 0
        self._server = server
        self._path = path
        self._end = threading.Event()
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._client, args=(bool(n % 2),), daemon=True) for n in range(clients)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive(), "a client hangs"

    def _client(self, keeps: bool) -> None:
        connection = self._server.connect()
        while not self._end.is_set():
            try:
                self._ask(connection, keeps)
            except (OSError, http.client.HTTPException, AssertionError) as error:
                with self._lock:
                    self.failed.append(f"{'kept-alive' if keeps else 'one-shot'}: {error!r}")
                connection.close()
        connection.close()

    def _ask(self, connection: http.client.HTTPConnection, keeps: bool) -> None:
        path = f"{self._path}&n={next(self._numbers)}"
        connection.request("GET", path, headers={} if keeps else {"Connection": "close"})
        # http.client opens a new connection by itself only after one that was announced to end
        response = connection.getresponse()
        status, body = response.status, response.read().decode()
        assert (status, body) == (200, path), (status, body)
        if not keeps:
            connection.close()
        with self._lock:
            self.served += 1


class Watch:
    """Looks at something over and over, in a thread, until the block ends; `seen` has what it saw."""

    def __init__(self, look: Callable[[], object]) -> None:
        self.seen: list[object] = []
        self._look = look
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end.set()
        self._thread.join(10)

    def _watch(self) -> None:
        while not self._end.wait(0.01):
            self.seen.append(self._look())
