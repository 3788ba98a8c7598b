"""Memory against a limit, as a bar."""

from __future__ import annotations

from rich.text import Text


def memory_bar(used: int | None, limit: int | None, width: int = 24) -> Text:
    """`used` of `limit`, in bytes: green, yellow from three quarters, red above the limit; empty if either is not known."""
    if used is None or not limit:
        return Text("")
    share = used / limit
    filled = min(width, round(share * width))
    colour = "green" if share < 0.75 else "yellow" if share <= 1 else "red"
    return Text.assemble(("█" * filled, colour), ("░" * (width - filled), "dim"), f" {share:4.0%}")
