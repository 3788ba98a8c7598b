"""Tasks that hold memory until a file is there."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from proj import KEPT, app, at_speed, note


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


@app.task(acks_late=True, reject_on_worker_lost=True)
def ruin(number, first, go):
    """Keep `first` MiB until the file is there; then more than its cgroup has, with a MainProcess that can't see what becomes of it."""
    note(number)
    KEPT.append(b"x" * (first << 20))
    wait_for(go)
    os.kill(os.getppid(), signal.SIGSTOP)
    at_speed(lambda size: KEPT.append(b"x" * size), 4096)


@app.task(acks_late=True, reject_on_worker_lost=True)
def once_poison(number, flag):
    """More than its cgroup has, while the file is there; it goes with the first run."""
    note(number)
    if Path(flag).exists():
        Path(flag).unlink()
        at_speed(lambda size: KEPT.append(b"x" * size))
    return number


@app.task(bind=True, acks_late=True, reject_on_worker_lost=True)
def retries(self, number, flag):
    """The same, and then it is sent again by itself, to find the file once more."""
    if Path(flag).exists() or self.request.retries:
        return once_poison(number, flag)
    note(number)
    Path(flag).touch()
    raise self.retry(countdown=0)
