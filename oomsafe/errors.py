"""Every exception that oomsafe raises. Each message names the figure, the limit and the remedy."""

from __future__ import annotations


class OomsafeError(Exception):
    """The base of all of oomsafe's errors."""


class ConfigError(OomsafeError, ValueError):
    """A setting that can't be right on any machine: one line with the field, the value and a correct example."""


class ScoreRefused(OomsafeError):
    """The kernel refused an oom_score_adj: the message says which capability or privilege is missing."""


class ScoreboardError(OomsafeError):
    """A scoreboard can't be created, opened or trusted."""


class KernelLogError(OomsafeError):
    """A kernel log can't be read: the message says why, and which permission or other way would help."""


class SoftMemoryLimitExceeded(OomsafeError):
    """Raised inside a task that uses more than its soft limit: catch it, release memory, end. Its args: (task, used, limit), in bytes."""

    def __str__(self) -> str:
        return _over("soft memory limit", self.args)


class MemoryLimitExceeded(OomsafeError):
    """The result of a task that was stopped at its memory limit, or asked for more. Its args: (task, used, limit), in bytes."""

    def __str__(self) -> str:
        return _over("memory limit", self.args)


class TaskMemoryError(OomsafeError):
    """A task ran out of memory: its MemoryError, as text. Not itself a MemoryError, because that would end the supervisor."""


def _over(which: str, figures: tuple[object, ...]) -> str:
    # a result backend may return anything
    if len(figures) != 3 or not all(isinstance(figure, int) for figure in figures[1:]):
        return " ".join(map(str, figures))
    sizes = [figure for figure in figures[1:] if isinstance(figure, int)]
    used, limit = (f"{size / (1 << 20):.1f} MiB" for size in sizes)
    refused = f"asked for more than its {which} {limit}, and still used {used}"
    over = f"used {used} > its {which} {limit}" if sizes[0] > sizes[1] else refused
    return f"task {figures[0]} {over}; raise the limit, or have the task use less at a time"
