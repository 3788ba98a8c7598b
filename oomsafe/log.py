"""Where our log lines go, lines that are logged only once, and our own failures: each is logged once, and the server goes on."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Hashable
from typing import TypeVar

T = TypeVar("T")

_said: set[Hashable] = set()


class Heard(logging.Logger):
    """A logger whose lines go where the server's go, whatever the app does to logging.

    ``dictConfig()`` and ``fileConfig()`` disable every existing logger that they don't name; the server's
    handlers stay attached to its own loggers. What the user sets for this logger by name still applies: its level, its
    handlers (its lines then go only there), ``disabled``.
    """

    server: logging.Logger | None = None

    @property
    def disabled(self) -> bool:
        """Whether it drops all lines."""
        return bool(vars(self).get("disabled"))

    @disabled.setter
    def disabled(self, value: bool) -> None:
        if not value or sys._getframe(1).f_globals.get("__name__") != "logging.config":
            vars(self)["disabled"] = value

    @property
    def parent(self) -> logging.Logger | None:
        """The logger whose handlers get its lines, and whose level applies if it has none."""
        own: logging.Logger | None = vars(self).get("parent")
        return own if self.server is None or self.handlers else self.server

    @parent.setter
    def parent(self, value: logging.Logger | None) -> None:
        vars(self)["parent"] = value

    def isEnabledFor(self, level: int) -> bool:  # noqa: N802  logging's name
        """Computed each time, not cached as in Logger, because the server's level may not be known yet."""
        return not self.disabled and self.manager.disable < level and level >= self.getEffectiveLevel()


def _heard(logger: logging.Logger) -> Heard:
    """Turn `logger` itself into a Heard. Not a new object, because the user may have set its level before we are imported."""
    logger.disabled = False
    logger.__class__ = type("Heard", (Heard, type(logger)), {})
    assert isinstance(logger, Heard)
    return logger


log = _heard(logging.getLogger("oomsafe"))


def log_with(theirs: logging.Logger) -> None:
    """Send our lines where `theirs`, the server's logger, sends its own, unless the user has set handlers for ours."""
    log.server = theirs


def once(key: Hashable, level: int, message: str, *figures: object, exc_info: BaseException | None = None) -> None:
    """Log a message if this is the first call with `key` in this process; calls in its parent before the fork count."""
    if key not in _said:
        _said.add(key)
        log.log(level, message, *figures, exc_info=exc_info)


def said() -> frozenset[str]:
    """The keys that a spawned process need not log again, for was_said(); a fork inherits them."""
    return frozenset(key for key in _said if isinstance(key, str))


def was_said(keys: frozenset[str]) -> None:
    """In a spawned process: the parent has logged these keys."""
    _said.update(keys)


def say_off() -> None:
    """Log that OOMSAFE_DISABLE is set, so that a disabled oomsafe is not taken for a working one."""
    once("off", logging.WARNING, "oomsafe is off (OOMSAFE_DISABLE is set): nothing is measured, and no limit holds")


def attempt(what: str, server: str, function: Callable[[], T]) -> T | None:
    """The result of `function`; None if it fails. A failure is logged once for each type of exception, and `server` goes on."""
    try:
        return function()
    except Exception as error:
        failed(what, server, error)
        return None


def failed(what: str, server: str, error: Exception) -> None:
    """Log a failure as attempt() does, for code that can't afford attempt()'s two calls."""
    key = ("failed", what, type(error))
    once(key, logging.ERROR, "oomsafe failed in %s (%s goes on): %r", what, server, error, exc_info=error)
