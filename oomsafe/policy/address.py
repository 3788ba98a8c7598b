"""Where metrics are served: an IP address and port, or a Unix socket."""

from __future__ import annotations

from ipaddress import ip_address
from typing import NamedTuple

#: The prefix of a Unix socket's path.
UNIX = "unix:"

#: The most bytes of a Unix socket's path (sun_path in unix(7), less the final zero).
PATH_MAX = 107

#: The name that every machine has for itself.
LOCALHOST = "localhost"


class Address(NamedTuple):
    """One place to listen."""

    host: str
    """An IP address without brackets; for a Unix socket its path."""
    port: int | None
    """0: any free port; None: this is a Unix socket."""

    @property
    def is_private(self) -> bool:
        """Whether only processes on this machine can reach it: a loopback address, or a Unix socket."""
        return self.port is None or ip_address(self.host).is_loopback

    @property
    def is_ipv6(self) -> bool:
        """Whether its socket must be of family AF_INET6."""
        return self.port is not None and ":" in self.host

    @property
    def url(self) -> str:
        """The URL of the metrics; for a Unix socket, the same text as in ``metrics=``."""
        return str(self) if self.port is None else f"http://{self}/metrics"

    def __str__(self) -> str:
        if self.port is None:
            return f"{UNIX}{self.host}"
        return f"[{self.host}]:{self.port}" if self.is_ipv6 else f"{self.host}:{self.port}"


def parse_address(text: str) -> Address:
    """Read ``127.0.0.1:9400``, ``[::1]:9400``, ``localhost:9400`` or ``unix:/a/path``. Raises ValueError, which says what is wrong."""
    text = text.strip()
    if text.startswith(UNIX):
        return _socket(text[len(UNIX) :])
    host, colon, port = text.rpartition(":")
    if not colon or "/" in text:
        raise ValueError("is neither HOST:PORT nor unix:/PATH")
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and int(port) <= 65535):
        raise ValueError("has no port from 0 to 65535")
    return Address(_host(host), int(port))


def _host(text: str) -> str:
    if not text:
        raise ValueError("has no host (all addresses of the machine are 0.0.0.0)")
    if text.lower() == LOCALHOST:
        return "127.0.0.1"
    bare = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    try:
        found = ip_address(bare)
    except ValueError:
        raise ValueError("has a host that is neither an IP address nor localhost") from None
    if (found.version == 6) != (bare != text) or "%" in bare:
        raise ValueError("has a host that is neither an IPv4 address nor an IPv6 address in brackets")
    return str(found)


def _socket(path: str) -> Address:
    if not path.startswith("/") or path.endswith("/") or not path.isprintable():
        raise ValueError("is not the absolute path of a socket")
    if len(path.encode()) > PATH_MAX:
        raise ValueError(f"is longer than the {PATH_MAX} bytes that a socket's path may have")
    return Address(path, None)
