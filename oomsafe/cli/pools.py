"""The pools of this machine, read from their scoreboards: for all commands that show pools or order something of them."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from itertools import groupby
from typing import NamedTuple

from oomsafe.errors import ScoreboardError
from oomsafe.policy.text import without_controls
from oomsafe.scoreboard.board import Scoreboard
from oomsafe.scoreboard.places import can_hold_boards
from oomsafe.scoreboard.view import PoolView

#: The most seconds for reading the boards of one folder, and for reading one board again while it is being written.
PATIENCE, EACH = 2.0, 0.25


class Found(NamedTuple):
    """A pool, and the path of its scoreboard."""

    path: str
    pool: PoolView


def on_stderr(problem: str) -> None:
    """Print what is wrong with a scoreboard, as one line."""
    print(f"oomsafe: {problem}", file=sys.stderr)


def find_pools(paths: list[str], say: Callable[[str], None] = on_stderr, *, routes: bool = True) -> list[Found]:
    """The pools that can be read; `say` gets one line for each other. If a user has filled his folder with boards that take long to read,
    the rest of them is skipped. Without `routes`, the counters of each route are left out."""
    pools: list[Found] = []
    for folder, in_folder in groupby(paths, os.path.dirname):
        until, left_out = time.monotonic() + PATIENCE, 0
        for path in in_folder:
            if time.monotonic() >= until:
                left_out += 1
                continue
            try:
                with Scoreboard.open(path) as board:
                    pools.append(Found(path, board.read(patience=min(EACH, until - time.monotonic()), routes=routes)))
            except ScoreboardError as error:
                say(without_controls(str(error)))
        if left_out:
            say(f"{folder}: {left_out} more pools are skipped: they can't be read within {PATIENCE:.0f} s")
    return pools


def is_called(pool: PoolView, name: str) -> bool:
    """Whether this is the pool's name, or its supervisor's pid, as given with --pool."""
    return name in (pool.name, str(pool.supervisor))


def none_found() -> str:
    """What is said where there is no pool."""
    unseen = "" if can_hold_boards() else ", or its scoreboard is in memory only: no folder here is writable"
    return f"no pool of this user is guarded by oomsafe now{unseen} (root sees those of all users)"
