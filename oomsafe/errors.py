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


class SoftMemoryLimitExceeded(OomsafeError):
    """Raised inside a task that has used more than its soft limit: catch it, let go, and end. Made of (task, used, limit), in bytes."""

    def __str__(self) -> str:
        return _over("soft memory limit", self.args)


class MemoryLimitExceeded(OomsafeError):
    """The result of a task that was stopped at its memory limit. Made of (task, used, limit), in bytes."""

    def __str__(self) -> str:
        return _over("memory limit", self.args)


class TaskMemoryError(OomsafeError):
    """A task ran out of memory: a MemoryError of its own, in words. Never a MemoryError: that would end what supervises it."""


def _over(which: str, figures: tuple[object, ...]) -> str:
    # a result backend may give back what it likes
    if len(figures) != 3 or not all(isinstance(figure, int) for figure in figures[1:]):
        return " ".join(map(str, figures))
    used, limit = (f"{figure / (1 << 20):.1f} MiB" for figure in figures[1:] if isinstance(figure, int))
    return f"task {figures[0]} used {used} > its {which} {limit}; raise the limit, or have it take less at a time"
