"""Functions for `on_death`."""

from __future__ import annotations

import time

from oomsafe import DeathRecord


def died(death: DeathRecord) -> None:
    """Leave a line."""
    with open("died", "a") as file:
        file.write(f"{death.end} {death.pid}\n")


def hangs(death: DeathRecord) -> None:
    """Call died(), and stay."""
    died(death)
    time.sleep(600)


def fails(death: DeathRecord) -> None:
    """Call died(), and raise."""
    died(death)
    raise RuntimeError("no alert\nfor you")
