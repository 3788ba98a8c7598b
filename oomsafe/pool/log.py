"""Where our lines go, and what becomes of our own failures: one line each, and the server goes on."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

log = logging.getLogger("oomsafe")

_said: set[tuple[str, type]] = set()


def log_with(theirs: logging.Logger) -> None:
    """Have our lines go where the server's go, also when its log is set up anew; not if the user has handlers for us."""
    if not log.handlers:
        log.parent = theirs


def attempt(what: str, server: str, function: Callable[[], T]) -> T | None:
    """What `function` gives; None when it fails, which is logged once for each kind: `server` goes on."""
    try:
        return function()
    except Exception as error:
        failed(what, server, error)
        return None


def failed(what: str, server: str, error: Exception) -> None:
    """The same, for those who can't spare the two calls of attempt()."""
    if (what, type(error)) not in _said:
        _said.add((what, type(error)))
        log.error("oomsafe failed in %s (%s goes on): %r", what, server, error, exc_info=error)
