"""One HTTP/1 response, read from the bytes that have come so far. Knows when it is whole, and whether the connection stays."""

from __future__ import annotations

from dataclasses import dataclass


class MalformedError(ValueError):
    """What came can't be the beginning of a response whose end can be told."""


@dataclass(frozen=True)
class Response:
    """A whole response."""

    status: int
    body: bytes
    keeps: bool
    """Whether the connection stays: the server has not announced that it will close it."""


def parse(received: bytes) -> Response | None:
    """The response that `received` is; None while more must come. Raises MalformedError, also for bytes after its end.

    A response must say how long it is, by Content-Length or by chunks: one that goes on until the
    server closes can't be told from one that was cut short.
    """
    head, end, rest = received.partition(b"\r\n\r\n")
    if not end:
        return None
    first, *lines = head.split(b"\r\n")
    version, status = _status(first)
    fields = dict(_field(line) for line in lines)
    body = _body(fields, rest)
    if body is None:
        return None
    connection = fields.get(b"connection", b"")
    keeps = b"close" not in connection if version == b"HTTP/1.1" else b"keep-alive" in connection
    return Response(status, body, keeps)


def _status(line: bytes) -> tuple[bytes, int]:
    version, _, rest = line.partition(b" ")
    if version not in (b"HTTP/1.1", b"HTTP/1.0") or not rest[:3].isdigit():
        raise MalformedError(f"status line {line[:40]!r}")
    return version, int(rest[:3])


def _field(line: bytes) -> tuple[bytes, bytes]:
    """Lower case both: of the values, only tokens and numbers are looked at."""
    name, colon, value = line.lower().partition(b":")
    if not colon:
        raise MalformedError(f"header {line[:40]!r}")
    return name, value.strip()


def _body(fields: dict[bytes, bytes], rest: bytes) -> bytes | None:
    if fields.get(b"transfer-encoding") == b"chunked":
        return _chunks(rest)
    length = fields.get(b"content-length", b"")
    if not length.isdigit():
        raise MalformedError("neither Content-Length nor chunks")
    if len(rest) > int(length):
        raise MalformedError("bytes after the end")
    return rest if len(rest) == int(length) else None


def _chunks(rest: bytes) -> bytes | None:
    """The chunks' content joined; trailers are not expected of the servers measured here."""
    found = []
    while True:
        size, end, rest = rest.partition(b"\r\n")
        if not end:
            return None
        length = _size(size)
        if len(rest) < length + 2:
            return None
        if rest[length : length + 2] != b"\r\n":
            raise MalformedError("a chunk that does not end where it said")
        found.append(rest[:length])
        rest = rest[length + 2 :]
        if not length:
            break
    if rest:
        raise MalformedError("bytes after the end")
    return b"".join(found)


def _size(line: bytes) -> int:
    try:
        return int(line.partition(b";")[0], 16)
    except ValueError:
        raise MalformedError(f"chunk size {line[:20]!r}") from None
