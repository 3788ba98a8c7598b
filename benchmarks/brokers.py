"""Brokers for Celery, for tests and benchmarks: each on free ports, independent of any other broker on the machine.

The demo needs no broker: its worker takes tasks from a folder.
"""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path

from oomsafe.demo.server_process import ENDING_WITH_US, ServerProcess, answers, environment, free_ports

#: Debian's own script under /usr/sbin would become another user; elsewhere the one on the path is the one to run.
DEBIANS = "/usr/lib/rabbitmq/bin/rabbitmq-server"

#: It starts anywhere: neither a full disk nor a small machine makes it refuse what is sent.
CONFIG = """\
listeners.tcp.local = 127.0.0.1:{port}
vm_memory_high_watermark.absolute = 1GiB
disk_free_limit.absolute = 1MB
"""


def redis_binary() -> str | None:
    """The path of redis-server; None if it is not installed."""
    return shutil.which("redis-server")


def rabbitmq_binary() -> str | None:
    """The path of rabbitmq-server; None if it is not installed."""
    return DEBIANS if os.access(DEBIANS, os.X_OK) else shutil.which("rabbitmq-server")


class Redis(ServerProcess):
    """A Redis that keeps everything in memory. It answers once it is constructed."""

    GRACE = 10.0

    def __init__(self, folder: Path) -> None:
        binary = redis_binary()
        assert binary is not None
        (self.port,) = free_ports()
        options = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", str(folder)]
        super().__init__([*ENDING_WITH_US, binary, *options], folder, os.environ, log="redis.log")
        try:
            self.until(lambda: answers(self.port), "redis answers")
        except BaseException:
            self.end()
            raise

    def url(self, database: int) -> str:
        """The URL of one of its databases."""
        return f"redis://127.0.0.1:{self.port}/{database}"


class RabbitMQ(ServerProcess):
    """A RabbitMQ with the user guest, and an epmd of its own. It serves once it is constructed."""

    GRACE = 20.0

    def __init__(self, folder: Path) -> None:
        binary, epmd = rabbitmq_binary(), shutil.which("epmd")
        assert binary is not None
        assert epmd is not None
        self.port, between_nodes, names = free_ports(3)
        (folder / "rabbitmq.conf").write_text(CONFIG.format(port=self.port))
        (folder / "plugins").write_text("[].\n")
        environ = {
            **environment("RABBITMQ_", "ERL_"),
            "HOME": str(folder),  # its cookie is made there
            "ERL_EPMD_PORT": str(names),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": f"oomsafe-{uuid.uuid4().hex[:8]}@localhost",
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(between_nodes),
            "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(folder / "advanced"),
            "RABBITMQ_CONF_ENV_FILE": str(folder / "environment"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "plugins"),
            "RABBITMQ_MNESIA_BASE": str(folder / "mnesia"),
            "RABBITMQ_LOG_BASE": str(folder / "log"),
            "RABBITMQ_LOGS": "-",
            # one that it starts by itself would be a daemon, and stay
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-start_epmd false -kernel inet_dist_use_interface {127,0,0,1} +S 1:1",
            # its script then becomes the server: the pid that is ended is the server's
            "RUNNING_UNDER_SYSTEMD": "true",
        }
        self._epmd = ServerProcess([*ENDING_WITH_US, epmd, "-port", str(names), "-address", "127.0.0.1"], folder, environ, log="epmd.log")
        try:
            super().__init__([*ENDING_WITH_US, binary], folder, environ, log="rabbitmq.log")
        except BaseException:
            self._epmd.end()
            raise
        try:
            self.until(lambda: self._epmd.alive and "Server startup complete" in self.log(), "RabbitMQ serves", 60)
        except BaseException:
            self.end()
            raise

    @property
    def url(self) -> str:
        """The URL of its only virtual host."""
        return f"amqp://guest:guest@127.0.0.1:{self.port}//"

    def end(self) -> None:
        """End it, and epmd after it."""
        super().end()
        self._epmd.end()
