"""A preloading gunicorn: its workers share what it has loaded until the end, and nothing is lost at that end."""

from __future__ import annotations

import pytest
from serving import ASGI_CLASSES, CLASSES, until

HOOK = """
import os
preload_app = True

def worker_exit(server, worker):
    os.write(1, f"[{os.getpid()}] worker_exit\\n".encode())
"""


def preloading(serve, worker_class, mib=40, **policy):
    """One worker whose master has loaded so much."""
    app = "preloaded:asgi" if worker_class in ASGI_CLASSES else "preloaded:wsgi"
    policy = {"soft_limit": "200MiB", "jitter": 0, "min_lifetime": 0, **policy}
    return serve(worker_class, 1, app=app, settings=HOOK, env={"PRELOAD_MIB": str(mib)}, **policy).serving(1)


@pytest.mark.parametrize("worker_class", CLASSES)
def test_a_recycled_worker_ends_without_a_walk(serve, worker_class):
    """Its hooks, what is registered, what threads write and what files hold are there; the heap was left alone."""
    gunicorn = preloading(serve, worker_class)
    (pid,) = gunicorn.workers()

    gunicorn.get("/note")
    gunicorn.get("/fill?mib=210")
    until(lambda: pid not in gunicorn.workers(), "the worker is gone")

    assert gunicorn.lines("stay shared with the workers")
    ends = [line for line in gunicorn.lines(f"[{pid}]") if line.endswith(("worker_exit", "at exit", "walked"))]
    assert [line.partition("] ")[2] for line in ends] == ["worker_exit", "at exit"]
    audit = (gunicorn.folder / "audit").read_text().splitlines()
    assert audit == [str(pid), f"{pid} at the end"]
    assert not gunicorn.lines("oomsafe failed in")
    assert not gunicorn.lines("Worker exited with code")


@pytest.mark.parametrize(("mib", "policy"), [(40, {"freeze_preload": False}), (1, {})], ids=["off", "little-preloaded"])
def test_otherwise_the_interpreter_ends_it(serve, mib, policy):
    """With all of that, and a walk; what is off is said to be off."""
    gunicorn = preloading(serve, "sync", mib, **policy)
    (pid,) = gunicorn.workers()

    gunicorn.get("/note")
    gunicorn.get("/fill?mib=210")
    until(lambda: pid not in gunicorn.workers(), "the worker is gone")

    assert gunicorn.lines(f"[{pid}] the heap was walked")
    assert (gunicorn.folder / "audit").read_text().splitlines() == [str(pid), f"{pid} at the end"]
    assert not gunicorn.lines("stay shared with the workers")
    assert bool(gunicorn.lines("freeze_preload is off")) is bool(policy)


def test_a_reload_and_a_stop_copy_nothing_either(serve):
    """Old workers end beside new ones, and all of them beside each other."""
    gunicorn = preloading(serve, "sync")
    (old,) = gunicorn.workers()

    gunicorn.signal(1)
    until(lambda: old not in gunicorn.workers() and gunicorn.workers(), "another worker")
    gunicorn.serving(1)
    assert gunicorn.stop() == 0

    assert len(gunicorn.lines("at exit")) == 3
    assert [line for line in gunicorn.lines("walked") if not line.startswith(f"[{gunicorn.pid}]")] == []
