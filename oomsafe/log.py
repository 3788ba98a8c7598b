"""Where our lines go, what is said only once, and what becomes of our own failures: said once each, and the server goes on."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Hashable
from typing import TypeVar

T = TypeVar("T")

_said: set[Hashable] = set()


class Heard(logging.Logger):
    """A logger whose lines go where the server's go, whatever the app does to logging.

    ``dictConfig()`` and ``fileConfig()`` disable every logger that they find and don't name; the server's
    handlers stay with its own loggers. What the user says of this logger by name holds: its level, its
    handlers (then its lines go there, and not to the server's as well), ``disabled``.
    """

    server: logging.Logger | None = None

    @property
    def disabled(self) -> bool:
        """Whether it says nothing."""
        return bool(vars(self).get("disabled"))

    @disabled.setter
    def disabled(self, value: bool) -> None:
        if not value or sys._getframe(1).f_globals.get("__name__") != "logging.config":
            vars(self)["disabled"] = value

    @property
    def parent(self) -> logging.Logger | None:
        """Whose handlers have its lines, and whose level is its own where it has none."""
        own: logging.Logger | None = vars(self).get("parent")
        return own if self.server is None or self.handlers else self.server

    @parent.setter
    def parent(self, value: logging.Logger | None) -> None:
        vars(self)["parent"] = value

    def isEnabledFor(self, level: int) -> bool:  # noqa: N802  logging's name
        """Not remembered, as Logger does it: the server's level may not be known yet."""
        return not self.disabled and self.manager.disable < level and level >= self.getEffectiveLevel()


def _heard(logger: logging.Logger) -> Heard:
    """The same object, for others may hold it: the user may have set its level before we are imported."""
    logger.disabled = False
    logger.__class__ = type("Heard", (Heard, type(logger)), {})
    assert isinstance(logger, Heard)
    return logger


log = _heard(logging.getLogger("oomsafe"))


def log_with(theirs: logging.Logger) -> None:
    """Have our lines go where the server's go, also when its log is set up anew; not while the user has handlers for us."""
    log.server = theirs


def once(key: Hashable, level: int, message: str, *figures: object, exc_info: BaseException | None = None) -> None:
    """Log a message, the first time that this process meets `key`; what it was forked from has said before counts."""
    if key not in _said:
        _said.add(key)
        log.log(level, message, *figures, exc_info=exc_info)


def said() -> frozenset[str]:
    """What a process that is spawned needn't say again, for was_said(): a fork has it by itself."""
    return frozenset(key for key in _said if isinstance(key, str))


def was_said(keys: frozenset[str]) -> None:
    """In a spawned process: its parent has said these."""
    _said.update(keys)


def say_off() -> None:
    """That OOMSAFE_DISABLE is set: what does nothing must not look as if it did."""
    once("off", logging.WARNING, "oomsafe is off (OOMSAFE_DISABLE is set): nothing is measured, and no limit holds")


def attempt(what: str, server: str, function: Callable[[], T]) -> T | None:
    """What `function` gives; None when it fails, which is logged once for each kind: `server` goes on."""
    try:
        return function()
    except Exception as error:
        failed(what, server, error)
        return None


def failed(what: str, server: str, error: Exception) -> None:
    """The same, for those who can't spare the two calls of attempt()."""
    key = ("failed", what, type(error))
    once(key, logging.ERROR, "oomsafe failed in %s (%s goes on): %r", what, server, error, exc_info=error)
