"""A real RabbitMQ of the tests' own: its ports, its folder, its epmd, all ended by pid, and with the tests if they are killed."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import uuid
from pathlib import Path

from serving import ENDING_WITH_US, until

#: Debian's own script under /usr/sbin would become another user; elsewhere the one on the path is the one to run.
DEBIANS = "/usr/lib/rabbitmq/bin/rabbitmq-server"

#: It starts anywhere: neither a full disk nor a small machine makes it refuse what the tests send.
CONFIG = """\
listeners.tcp.local = 127.0.0.1:{port}
vm_memory_high_watermark.absolute = 1GiB
disk_free_limit.absolute = 1MB
"""


def server_binary() -> str | None:
    """What starts it; None where it is not installed."""
    return DEBIANS if os.access(DEBIANS, os.X_OK) else shutil.which("rabbitmq-server")


class RabbitMQ:
    """A server with the user guest, on a free port."""

    def __init__(self, folder: Path) -> None:
        binary, epmd = server_binary(), shutil.which("epmd")
        assert binary is not None
        assert epmd is not None
        self.port, between_nodes, names = _free_ports(3)
        (folder / "rabbitmq.conf").write_text(CONFIG.format(port=self.port))
        (folder / "plugins").write_text("[].\n")
        environ = {
            **{key: value for key, value in os.environ.items() if not key.startswith(("RABBITMQ_", "ERL_"))},
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
        self._log = folder / "rabbitmq.log"
        self.processes: list[subprocess.Popen[bytes]] = []
        with self._log.open("ab") as log:
            for command in ([epmd, "-port", str(names), "-address", "127.0.0.1"], [binary]):
                started = subprocess.Popen(
                    [*ENDING_WITH_US, *command], cwd=folder, env=environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                    start_new_session=True,
                )  # fmt: skip
                self.processes.append(started)
        try:
            until(self._serves, "RabbitMQ serves", 60)
        except BaseException:
            self.stop()
            raise

    def _serves(self) -> bool:
        text = self._log.read_text(errors="replace")
        assert all(process.poll() is None for process in self.processes), text
        return "Server startup complete" in text

    @property
    def url(self) -> str:
        """Of its only virtual host."""
        return f"amqp://guest:guest@127.0.0.1:{self.port}//"

    def stop(self) -> None:
        """End it, and epmd after it."""
        for process in reversed(self.processes):
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)


def _free_ports(count: int) -> list[int]:
    """So many different ones: all are held until the last is known."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()
