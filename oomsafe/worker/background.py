"""How something slow is run beside a worker's work."""

from __future__ import annotations

import threading
from collections.abc import Callable

Background = Callable[[Callable[[], None]], None]


def in_thread(function: Callable[[], None]) -> None:
    """Run something slow beside an event loop: malloc_trim takes up to 9 ms, and lets go of the GIL."""
    threading.Thread(target=function, name="oomsafe", daemon=True).start()
