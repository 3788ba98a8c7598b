"""Memory against a limit, as a bar."""

from __future__ import annotations

from rich.text import Text


def memory_bar(used: int | None, limit: int | None, width: int = 24, *, ascii_only: bool = False) -> Text:
    """`used` of `limit` in bytes: green, yellow from three quarters, red above; empty where one is not known."""
    if used is None or not limit:
        return Text("")
    share = used / limit
    filled = min(width, round(share * width))
    colour = "green" if share < 0.75 else "yellow" if share <= 1 else "red"
    full, free = ("#", ".") if ascii_only else ("█", "░")
    return Text.assemble((full * filled, colour), (free * (width - filled), "dim"))
