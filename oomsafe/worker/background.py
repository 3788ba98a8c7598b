"""How to run a slow function beside a worker's work."""

from __future__ import annotations

import threading
from collections.abc import Callable

Background = Callable[[Callable[[], None]], None]


def in_thread(function: Callable[[], None]) -> None:
    """Run a slow function beside an event loop: malloc_trim takes up to 9 ms, and releases the GIL."""
    threading.Thread(target=function, name="oomsafe", daemon=True).start()
