"""Keeps a Python service up when its workers run out of memory. Importing it does nothing else."""

from __future__ import annotations

from oomsafe.errors import ConfigError, OomsafeError, ScoreboardError, ScoreRefused
from oomsafe.policy.settings import Policy
from oomsafe.pool.guard import Guard

__version__ = "0.1.0"

__all__ = ["ConfigError", "Guard", "OomsafeError", "Policy", "ScoreRefused", "ScoreboardError"]
