"""The pools of this machine over time: which begin, what they show, and which end, in order or not."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from oomsafe.cli.pools import EACH, PATIENCE
from oomsafe.errors import ScoreboardError
from oomsafe.kernel.process import is_alive
from oomsafe.policy.alerts import ASKED_FOR, KILLS, Alert, Key, PoolKey, Reading, Worker
from oomsafe.policy.retention import judge
from oomsafe.policy.text import printable, without_controls
from oomsafe.scoreboard.live import live
from oomsafe.scoreboard.margin import margin_of
from oomsafe.scoreboard.places import living_boards
from oomsafe.scoreboard.reader import Reader
from oomsafe.scoreboard.view import PoolView

#: At most this many pools are watched: each takes a descriptor.
MOST = 256


class Living(NamedTuple):
    """A living pool."""

    key: PoolKey
    view: PoolView
    new: bool
    """Whether it has begun since the last reading."""


class Gone(NamedTuple):
    """A pool whose supervisor has ended since the last reading."""

    key: PoolKey
    in_order: bool | None
    """None: not known. A single process ends without a word also where its server ends it in order, by a signal of its own (uvicorn)."""
    orphans: int
    """How many of its workers live on."""


@dataclass
class _Known:
    key: PoolKey
    reader: Reader
    """Stays open: what the supervisor has left is read when its file is gone."""
    created: float


class Pools:
    """All pools of this user, for root those of all users; or the one whose scoreboard is `path`."""

    def __init__(self, path: str | None, say: Callable[[str], None]) -> None:
        """`say` gets a line for each scoreboard that can't be read, once."""
        self._path, self._say = path, say
        self._known: dict[str, _Known] = {}
        self._said: set[str] = set()
        self._left_out: set[str] = set()
        """The scoreboards for which there was no time at the last reading: they are read first at the next one."""
        self._read_at: float | None = None
        """When they were last read, seconds since 1970."""

    def read(self) -> tuple[list[Gone], list[Living]]:
        """Those that have ended since the last reading, and those that live."""
        began = time.time()
        paths = [self._path] if self._path else living_boards()
        gone = [] if self._path else [self._ended(path) for path in list(self._known) if path not in set(paths)]
        living: list[Living] = []
        left_out: set[str] = set()
        for folder, in_folder in groupby(paths, os.path.dirname):
            until = time.monotonic() + PATIENCE
            for path in sorted(in_folder, key=lambda path: path not in self._left_out):
                left = until - time.monotonic()
                if left > 0:
                    self._read(path, min(EACH, left), gone, living)
                else:  # its owner has filled the folder with boards that take long to read
                    left_out.add(path)
                    self._say_once(f"{folder}: not all pools can be read within {PATIENCE:g} s: they are watched in turn, each more rarely")
        self._left_out = left_out
        self._read_at = began
        return gone, living

    def close(self) -> None:
        """Close what is open."""
        for known in self._known.values():
            known.reader.close()
        self._known.clear()

    def _read(self, path: str, patience: float, gone: list[Gone], living: list[Living]) -> None:
        known = self._known.get(path)
        if known is None and len(self._known) >= MOST:
            self._say_once(f"{path} is not watched: {MOST} pools are already")
            return
        try:
            reader = Reader(path)
        except ScoreboardError as error:
            if known is not None and self._path:
                gone.append(self._ended(path))
            elif known is None and (self._path or os.path.lexists(path)):  # else it has ended meanwhile
                self._say_once(str(error))
            return
        try:
            view = live(reader.read(patience))
        except ScoreboardError as error:
            reader.close()
            self._say_once(str(error))
            return
        if self._path and not is_alive(view.supervisor, view.supervisor_started):
            reader.close()
            if known is not None:
                gone.append(self._ended(path))
            else:
                self._say_once(f"{path}: its supervisor {view.supervisor} has ended")
            return
        if known is not None and known.created != view.created:
            gone.append(self._ended(path))  # its process has made another in its place
            known = None
        if known is None:
            known = _Known(key_of(path, view), reader, view.created)
            new = self._read_at is not None and view.created >= self._read_at - 1.0
        else:
            known.reader.close()
            known.reader, new = reader, False
        self._known[path] = known
        living.append(Living(known.key, view, new))

    def _ended(self, path: str) -> Gone:
        """Read what the supervisor has left."""
        known = self._known.pop(path)
        try:
            left = known.reader.read(EACH)
        except ScoreboardError:
            return Gone(known.key, False, 0)
        finally:
            known.reader.close()
        # one that lives has left its pool to begin another, as Celery does when it reloads (exec)
        lives = is_alive(known.key.supervisor, known.key.started)
        if lives and left.ended is None and not os.path.lexists(path):
            self._say(f"{path} is gone, and supervisor {known.key.supervisor} lives: its pool can't be watched")
        in_order = True if lives or left.ended is not None else None if left.is_single_process else False
        return Gone(known.key, in_order, 0 if in_order else len(left.workers))

    def _say_once(self, text: str) -> None:
        if len(self._said) >= 4 * MOST:
            self._said.clear()
        if text not in self._said:
            self._said.add(text)
            self._say(text)


def key_of(path: str, view: PoolView) -> PoolKey:
    """What identifies a pool, and what it is called."""
    return PoolKey(view.name, printable(view.server), view.supervisor, view.supervisor_started, without_controls(path))


def reading_of(view: PoolView) -> Reading:
    """What its alerts are about. Other processes' figures are read now."""
    totals = view.totals
    counts: dict[Key, int] = {(Alert.KERNEL_KILL, verdict): view.ends.get(verdict, 0) for verdict in KILLS}
    counts |= {(Alert.CULPRIT_FOUND, route): count for route, count in view.culprits.items()}
    counts[Alert.SHEDDING, ""] = totals.aborts_by_reason["shed"]
    counts[Alert.RECYCLE_STORM, ""] = sum(count for reason, count in totals.by_reason.items() if reason not in ASKED_FOR)
    workers = [
        Worker(
            name=f"worker {worker.pid} (slot {worker.slot})",
            used=worker.used,
            soft=worker.figures.soft,
            held=view.held_by(worker),
            hard=worker.figures.hard,
        )
        for worker in view.workers
    ]
    return Reading(
        limit=view.limit,
        others=view.others,
        held=None if view.held is None else max(0, view.held - view.droppable),
        budget=view.budget,
        margin=margin_of(view),
        wanted=view.workers_wanted,
        serving=sum(worker.state.serves for worker in view.workers),
        workers=workers,
        refused=view.refused,
        counts=counts,
        leak=judge(view.retired).each,
        last_death=view.deaths[0].line if view.deaths else "",
        last_recycle="" if view.last_recycle is None else view.last_recycle.line,
    )
