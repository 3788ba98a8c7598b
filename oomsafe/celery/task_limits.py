"""The memory limits of one task: those of its decorator, else the app's; the caller's headers may lower them.

``@app.task(soft_memory_limit="300MiB", memory_limit="500MiB")``, ``memory_absolute=True``, or a limit of None to
lift the app's; ``task.apply_async(headers={"memory_limit": "200MiB"})``. The sender of a message is not trusted
to take more than the app allows, so a header can only lower a limit.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from celery.exceptions import ImproperlyConfigured

from oomsafe.errors import ConfigError
from oomsafe.log import log, once
from oomsafe.policy.ceilings import Ceiling, in_order, lowered
from oomsafe.policy.limits import Capacity, Limits, in_bytes
from oomsafe.policy.readers import read_hard_limit, read_switch
from oomsafe.policy.settings import Policy
from oomsafe.policy.text import printable
from oomsafe.policy.units import format_size

SOFT, HARD, ABSOLUTE = "soft_memory_limit", "memory_limit", "memory_absolute"


class TaskLimits:
    """The limits of all tasks of one app, in MainProcess or in a solo node. `conf` is the app's."""

    def __init__(self, policy: Policy, conf: Mapping[str, Any], capacity: Capacity, limits: Limits) -> None:
        """Raises ConfigError for an invalid default in the app's conf."""
        self._of: dict[str, Ceiling] = {}
        self._tasks: Mapping[str, Any] = {}
        self._defaults = tuple(
            _first(f"task_{name}", getattr(policy, f"task_{name}"), conf, read)
            for name, read in ((SOFT, read_hard_limit), (HARD, read_hard_limit), (ABSOLUTE, read_switch))
        )
        self._reckon(capacity, limits)

    def _reckon(self, capacity: Capacity, limits: Limits) -> None:
        self._capacity, self._limits = capacity, limits
        soft, hard, absolute = self._defaults
        self.default = in_order(Ceiling(self._bytes(soft), self._bytes(hard), bool(absolute)))
        self._warn("task_", self.default)

    def read(self, tasks: Mapping[str, Any]) -> None:
        """Read the tasks' own limits, once. Raises ConfigError with the task's name for an invalid one."""
        self._tasks = tasks
        for name, task in tasks.items():
            own = self._own(name, task)
            if own != self.default:
                self._of[name] = own
                self._warn(f"task {printable(name)}: ", own)

    def follow(self, capacity: Capacity, limits: Limits) -> None:
        """The effective limit may have changed: from now on, tasks are handed out with limits that are shares of the new one."""
        if capacity.effective != self._capacity.effective:
            self._of = {}
            self._reckon(capacity, limits)
            self.read(self._tasks)

    def of(self, name: str, headers: Mapping[str, Any]) -> Ceiling | None:
        """The limits for one message for the task `name`; None if it has none."""
        ceiling = self._of.get(name, self.default)
        if SOFT in headers or HARD in headers:
            asked = Ceiling(self._asked(name, SOFT, headers.get(SOFT)), self._asked(name, HARD, headers.get(HARD)))
            ceiling = in_order(lowered(ceiling, asked))
        return ceiling if ceiling.soft is not None or ceiling.hard is not None else None

    def _own(self, name: str, task: Any) -> Ceiling:
        try:
            soft, hard = (
                self._bytes(read_hard_limit(field, getattr(task, field))) if hasattr(task, field) else default
                for field, default in ((SOFT, self.default.soft), (HARD, self.default.hard))
            )
            absolute = read_switch(ABSOLUTE, getattr(task, ABSOLUTE, self.default.absolute))
        except ConfigError as error:
            raise ConfigError(f"task {printable(name)}: {error}") from None
        return in_order(Ceiling(soft, hard, absolute))

    def _asked(self, name: str, field: str, value: object) -> int | None:
        try:
            return self._bytes(read_hard_limit(field, value))
        except ConfigError as error:
            # logged once, because its sender may send many
            once(("header", name, field), logging.WARNING, "task %s: ignoring a header: %s", printable(name), error)
            return None

    def _bytes(self, size: Any) -> int | None:
        return in_bytes(size, self._capacity.effective)

    def _warn(self, where: str, ceiling: Ceiling) -> None:
        effective = self._capacity.effective
        for field, size in ((SOFT, ceiling.soft), (HARD, ceiling.hard)):
            if size is not None and effective is not None and size > effective:
                above = f"the effective limit {format_size(effective)}: the kernel kills first"
            elif size is not None and self._limits.hard is not None and size > self._limits.hard:
                above = f"the pool's hard_limit {format_size(self._limits.hard)}: the child is recycled after each task that meets that one"
            else:
                continue
            log.warning("%s%s %s is above %s", where, field, format_size(size), above)


def limits_of(app: Any, policy: Policy, capacity: Capacity, limits: Limits) -> TaskLimits:
    """The limits of all tasks of `app`; None: the pool has no app. Raises Celery's ImproperlyConfigured for an invalid limit."""
    try:
        found = TaskLimits(policy, app.conf if app else {}, capacity, limits)
        found.read(app.tasks if app else {})
    except ConfigError as error:
        raise ImproperlyConfigured(f"oomsafe: {error}") from None
    return found


def task_of(args: Any) -> tuple[str, str, Mapping[str, Any]]:
    """(name, id, the message's headers) among the arguments of Celery's tracer."""
    return (str(args[0]), str(args[1]), args[2]) if len(args) > 2 and isinstance(args[2], dict) else ("?", "?", {})


def _first(field: str, given: Any, conf: Mapping[str, Any], read: Callable[[str, object], Any]) -> Any:
    """The value from install() or the environment, else the app's conf's."""
    return given if given else read(field, found) if (found := conf.get(field)) is not None else given
