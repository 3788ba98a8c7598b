"""Celery with Redis: a child that has grown too big ends between two tasks, and another takes its place."""

import os

from celery import Celery

import oomsafe.celery

REDIS = os.environ.get("REDIS_URL", "redis://127.0.0.1:6379")

app = Celery("app", broker=f"{REDIS}/0", backend=f"{REDIS}/1")
app.conf.broker_connection_retry_on_startup = True
app.conf.worker_prefetch_multiplier = 1  # tasks that a node has prefetched stay with it while it is above its budget

oomsafe.celery.install(app, soft_limit="150MiB", min_lifetime=2)

_kept = []


@app.task
def leak(kib: int) -> int:
    """Keep some memory forever, as an unbounded cache does."""
    _kept.append(b"x" * (kib << 10))
    return len(_kept)


@app.task
def report(mib: int) -> int:
    """Take memory and give it back: this is not a leak."""
    return len(bytearray(b"x" * (mib << 20)))


@app.task
def balloon() -> int:
    """Ask for more memory than any machine has: the MemoryError fails only this task."""
    return len(bytes(1 << 46))
