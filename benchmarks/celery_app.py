"""The Celery app under load, in the node: its broker, its settings and oomsafe's policy come from the environment."""

from __future__ import annotations

import json
import os
import time

import mix_apps
from celery import Celery

app = Celery("celery_app", broker=os.environ["BROKER"], backend=os.environ["BACKEND"])
app.conf.update(json.loads(os.environ["CELERY_CONF"]))

# stock Celery must not even import it
if "POLICY" in os.environ:
    import oomsafe.celery

    oomsafe.celery.install(app, **json.loads(os.environ["POLICY"]))

kept: list[bytes] = []

_RUNS = os.open(os.environ["RUNS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
_LEAK = int(os.environ["LEAK_BYTES"])


@app.task(name="noop")
def noop(number: int) -> int:
    """Nothing."""
    return number


@app.task(name="leak")
def leak(number: int) -> int:
    """Tell that it runs, and keep some memory for ever. Filled with a byte that is not zero: zeros would be mapped lazily."""
    # one write, and appended: the lines of both children don't mix
    os.write(_RUNS, b"%d %d\n" % (number, os.getpid()))
    kept.append(b"x" * _LEAK)
    return number


@app.task(name="balloon")
def balloon(mib: int, seconds: float) -> str:
    """Hold so much for so long: who has a limit below it is killed meanwhile."""
    held = b"x" * (mib << 20)
    time.sleep(seconds)
    return f"nobody minded {len(held)} bytes"


for name, work in mix_apps.WORKS.items():
    app.task(work, name=f"mix.{name}")


@app.task(name="grow")
def grow(path: str, query: str) -> None:
    """What growing_apps.py does at this path."""
    from growing_apps import act

    act(path, query)
