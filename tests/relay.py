"""A connection that can be lost: what is sent to the relay's port goes on to a server's, until it is cut."""

from __future__ import annotations

import selectors
import socket
import threading


class Relay:
    """On a free port, for any number of connections; a thread of the tests' own."""

    def __init__(self, port: int) -> None:
        """To the server on `port`."""
        self._to = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._lock = threading.Lock()
        self._refuses = False
        self._other: dict[socket.socket, socket.socket] = {}
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def cut(self, for_good: bool = False) -> None:
        """End every connection; `for_good`: those that come later as well."""
        with self._lock:
            self._refuses = for_good
            for end in list(self._other):
                self._drop(end)

    def close(self) -> None:
        """End it."""
        self.cut(for_good=True)
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._selector.close()
        self._listener.close()

    def _run(self) -> None:
        while True:
            for key, _ in self._selector.select():
                with self._lock:
                    if key.fileobj is self._listener:
                        try:
                            self._join(self._listener.accept()[0])
                        except OSError:
                            return  # it is closed
                    elif key.fileobj in self._other:
                        self._pass_on(key.fileobj)  # type: ignore[arg-type]

    def _join(self, client: socket.socket) -> None:
        if self._refuses:
            client.close()
            return
        server = socket.create_connection(("127.0.0.1", self._to))
        for one, other in ((client, server), (server, client)):
            self._other[one] = other
            self._selector.register(one, selectors.EVENT_READ)

    def _pass_on(self, source: socket.socket) -> None:
        try:
            data = source.recv(1 << 16)
            self._other[source].sendall(data)
        except OSError:
            data = b""
        if not data:
            self._drop(source)

    def _drop(self, end: socket.socket) -> None:
        other = self._other.pop(end, None)
        if other is not None:
            self._selector.unregister(end)
            end.close()
            self._drop(other)
