"""Tasks that hold memory until a file is there."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from proj import KEPT, app, note


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


@app.task(acks_late=True, reject_on_worker_lost=True)
def late(number, end):
    """Until the file is there; each run is noted."""
    note(number)
    wait_for(end)
    return number


@app.task(acks_late=True, reject_on_worker_lost=True)
def curt(number, end):
    """The same, and the first signal ends it with its child, without a word."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    note(number)
    wait_for(end)
    return number


@app.task(acks_late=True, reject_on_worker_lost=True)
def stubborn(number, end):
    """The same, and nothing but SIGKILL ends it before."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    note(number)
    wait_for(end)
    return number
