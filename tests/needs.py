"""What a test needs and a laptop may lack: it skips there, and fails where everything must be tested."""

from __future__ import annotations

import os

import pytest

from oomsafe.kernel.sandbox import Sandbox


def need(condition: bool, reason: str) -> None:
    """Go on if `condition` holds; else skip with `reason`, or fail when OOMSAFE_TESTS_REQUIRE=all."""
    if condition:
        return
    if os.environ.get("OOMSAFE_TESTS_REQUIRE") == "all":
        pytest.fail(f"required here: {reason}")
    pytest.skip(reason)


def a_cgroup_can_be_made() -> bool:
    """With a memory limit, below this process's."""
    try:
        with Sandbox(f"oomsafe-test-{os.getpid()}-demo", 64 << 20):
            return True
    except OSError:
        return False
