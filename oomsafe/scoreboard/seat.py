"""A worker's place in the pool, as it is handed to a process that is spawned: a forked one inherits it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from oomsafe.errors import ScoreboardError, ScoreRefused
from oomsafe.kernel.oom_score import raise_score
from oomsafe.kernel.process import set_comm
from oomsafe.log import log, was_said
from oomsafe.policy.limits import Capacity
from oomsafe.policy.settings import Policy
from oomsafe.scoreboard.board import Scoreboard
from oomsafe.scoreboard.slot import Slot, comm_of


@dataclass(frozen=True)
class Seat:
    """All that a new process must be told; it can be pickled."""

    policy: Policy
    capacity: Capacity
    supervisor: int
    """Its pid."""
    step: int
    """What the worker's oom_score_adj is raised by."""
    address: str | None
    """The scoreboard's; None: there is none."""
    number: int | None
    generation: int | None
    """None: no slot was free, and the worker protects itself unseen."""
    said: frozenset[str] = frozenset()
    """What its supervisor has said once for all."""
    board: Scoreboard | None = None
    """The supervisor's own, which a forked process inherits, wherever it lies; it does not go to one that is spawned."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "board": None}

    def take(self) -> tuple[Scoreboard | None, Slot | None]:
        """In the new process, as early as can be: its slot, its name, its score."""
        was_said(self.said)
        board, slot = self.board, None
        try:
            if board is None and self.address is not None:
                board = Scoreboard.join(self.address)
            if board is not None and self.number is not None and self.generation is not None:
                slot = board.slot(self.number, self.generation)
        except ScoreboardError as error:
            log.error(
                "no scoreboard (%s): this worker keeps to its own limits, and `oomsafe status` does not show it",
                error,
            )
            board, slot = None, None
        enlist(self.policy, self.supervisor, self.step, slot)
        return board, slot


def enlist(policy: Policy, supervisor: int, step: int, slot: Slot | None) -> None:
    """In a worker, before it drops privileges: its slot, its name, its score."""
    try:
        if not policy.dry_run:
            raise_score(step)
    except ScoreRefused as error:
        log.warning("%s", error)
    if slot is not None:
        slot.claim()  # behind its score, which the supervisor raises from now on: by a step once, not twice
        set_comm(comm_of(supervisor, slot))
