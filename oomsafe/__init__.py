"""Keeps a Python service up when its workers run out of memory. Importing it does nothing else."""

from __future__ import annotations

TYPE_CHECKING = False  # typing's own costs 5 ms to import
if TYPE_CHECKING:
    from oomsafe.errors import ConfigError, OomsafeError, ScoreboardError, ScoreRefused
    from oomsafe.policy.death_line import DeathRecord
    from oomsafe.policy.settings import Policy
    from oomsafe.worker.current import probe
    from oomsafe.worker.guard import Guard

__version__ = "0.1.0"

__all__ = ["ConfigError", "DeathRecord", "Guard", "OomsafeError", "Policy", "ScoreRefused", "ScoreboardError", "probe"]


def __getattr__(name: str) -> object:
    """Import each public name on first use (PEP 562), so that an adapter only pays for what it uses."""
    from importlib import import_module

    homes = {
        "DeathRecord": "oomsafe.policy.death_line", "Policy": "oomsafe.policy.settings", "Guard": "oomsafe.worker.guard",
        "probe": "oomsafe.worker.current",
    }  # fmt: skip
    if name not in __all__:
        raise AttributeError(f"module 'oomsafe' has no attribute {name!r}")
    return getattr(import_module(homes.get(name, "oomsafe.errors")), name)
