"""A real Celery worker under test, with a real Redis or the filesystem as its broker: always ended, by pid."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from celery_client import Clients
from versions import takes_commands_of_others

from oomsafe.demo.server_process import ENDING_WITH_US, ServerProcess, environment

PROJECT = Path(__file__).parent / "celery_worker"

CLIENTS = Clients()


class CeleryWorker(ServerProcess):
    """One node. `ask(code)` runs a line of Python in another process, with `proj` imported, and returns what it makes."""

    GRACE = 15.0

    def __init__(
        self, folder: Path, broker: str, backend: str, *, shared: Path, env: dict[str, str], argv: tuple[str, ...], conf: dict[str, Any],
        wrap: Callable[[list[str]], list[str]] = list,
    ) -> None:  # fmt: skip
        """`shared` is where the filesystem broker lies, for all nodes of a test."""
        self.folder = folder
        if broker.startswith("filesystem"):
            places = {"data_folder_in": "queue", "data_folder_out": "queue", "processed_folder": "processed", "control_folder": "control"}
            for name in places.values():
                (shared / name).mkdir(exist_ok=True)
            conf = {**conf, "broker_transport_options": {key: str(shared / name) for key, name in places.items()}}
        self.env = {
            **environment(path=[PROJECT]),
            "OOMSAFE_PROBE": "false",  # see serving.Server
            "BROKER": broker,
            "BACKEND": backend,
            "OOMSAFE_STATE": str(shared / "state"),
            "RUNS": str(shared / "runs"),
            "CELERY_CONF": json.dumps(conf),
            **env,
        }
        command = [sys.executable, "-m", "celery", "-A", "proj", "worker", "-l", "INFO", "-c", "2", "--without-gossip", "--without-mingle"]
        super().__init__([*ENDING_WITH_US, *wrap([*command, *argv])], folder, self.env)

    def ready(self) -> CeleryWorker:
        """Wait until it takes tasks."""
        self.until(lambda: " ready." in self.log(), "the node is ready", 30)
        return self

    def ask(self, code: str, seconds: float = 60) -> Any:
        """Run `code`, which sets `result`, as a client would."""
        script = f"import json, proj\n{code}\nprint(json.dumps(result))"
        try:
            return json.loads(CLIENTS.run(script, self.folder, self.env, seconds).splitlines()[-1])
        except (AssertionError, TimeoutError) as error:
            raise AssertionError(f"{error}\n{self.log()}") from None

    def celery(self, *argv: str) -> Any:
        """What a command of Celery's own, or one of ours, answers, by node."""
        if argv[1].startswith("memory"):
            takes_commands_of_others()
        ended = subprocess.run(
            [sys.executable, "-m", "celery", "-A", "proj", *argv, "--json", "--timeout", "5"],
            cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert ended.returncode == 0, ended.stdout + ended.stderr
        told = json.loads(ended.stdout[ended.stdout.index("{") if argv[0] == "inspect" else ended.stdout.index("[") :])
        return told if isinstance(told, dict) else {name: answer for node in told for name, answer in node.items()}

    def children(self) -> list[int]:
        """The pids of MainProcess's children."""
        return self.workers()


Start = Callable[..., CeleryWorker]
