"""A Celery node on a broker of its own, the tasks that wait for it, and what became of them."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import common
import redis
from brokers import RabbitMQ, Redis, rabbitmq_binary, redis_binary
from celery import Celery
from kombu import Queue

from oomsafe.demo.server_process import ENDING_WITH_US, ServerProcess

BROKERS = ("redis", "rabbitmq", "filesystem")
CHILDREN = 2
QUEUE = "celery"

#: No node takes from it; Redis renames it, and RabbitMQ moves to the other queue what is rejected in it.
HELD = Queue("held", routing_key="held", queue_arguments={"x-dead-letter-exchange": "", "x-dead-letter-routing-key": QUEUE})

#: Seconds without a new result after which no more will come.
QUIET = 20.0

#: Seconds between two looks at how many results there are: one command, whatever their number.
LOOK = 0.005


@dataclass(frozen=True)
class Contestant:
    """One way to run a node; `policy` None: without oomsafe."""

    broker: str
    way: str
    conf: dict[str, Any]
    policy: dict[str, Any] | None = None
    baseline: str | None = None
    """The way that its figures are compared with."""

    @property
    def name(self) -> str:
        """As the tables show it."""
        return f"{self.broker}: {self.way}"


class Place:
    """A broker, a Redis for the results, and a client that sends tasks and waits for none: that would be work for Redis."""

    def __init__(self, folder: Path, broker: str, backend: Redis, options: dict[str, str]) -> None:
        self.folder = folder
        self.broker = broker
        self.backend = backend.url(1)
        self.options = options
        self._results = redis.Redis(port=backend.port, db=1)
        self._broker = redis.Redis(port=backend.port, db=0) if broker.startswith("redis") else None
        self._client = Celery("client", broker=broker, backend="disabled://", set_as_current=False)
        self._client.conf.broker_transport_options = options
        self._queue: Any = self._client.connection_for_read()

    def close(self) -> None:
        """Before the broker ends."""
        self._queue.release()
        self._client.close()
        self._client.pool.force_close_all()
        self._results.close()
        if self._broker is not None:
            self._broker.close()

    def send(self, task: str, arguments: list[tuple[Any, ...]], queue: str | Queue = QUEUE) -> list[str]:
        """Queue one task for each. Returns their ids."""
        with self._client.producer_pool.acquire(block=True) as producer:
            return [self._client.send_task(task, given, producer=producer, queue=queue).id for given in arguments]

    def hold(self, task: str, arguments: list[tuple[Any, ...]]) -> tuple[list[str], Callable[[], None]]:
        """Queue one task for each where no node looks. Returns their ids, and what lets the node have all of them at once.

        A client that sends while the node works would take from it what is to be measured.
        """
        ids = self.send(task, arguments, HELD)
        if self._broker is not None:
            return ids, partial(self._broker.rename, HELD.name, QUEUE)
        channel, last = self._queue.channel(), 0

        def reject_all() -> None:
            for tag in range(1, last + 1):
                channel.basic_reject(tag, requeue=False)
            channel.close()

        def arrived(message: Any) -> None:
            nonlocal last
            last = message.delivery_tag

        # the node does so too, but may not be up yet
        self._client.amqp.queues[QUEUE](channel).declare()
        channel.basic_consume(HELD.name, callback=arrived)
        while last < len(ids):
            self._queue.drain_events(timeout=common.PATIENCE)
        return ids, reject_all

    def waiting(self) -> int:
        """Tasks that no node has taken."""
        try:
            return int(self._queue.default_channel.queue_declare(QUEUE, passive=True).message_count)
        except self._queue.channel_errors:
            return 0  # Redis has no key for an empty list

    def keys(self) -> int:
        """In the results' database. With acks_late these are a few more than results: oomsafe's notes are removed when a task has ended."""
        return int(self._results.dbsize())

    def there(self, ids: list[str]) -> int:
        """How many of the tasks have a result."""
        return int(self._results.exists(*map(_key, ids)))

    def results(self, ids: list[str]) -> list[dict[str, Any] | None]:
        """What each has in the backend; None: nothing."""
        found: Any = self._results.mget(list(map(_key, ids)))
        return [raw and json.loads(raw) for raw in found]

    def right(self, ids: list[str]) -> set[int]:
        """The tasks that have ended well, and have their own number for a result."""
        found = enumerate(self.results(ids))
        return {number for number, result in found if result and result["status"] == "SUCCESS" and result["result"] == number}


def _key(task_id: str) -> str:
    return f"celery-task-meta-{task_id}"


@contextlib.contextmanager
def place(kind: str) -> Iterator[Place]:
    """A new one; ended with all that belongs to it."""
    with contextlib.ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="oomsafe-benchmark-"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        backend = stack.enter_context(Redis(folder))
        broker, options = backend.url(0), {}
        if kind == "rabbitmq":
            broker = stack.enter_context(RabbitMQ(folder)).url
        elif kind == "filesystem":
            broker = "filesystem://"
            ways = {"data_folder_in": "queue", "data_folder_out": "queue", "processed_folder": "processed", "control_folder": "control"}
            options = {key: str(folder / name) for key, name in ways.items()}
            for path in set(options.values()):
                Path(path).mkdir()
        here = Place(folder, broker, backend, options)
        stack.callback(here.close)
        yield here


def missing(kind: str) -> str | None:
    """What isn't installed of what a broker takes; None: nothing."""
    if redis_binary() is None:
        return "redis-server is not installed"
    return "rabbitmq-server is not installed" if kind == "rabbitmq" and rabbitmq_binary() is None else None


class Node(ServerProcess):
    """prefork with two children. `policy` None: stock Celery."""

    GRACE = 10.0

    def __init__(self, here: Place, conf: dict[str, Any], policy: dict[str, Any] | None, *, leak: int = 0) -> None:
        self.runs = here.folder / "runs"
        settings = {"broker_transport_options": here.options, "broker_connection_retry_on_startup": True, **conf}
        environ = {
            **common.environment(common.HERE),
            "BROKER": here.broker,
            "BACKEND": here.backend,
            "CELERY_CONF": json.dumps(settings),
            "RUNS": str(self.runs),
            "LEAK_BYTES": str(leak),
            "OOMSAFE_STATE": str(here.folder / "state"),
            **({} if policy is None else {"POLICY": json.dumps(policy)}),
        }
        # two lines of log for each task would cost more than what is to be measured
        command = [sys.executable, "-m", "celery", "-A", "celery_app", "worker", "-l", "WARNING", "-P", "prefork", "-c", str(CHILDREN)]
        command = [*ENDING_WITH_US, *command, "--without-gossip", "--without-mingle"]
        super().__init__(command, here.folder, environ, log="node.log")

    def takes_the_first_of(self, here: Place, tasks: int) -> None:
        """Wait until it does."""
        self.until(lambda: here.waiting() < tasks, "a task is taken", common.PATIENCE, pause=0.005)

    def counted(self, tasks: int) -> int | None:
        """The tasks on its scoreboard, once these are `tasks` (children publish once a second) or that takes too long; None without one."""
        deadline = time.monotonic() + common.PATIENCE
        while True:
            pool = self.find_pool()
            if pool is None or pool.totals.work >= tasks or time.monotonic() > deadline:
                return None if pool is None else pool.totals.work
            time.sleep(0.1)
