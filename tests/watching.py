"""A real `oomsafe watch`, and what it says."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from oomsafe.demo.server_process import ENDING_WITH_US, ServerProcess, environment, until

#: As root sees the pools of all users, those of other tests, too.
WATCH = [sys.executable, "-m", "oomsafe.cli", "watch", "--interval", "0.2"]


class Watching(ServerProcess):
    """Its output, events and lines about failures, is its log."""

    GRACE = 3.0

    def __init__(self, folder: Path, *argv: str) -> None:
        super().__init__([*ENDING_WITH_US, *WATCH, *argv], folder, {**environment(), "PYTHONUNBUFFERED": "1"}, log="watch.log")

    def follows(self, supervisor: int) -> Watching:
        """Wait until it has read the scoreboard of this supervisor, and return this watch."""
        wait_until_followed(self.pid, supervisor)
        return self

    def events(self) -> list[dict[str, Any]]:
        """With --json: those that it has printed."""
        return events_in(self.log())


def wait_until_followed(watch: int, supervisor: int) -> None:
    """Until the process `watch` has read the scoreboard of this supervisor."""
    until(follows(watch, supervisor), f"{watch} has read the scoreboard of {supervisor}", pause=0.01)


def follows(watch: int, supervisor: int) -> Callable[[], bool]:
    """A function that returns whether this has been seen, to be asked every 10 ms.

    Each look opens the scoreboard anew, reads it, and closes the descriptor of the look before: with the second one the first was read.
    A file that only names the memory is opened before the memory is, in the same look.
    """
    found: set[tuple[str, tuple[int, int]]] = set()

    def twice() -> bool:
        boards = set(_boards(supervisor).values())
        found.update((number, board) for number, board in _boards(watch).items() if board in boards)
        return len(found) > len({board for _, board in found})

    return twice


def _boards(pid: int) -> dict[str, tuple[int, int]]:
    """The scoreboards that a process has open, by the descriptor's number."""
    found = {}
    with suppress(OSError):
        for number in os.listdir(f"/proc/{pid}/fd"):
            path = f"/proc/{pid}/fd/{number}"
            with suppress(OSError):
                link = os.readlink(path)
                if "oomsafe-scoreboard" in link or ".board" in link:
                    status = os.stat(path)
                    found[number] = status.st_dev, status.st_ino
    return found


def events_in(text: str, supervisor: int | None = None) -> list[dict[str, Any]]:
    """The complete events in a text, an object a line; of one pool only."""
    found = [json.loads(line) for line in text.split("\n")[:-1] if line.startswith("{")]
    return [event for event in found if supervisor in (None, event["pool"]["supervisor"])]


def script(folder: Path, name: str, text: str) -> str:
    """The path of an executable shell script."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    os.chmod(path, 0o755)
    return str(path)
