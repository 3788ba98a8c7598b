"""Every exception that oomsafe raises. Each message names the number, the limit and the way out."""

from __future__ import annotations


class OomsafeError(Exception):
    """The base of all of oomsafe's errors."""


class ConfigError(OomsafeError, ValueError):
    """A setting that can't be right on any machine: one line with the field, the value and a correct example."""


class ScoreRefused(OomsafeError):
    """The kernel did not take an oom_score_adj: the message says which capability or privilege was missing."""


class ScoreboardError(OomsafeError):
    """A scoreboard that can't be made, opened or believed."""


class TaskMemoryError(OomsafeError):
    """A task ran out of memory: a MemoryError of its own, in words. Never a MemoryError: that would end what supervises it."""
