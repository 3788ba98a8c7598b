"""A real Celery worker under test, with a real Redis or the filesystem as its broker: always ended, by pid."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from serving import ENDING_WITH_US, board_of, until

from oomsafe.kernel.process import children_of
from oomsafe.scoreboard.board import Scoreboard
from oomsafe.scoreboard.view import PoolView

PROJECT = Path(__file__).parent / "celery_worker"


class Redis:
    """A server of its own, on a free port, in memory only."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        binary = shutil.which("redis-server")
        assert binary is not None
        options = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", str(folder)]
        self.process = subprocess.Popen([*ENDING_WITH_US, binary, *options], stdout=subprocess.DEVNULL, start_new_session=True)
        until(self._answers, "redis answers")

    def _answers(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
        except OSError:
            return False
        return True

    def url(self, database: int) -> str:
        """Of one of its databases."""
        return f"redis://127.0.0.1:{self.port}/{database}"

    def stop(self) -> None:
        """End it."""
        self.process.terminate()
        self.process.wait(10)


class CeleryWorker:
    """One node. `ask(code)` runs a line of Python in a process of its own, with `proj` imported, and returns what it makes."""

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
            **{key: value for key, value in os.environ.items() if not key.startswith("OOMSAFE_") or key == "OOMSAFE_TESTS_REQUIRE"},
            "PYTHONPATH": os.pathsep.join([str(PROJECT), os.environ.get("PYTHONPATH", "")]),
            "BROKER": broker,
            "BACKEND": backend,
            "OOMSAFE_STATE": str(shared / "state"),
            "RUNS": str(shared / "runs"),
            "CELERY_CONF": json.dumps(conf),
            **env,
        }
        self._log = folder / "celery.log"
        command = [sys.executable, "-m", "celery", "-A", "proj", "worker", "-l", "INFO", "-c", "2", "--without-gossip", "--without-mingle"]
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [*ENDING_WITH_US, *wrap([*command, *argv])], cwd=folder, env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        self.pid = self.process.pid

    def __enter__(self) -> CeleryWorker:
        return self

    def __exit__(self, *_: object) -> None:
        for end in (self.process.terminate, self.process.kill):
            if self.process.poll() is None:
                end()
                try:
                    self.process.wait(15)
                except subprocess.TimeoutExpired:
                    continue

    def ready(self) -> CeleryWorker:
        """Wait until it takes tasks."""
        until(lambda: self.process.poll() is not None or " ready." in self.log(), "the node is ready", 30)
        assert self.process.poll() is None, self.log()
        return self

    def log(self) -> str:
        """What it has written."""
        return self._log.read_text(errors="replace")

    def lines(self, text: str) -> list[str]:
        """The lines of the log that hold `text`."""
        return [line for line in self.log().splitlines() if text in line]

    def ask(self, code: str, seconds: float = 60) -> Any:
        """Run `code`, which sets `result`, as a client would."""
        script = f"import json, proj\n{code}\nprint(json.dumps(result))"
        ended = subprocess.run(
            [sys.executable, "-c", script], cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=seconds, check=False
        )
        assert ended.returncode == 0, ended.stderr + self.log()
        return json.loads(ended.stdout.splitlines()[-1])

    def celery(self, *argv: str) -> Any:
        """What a command of Celery's own, or one of ours, answers, by node."""
        if argv[1].startswith("memory"):
            from versions import takes_commands_of_others  # here: the benchmarks use this module without what the tests drive

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
        return children_of(self.pid)

    def pool(self) -> PoolView:
        """The pool, as its scoreboard shows it."""
        board = Scoreboard.open(until(lambda: board_of(self.pid), f"a scoreboard of {self.pid}"))
        try:
            return board.read()
        finally:
            board.close()


Start = Callable[..., CeleryWorker]
