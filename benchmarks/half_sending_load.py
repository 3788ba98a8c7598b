"""One hostile client: it begins many requests and never ends them, and asks for some that grow the server. Prints JSON.

Run as a process of its own, beside the server that it attacks.
"""

from __future__ import annotations

import argparse
import json
import resource
import selectors
import socket
from collections import Counter

from verifying_client import clock

#: What is sent of a request that never becomes whole, in turns: a part of its head; all of its head and a part of its body.
HALVES = (
    b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Part",
    b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nxxxxxxxxxx",
)


class Attack:
    """Begins `half` requests a second and keeps their connections, asks `grow` whole ones a second for `path`; waits for none."""

    def __init__(self, port: int, *, half: float, grow: float, path: str = "/leak") -> None:
        self.seen: Counter[str] = Counter()
        """How many were begun; refused, before anything was sent; ended, by the server; how many growing ones were asked and answered."""
        self._port, self._path = port, path
        self._rates = {"half": half, "grow": grow}
        self._selector = selectors.DefaultSelector()

    def run(self, seconds: float) -> Counter[str]:
        """Attack for so long, then close every connection."""
        now = clock()
        end = now + seconds
        due = {what: now for what, rate in self._rates.items() if rate}
        while (now := clock()) < end and due:
            for what in [what for what in due if due[what] <= now]:
                due[what] += 1 / self._rates[what]
                self._begin(what)
            for key, _ in self._selector.select(max(0.0, min(*due.values(), end) - clock())):
                self._came(key.fileobj, key.data)  # type: ignore[arg-type]
        for key in list(self._selector.get_map().values()):
            self._drop(key.fileobj)  # type: ignore[arg-type]
        self._selector.close()
        return self.seen

    def _begin(self, what: str) -> None:
        text = b"GET %s?grow HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n" % self._path.encode()
        if what == "half":
            text = HALVES[self.seen["half: begun"] % len(HALVES)]
        self.seen[f"{what}: begun"] += 1
        try:
            # loopback: whoever listens takes it at once, into its backlog
            connection = socket.create_connection(("127.0.0.1", self._port), timeout=1)
            connection.sendall(text)
        except OSError:
            self.seen[f"{what}: refused"] += 1
            return
        connection.setblocking(False)
        self._selector.register(connection, selectors.EVENT_READ, what)

    def _came(self, connection: socket.socket, what: str) -> None:
        try:
            came = connection.recv(1 << 16)
        except OSError:
            came = b""
        self.seen[f"{what}: {'answered' if came else 'ended'}"] += 1
        self._drop(connection)

    def _drop(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        connection.close()


def main() -> None:
    """Attack a server on a loopback port."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("port", type=int)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--half", type=float, default=10, help="half-sent requests a second")
    parser.add_argument("--grow", type=float, default=1.5, help="requests a second for /leak")
    options = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    print(json.dumps(Attack(options.port, half=options.half, grow=options.grow).run(options.seconds)))


if __name__ == "__main__":
    main()
