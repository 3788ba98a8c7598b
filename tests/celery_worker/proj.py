"""The Celery app under test: its broker, its pool and its policy come from the environment."""

from __future__ import annotations

import json
import os
import time

from celery import Celery

import oomsafe.celery

app = Celery("proj", broker=os.environ["BROKER"], backend=os.environ["BACKEND"])
app.conf.broker_connection_retry_on_startup = True
app.conf.update(json.loads(os.environ.get("CELERY_CONF", "{}")))
BALLAST = b"x" * (int(os.environ.get("BALLAST_MIB", "0")) << 20)
KEPT = []

if "POLICY" in os.environ:
    oomsafe.celery.install(app, **json.loads(os.environ["POLICY"]))
if "BY_HAND" in os.environ:
    from celery.signals import worker_process_init

    worker_process_init.connect(oomsafe.celery.worker_process_init)


class Subclass(MemoryError):
    """What some libraries raise."""


class Unpicklable(MemoryError):
    """What can't cross to another process."""

    def __init__(self, *args):
        super().__init__(*args)
        self.handle = open("/dev/null")  # noqa: SIM115

    def __reduce__(self):
        raise TypeError("not this one")


@app.task
def leak(number, kib):
    """Keep so much for ever."""
    KEPT.append(b"x" * (kib << 10))
    return number


@app.task
def about():
    """This child: its pid, its score, its name."""
    score, comm = (open(f"/proc/self/{name}").read().strip() for name in ("oom_score_adj", "comm"))  # noqa: SIM115
    return os.getpid(), int(score), comm


@app.task
def sleep(seconds):
    """Take a while."""
    time.sleep(seconds)
    return seconds


def run_out(how):
    """Run out of memory, one way or another."""
    if how == "plain":
        raise MemoryError("its own")
    if how == "subclass":
        raise Subclass("a library's")
    if how == "unpicklable":
        raise Unpicklable("with a handle")
    if how == "chained":
        try:
            raise ValueError("first")
        except ValueError as error:
            raise MemoryError("second") from error
    bytearray(1 << 60)


@app.task
def out_of_memory(how):
    """In the task."""
    run_out(how)


@app.task(acks_late=True)
def out_of_memory_late(how):
    """In the task, acknowledged after it."""
    run_out(how)


class Hooked(app.Task):
    """Whose hook fails."""

    def on_success(self, *args):
        raise MemoryError("in a hook")


@app.task(base=Hooked)
def out_of_memory_in_a_hook(how):
    """Around the task."""
    return how
