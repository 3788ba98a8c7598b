"""A memory cgroup for the servers under test."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator

import pytest
from needs import need

from oomsafe.demo.server_process import remove
from oomsafe.kernel.cgroup import find_cgroup
from oomsafe.kernel.sandbox import Sandbox

_numbers = itertools.count()


@pytest.fixture
def cgroup() -> Iterator[Callable[..., Sandbox]]:
    """cgroup(limit): a child memory cgroup with a limit in bytes, removed after the test. Ask for it before `serve`.

    cgroup(limit, inside): one inside of another, whose limit may be None.
    """
    need(os.geteuid() == 0, "only root makes cgroups")
    need(find_cgroup() is not None, "no memory controller is mounted")
    made: list[Sandbox] = []

    def make(limit: int | None, inside: Sandbox | None = None) -> Sandbox:
        made.append(Sandbox(f"oomsafe-test-{os.getpid()}-{next(_numbers)}", limit, inside))
        return made[-1]

    yield make
    for sandbox in reversed(made):
        remove(sandbox)
