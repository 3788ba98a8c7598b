"""The memory headers of a response, for people, proxies and a browser's timing tab."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from oomsafe.policy.units import format_change, format_size
from oomsafe.worker.meter import Present, Work

#: The request header that must carry the secret, if one is set; its names in WSGI and ASGI.
TOKEN_WSGI = "HTTP_X_MEMORY_TOKEN"  # noqa: S105  the name of a header
TOKEN_ASGI = b"x-memory-token"


class Made(NamedTuple):
    """The memory headers for certain figures."""

    of: Present | None
    text: list[tuple[str, str]]
    raw: list[tuple[bytes, bytes]]


#: The latest headers. They are built again only when a figure has changed: if nothing grows, never.
_made = Made(None, [], [])


def headers_of(work: Work) -> Made:
    """The memory headers for `work` now; empty while there are no figures."""
    global _made
    present, made = work.meter.present(work), _made
    if present is not made.of:
        text = [] if present is None else memory_headers(present.rss, present.grown, present.limit)
        _made = made = Made(present, text, [(name.lower().encode("ascii"), figure.encode("ascii")) for name, figure in text])
    return made


def announces(setting: bool | str, work: Work, token: Callable[[], str | bytes | None]) -> bool:
    """Whether to put memory headers on this response: only if the client may see them, and only once, in case of nested middleware.

    `work.announced` is set only if this returns True; otherwise an inner middleware that has headers on would leave them to this one.
    """
    if not setting or work.announced or not (setting is True or may_see(setting, token())):
        return False
    work.announced = True
    return True


def memory_headers(rss: int, delta: int, limit: int | None) -> list[tuple[str, str]]:
    """Headers for figures in bytes; `delta` is signed; `limit` None omits X-Memory-Limit.

    Server-Timing only has dur (milliseconds) and desc, so the memory goes into desc (W3C Server Timing, 2.1).
    """
    headers = [
        ("X-Memory-RSS", str(rss)),
        ("X-Memory-Delta", str(delta)),
        ("Server-Timing", f'mem;desc="{format_size(rss)}, {format_change(delta)}"'),
    ]
    if limit is not None:
        headers.append(("X-Memory-Limit", str(limit)))
    return headers


def may_see(setting: bool | str, token: str | bytes | None) -> bool:
    """Whether a request with this token may see memory figures. Takes the same time for every wrong token."""
    if isinstance(setting, bool):
        return setting
    if token is None:
        return False
    from hmac import compare_digest  # imported here: hmac loads OpenSSL, which a worker without a secret need not pay for

    given = token.encode("latin-1", "replace") if isinstance(token, str) else token
    return compare_digest(given, setting.encode("ascii"))
