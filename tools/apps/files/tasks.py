"""A Celery app whose task keeps 1 MiB, with files for a broker."""

import os

from celery import Celery

kept = []
FOLDERS = {"data_folder_in": "queue", "data_folder_out": "queue", "processed_folder": "processed", "control_folder": "control"}
for folder in {*FOLDERS.values(), "results"}:
    os.makedirs(folder, exist_ok=True)
app = Celery("tasks", broker="filesystem://", backend=f"file://{os.path.abspath('results')}")
app.conf.broker_transport_options = {**FOLDERS, "polling_interval": 0.02}
app.conf.broker_connection_retry_on_startup = True


@app.task
def add(one, two):
    kept.append(b"\xff" * (1 << 20))
    return one + two
