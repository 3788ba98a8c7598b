"""``oomsafe top``: every pool of this machine, live. observer.py reads, lines.py formats, screen.py shows."""

from oomsafe.cli.top.command import top

__all__ = ["top"]
