"""What a test needs and a laptop may lack: it skips there, and fails where everything must be tested."""

from __future__ import annotations

import inspect
import os

import pytest
import starlette.routing


def need(condition: bool, reason: str) -> None:
    """Go on if `condition` holds; else skip with `reason`, or fail when OOMSAFE_TESTS_REQUIRE=all."""
    if condition:
        return
    if os.environ.get("OOMSAFE_TESTS_REQUIRE") == "all":
        pytest.fail(f"required here: {reason}")
    pytest.skip(reason)


def provided(condition: bool, reason: str) -> None:
    """Skip where what is installed does not have what is tested: a matter of its version, whatever is required."""
    if not condition:
        pytest.skip(reason)


def provided_routes() -> None:
    """Skip where Starlette does not put the route that it took into the scope."""
    names = 'scope["route"]' in inspect.getsource(starlette.routing)
    provided(names, f"Starlette {starlette.__version__} does not say which route it took")
