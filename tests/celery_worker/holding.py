"""Tasks that hold memory until a file is there."""

from __future__ import annotations

import os
import time
from pathlib import Path

from proj import KEPT, app


def wait_for(path):
    """Until it is there."""
    while not Path(path).exists():
        time.sleep(0.01)


@app.task
def hold(begin, mib, end):
    """From the file `begin` to the file `end`, and give it back."""
    wait_for(begin)
    held = bytearray(mib << 20)
    held[:: 1 << 12] = b"x" * len(held[:: 1 << 12])
    wait_for(end)
    return len(held) >> 20


@app.task
def keep(mib, end):
    """For ever; returns when the file is there."""
    KEPT.append(b"x" * (mib << 20))
    wait_for(end)
    return os.getpid()


@app.task
def pid():
    """Whose child has run it."""
    return os.getppid()
