"""The demo's Celery app, with a real leak: each good task keeps 1 MiB forever, some tasks ask for more than there is, some take it.

No broker is needed: messages and results are files in the worker's current folder.
"""

from __future__ import annotations

import os
from typing import Any

from celery import Celery

from oomsafe.demo.app import TASK_LEAK

#: More than any machine gives: a real allocation that fails.
FAR_TOO_MUCH = 1 << 46

#: The bytes at which a poison task ends by itself, in case no kernel stops it.
ENOUGH = 1 << 30

_cache: list[bytes] = []


def settings(folder: str, out: str = "again", control: str = "control") -> dict[str, Any]:
    """Celery's settings for the worker or its client. Each has its own `out` folder, for complete messages. Creates the folders."""
    places = {name: os.path.join(folder, name) for name in ("queue", "processed", "results", out, control)}
    for path in places.values():
        os.makedirs(path, mode=0o700, exist_ok=True)
    return {
        "broker_url": "filesystem://",
        "broker_transport_options": {
            "data_folder_in": places["queue"],
            "data_folder_out": places[out],
            "processed_folder": places["processed"],
            "control_folder": places[control],
            "polling_interval": 0.05,
        },
        "result_backend": f"file://{places['results']}",
        "broker_connection_retry_on_startup": True,
        "task_default_queue": "demo",
    }


app = Celery("demo", set_as_current=False)


@app.on_configure.connect  # type: ignore[untyped-decorator]
def _configure(sender: Any, **_: Any) -> None:
    sender.conf.update(settings(os.getcwd()))


@app.task(name="good")  # type: ignore[untyped-decorator]
def good(number: int) -> int:
    """Leak, and return a number that the client can check."""
    _cache.append(bytes([number % 256]) * TASK_LEAK)
    return number * number


@app.task(name="balloon")  # type: ignore[untyped-decorator]
def balloon() -> int:
    """Raise a real MemoryError."""
    return len(bytes(FAR_TOO_MUCH))


@app.task(name="poison", acks_late=True, reject_on_worker_lost=True)  # type: ignore[untyped-decorator]
def poison() -> int:
    """Get killed by the kernel; Celery by itself would run this task again forever."""
    taken: list[bytes] = []
    while len(taken) << 22 < ENOUGH:
        taken.append(b"x" * (1 << 22))
    return len(taken)
