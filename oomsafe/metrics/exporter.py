"""The process that serves a pool's metrics. It runs beside the supervisor, reads the scoreboard, and ends when the supervisor ends.

supervisor/exporter.py starts it. It inherits the scoreboard's descriptor, and a socket as descriptor 0. Through the socket it gets its
token, reports what happens, a line each time, and learns that it must end. Everything else comes as arguments.
"""

from __future__ import annotations

import os
import selectors
import socket
import stat
import time
from collections.abc import Callable

from oomsafe.errors import OomsafeError, ScoreRefused
from oomsafe.kernel.files import read_text
from oomsafe.kernel.net import who_listens
from oomsafe.kernel.oom_score import read_score, write_score
from oomsafe.kernel.process import set_comm
from oomsafe.metrics.exposition import expose
from oomsafe.metrics.families import families_of
from oomsafe.metrics.http_server import HttpServer, Request, Response
from oomsafe.policy.address import Address, parse_address
from oomsafe.scoreboard.reader import Reader

#: Its name in ps and in the kernel's OOM report.
COMM = "oomsafe-metrics"

#: Seconds until an address that could not be bound is tried again: the first pause, which doubles each time, and the longest.
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 2.0

#: Seconds before that is reported: after a reload the address is free in a moment.
SAY_AFTER = 1.0

#: Seconds between two checks that the supervisor lives, where the kernel can't notify us.
CHECK_EVERY = 1.0

#: What a browser may call this machine. Any other name in a Host header belongs to a page whose name was made to resolve to it.
OWN_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})


class Exporter:
    """Serves until its supervisor is gone, or closes the socket."""

    def __init__(self, link: socket.socket, board: Reader, address: Address, token: str, supervisor: int) -> None:
        """An empty `token`: none is required."""
        self._link, self._address, self._supervisor = link, address, supervisor
        self._page = Page(board, address, token)
        self._selector = selectors.DefaultSelector()
        self._server: HttpServer | None = None
        self._socket: tuple[int, int] | None = None
        """Device and inode of the Unix socket that this process made."""
        self._try_at = self._began = time.monotonic()
        self._pause = FIRST_PAUSE
        self._said = False
        link.setblocking(False)
        self._selector.register(link, selectors.EVENT_READ, self._hear)
        self._watched = self._watch_supervisor()

    def run(self) -> None:
        """Serve until the end."""
        try:
            # checked once the watch is on, because the supervisor may have ended before it
            while os.getppid() == self._supervisor:
                now = time.monotonic()
                if self._server is None and now >= self._try_at:
                    self._listen(now)
                for key, _ in self._selector.select(self._patience()):
                    ready: Callable[[], None] = key.data
                    ready()
        except _Ended:
            pass
        finally:
            self._remove_socket()

    def _watch_supervisor(self) -> bool:
        """Have the kernel notify us when the supervisor ends (pidfd_open(2), Linux 5.3); False where it can't."""
        try:
            self._selector.register(os.pidfd_open(self._supervisor), selectors.EVENT_READ, _end)
        except (OSError, AttributeError):
            return False
        return True

    def _patience(self) -> float | None:
        waits = [None if self._watched else CHECK_EVERY, None if self._server is None else self._server.expire()]
        if self._server is None:
            waits.append(max(0.0, self._try_at - time.monotonic()))
        return min((seconds for seconds in waits if seconds is not None), default=None)

    def _hear(self) -> None:
        """The supervisor sends nothing more through this socket: it only closes it."""
        if not self._link.recv(4096):
            _end()

    def _say(self, line: str) -> None:
        try:
            self._link.send(f"{line}\n".encode())
        except OSError:
            pass  # the supervisor does not read, or is gone

    def _listen(self, now: float) -> None:
        try:
            listener = self._bound()
        except OSError as error:
            if not self._said and now - self._began >= SAY_AFTER:
                self._said = True
                self._say(f"waits {self._why_not(error)}")
            self._try_at = now + self._pause
            self._pause = min(LONGEST_PAUSE, 2 * self._pause)
            return
        self._server = HttpServer(self._selector, listener, self._page.answer)
        port = self._address.port if self._address.port is None else listener.getsockname()[1]
        self._say(f"serves {self._address._replace(port=port).url}")

    def _bound(self) -> socket.socket:
        host, port = self._address
        family = socket.AF_UNIX if port is None else socket.AF_INET6 if self._address.is_ipv6 else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            if port is None:
                self._bind_path(listener, host)
            else:
                # our closed connections stay for a minute (TIME_WAIT) and would block the address; on Linux this allows no second listener
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                listener.bind((host, port))
            listener.listen(16)
        except OSError:
            listener.close()
            raise
        return listener

    def _bind_path(self, listener: socket.socket, path: str) -> None:
        """Bind to a Unix socket. What lies at the path is removed only if it is a socket of this user on which no process listens."""
        if _is_left_over(path):
            os.unlink(path)
        before = os.umask(0o177)  # mode 0600 from the start; no other thread here is affected
        try:
            listener.bind(path)
        finally:
            os.umask(before)
        found = os.lstat(path)
        self._socket = found.st_dev, found.st_ino

    def _remove_socket(self) -> None:
        if self._socket is not None:
            try:
                found = os.lstat(self._address.host)
                if (found.st_dev, found.st_ino) == self._socket:
                    os.unlink(self._address.host)
            except OSError:
                pass  # another process has removed it

    def _why_not(self, error: OSError) -> str:
        """For a log line."""
        who = who_listens(self._address.port) if self._address.port else None
        by = "" if who is None else f" (by process {who}, {(read_text(f'/proc/{who}/comm') or 'gone').strip()})"
        return f"{self._address}: {error.strerror}{by}"


class Page:
    """The one page that is served: /metrics."""

    def __init__(self, board: Reader, address: Address, token: str) -> None:
        self._board, self._token = board, token
        # any page that a browser on this machine shows can send requests to a loopback address, but under its own name (DNS rebinding)
        self._names = OWN_NAMES | {str(address).rpartition(":")[0]} if address.port is not None and address.is_private else None

    def answer(self, request: Request) -> Response:
        """Answer one request."""
        if self._names is not None and not self._is_own(request.headers.get("host")):
            return Response(403, b"the Host header must be localhost or the address that this server listens on\n")
        if self._token and not self._knows(request.headers.get("authorization", "")):
            return Response(401, b"a token is required\n", headers=(("WWW-Authenticate", "Bearer"),))
        if request.path != "/metrics":
            return Response(404, b"the metrics are at /metrics\n")
        if request.method not in ("GET", "HEAD"):
            return Response(405, b"only GET and HEAD are allowed\n", headers=(("Allow", "GET, HEAD"),))
        try:
            kind, body = expose(families_of(self._board.read()), request.headers.get("accept", ""))
        except OomsafeError:
            return Response(503, b"the pool's scoreboard can't be read\n")
        return Response(200, body, kind)

    def _is_own(self, host: str | None) -> bool:
        """Whether this Host header names this server. None is an HTTP/1.0 client's; browsers always send one."""
        if host is None or self._names is None:
            return True
        name, colon, port = (host, "", "") if host.endswith("]") else host.partition(":") if host[:1] != "[" else host.rpartition(":")
        return name.lower() in self._names and (not colon or port.isdigit())

    def _knows(self, authorization: str) -> bool:
        from hmac import compare_digest  # here: it loads OpenSSL (3 MiB), which only a token needs

        scheme, _, given = authorization.partition(" ")
        return scheme.lower() == "bearer" and compare_digest(given.strip().encode(), self._token.encode())


class _Ended(Exception):
    """The supervisor is gone, or wants this process to end."""


def _end() -> None:
    raise _Ended


def _is_left_over(path: str) -> bool:
    """Whether this is a socket of this user, not a link to one, and no process listens on it."""
    try:
        found = os.lstat(path)
    except OSError:
        return False
    if not stat.S_ISSOCK(found.st_mode) or found.st_uid != os.geteuid():
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)  # a listener with a full backlog would make this wait
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
    return False


def main(address: str, board: str, supervisor: str, score: str) -> None:
    """Run the process. The arguments are the address, the scoreboard's descriptor, the supervisor's pid, and the least oom_score_adj."""
    link = socket.socket(fileno=0)
    set_comm(COMM)
    os.chdir("/")
    try:
        if (present := read_score()) is not None and present < int(score):
            write_score(int(score))
    except ScoreRefused:
        pass  # this process is small, so the kernel kills a worker first anyway
    token = _first_line(link)
    Exporter(link, Reader.inherited(int(board)), parse_address(address), token, int(supervisor)).run()


def _first_line(link: socket.socket) -> str:
    """The token, or nothing. Raises EOFError if the supervisor is gone before it has sent it."""
    said = b""
    while not said.endswith(b"\n"):
        received = link.recv(4096)
        if not received:
            raise EOFError("the supervisor is gone")
        said += received
    return said.decode().rstrip("\n")
