"""Warnings of the kernel room are said once a process: each test begins with none said."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
from hypothesis import settings

from oomsafe import log

settings.register_profile("oomsafe", deadline=None, database=None)
settings.load_profile("oomsafe")


@pytest.fixture(autouse=True)
def _unsaid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "_said", set())


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What the kernel room has logged until now."""
    caplog.set_level(logging.DEBUG, logger="oomsafe")
    return lambda: [record.getMessage() for record in caplog.records if record.name.startswith("oomsafe")]
