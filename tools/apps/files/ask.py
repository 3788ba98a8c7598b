"""Celery's client: sends a task, checks its result, sends the next, until a file named stop is there. Prints what came of it, as JSON."""

import json
import os
import time

from tasks import add

served, failed = 0, []
while not os.path.exists("stop"):
    try:
        result = add.delay(served, 1).get(timeout=60, interval=0.02)
        assert result == served + 1, result
        served += 1
    except Exception as error:
        failed.append(repr(error))
    time.sleep(0.02)
print(json.dumps({"served": served, "failed": failed}))
