"""The memory limits of tasks, as MainProcess reckons them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("celery")

from unit.scripted import CGROUP

from oomsafe.celery.task_limits import TaskLimits
from oomsafe.policy.ceilings import Ceiling
from oomsafe.policy.limits import Capacity, Limits
from oomsafe.policy.settings import Policy

MIB = 1 << 20


def test_shares_follow_a_limit_that_moves() -> None:
    """Of an app's default and of a task's own; what is given in bytes stays."""
    none = Limits(soft=None)
    limits = TaskLimits(Policy(task_memory_limit="50%"), {}, Capacity(600 * MIB, CGROUP), none)
    tasks: dict[str, Any] = {"own": SimpleNamespace(memory_limit="10%"), "fixed": SimpleNamespace(memory_limit=40 * MIB)}
    limits.read(tasks)

    def hard(name: str) -> int | None:
        ceiling: Ceiling | None = limits.of(name, {})
        return None if ceiling is None or ceiling.hard is None else ceiling.hard // MIB

    assert [hard(name) for name in ("any", "own", "fixed")] == [300, 60, 40]
    limits.follow(Capacity(300 * MIB, CGROUP, others=100 * MIB), none)
    assert [hard(name) for name in ("any", "own", "fixed")] == [150, 30, 40]
