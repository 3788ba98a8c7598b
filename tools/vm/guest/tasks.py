"""The Celery app of the scenarios: a broker and results in files, for no other server is in the machine."""

from __future__ import annotations

import celery

import oomsafe.celery

app = celery.Celery("tasks", broker="filesystem://", backend="file:///run/broker/results")
app.conf.broker_transport_options = {
    "data_folder_in": "/run/broker/in",
    "data_folder_out": "/run/broker/in",
    "control_folder": "/run/broker",
}
app.conf.broker_connection_retry_on_startup = True
oomsafe.celery.install(app)


@app.task
def add(x: int, y: int) -> int:
    """A good one."""
    return x + y


@app.task
def hog() -> None:
    """Takes memory until the kernel kills."""
    kept = []
    while True:
        kept.append(b"x" * (1 << 20))
