"""On RabbitMQ too a poison task comes to an end, and what becomes of its message is what a queue with a dead-letter exchange says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from celerying import Start
from hogs import ENOUGH, LIMIT, come_to_an_end

pytestmark = pytest.mark.xdist_group("rabbitmq")

#: Where rejected messages go: an exchange, and a queue for all of them.
DEAD = """
from kombu import Exchange, Queue
connection = proj.app.connection_for_write()
dead = Queue({name!r}, Exchange({name!r}, type="fanout"))(connection.default_channel)
"""
DECLARED = f"{DEAD}dead.declare(); result = None"
TAKEN = f"""{DEAD}
result = []
while (message := dead.get()) is not None:
    (death,) = message.headers["x-death"]
    result.append([message.headers["id"], message.headers["task"], death["queue"], death["reason"], death["count"]])
    message.ack()
"""


@pytest.mark.parametrize(("bad", "good", "allowed"), [(20, 200, 1), (5, 50, 0)])
def test_a_poison_task_comes_to_an_end(cgroup: Any, celery: Start, tmp_path: Path, bad: int, good: int, allowed: int) -> None:
    """Each hog is run as often as it may and once more, and fails with its reason; then its message, and no other, is a dead letter."""
    sandbox, queue = cgroup(LIMIT), f"q-{tmp_path.name}"
    to_dead = {"exchange": queue, "queue_arguments": {"x-dead-letter-exchange": f"{queue}-dead"}}
    conf = {"task_default_queue": queue, "task_queues": {queue: to_dead}}
    node = celery("rabbitmq", soft_limit="290MiB", max_oom_redeliveries=allowed, env=ENOUGH, conf=conf, wrap=sandbox.command).ready()
    node.ask(DECLARED.format(name=f"{queue}-dead"))

    hogs = come_to_an_end(node, sandbox, bad, good, allowed)

    dead = node.ask(TAKEN.format(name=f"{queue}-dead"))
    assert sorted(dead) == sorted([hog, "proj.hog", queue, "rejected", 1] for hog in hogs)
