"""A worker's place in the pool, in a form that can be passed to a spawned process; a forked one inherits it."""

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
    """All that a new worker process needs; it can be pickled."""

    policy: Policy
    capacity: Capacity
    supervisor: int
    """Its pid."""
    raise_by: int
    """The increment for the worker's oom_score_adj."""
    address: str | None
    """The scoreboard's address; None: there is no scoreboard."""
    number: int | None
    generation: int | None
    """None: no slot was free, and the worker protects itself without the scoreboard."""
    said: frozenset[str] = frozenset()
    """What the supervisor has logged once, so that the worker does not log it again."""
    board: Scoreboard | None = None
    """The supervisor's own, which a forked process inherits, wherever it lies; it is not pickled for a spawned one."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "board": None}

    def take(self) -> tuple[Scoreboard | None, Slot | None]:
        """In the new process, as early as possible: open its slot, set its name and its score."""
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
        enlist(self.policy, self.supervisor, self.raise_by, slot)
        return board, slot


def enlist(policy: Policy, supervisor: int, raise_by: int, slot: Slot | None) -> None:
    """In a worker, before it drops privileges: claim its slot, set its name and its score."""
    try:
        if not policy.dry_run:
            raise_score(raise_by)
    except ScoreRefused as error:
        log.warning("%s", error)
    if slot is not None:
        slot.claim()  # after setting the score, because the supervisor adjusts the score of claimed slots: not twice by the same difference
        set_comm(comm_of(supervisor, slot))
