"""When a supervisor kills a worker that stays above its hard limit, although the kernel should have refused it the memory. Pure.

The kernel does not count everything (shared memory, mapped files), and not every kernel enforces the limit.
"""

from __future__ import annotations

from typing import NamedTuple

from oomsafe.policy.state import State
from oomsafe.policy.units import MIB

#: Seconds for which a worker may be that far above its hard limit.
PATIENCE = 2.0

#: What counts as above: by this share of the limit, and by this many bytes at least. A worker that the kernel stops at its limit may pass
#: it by a few percent, while other threads answer.
BEYOND, BEYOND_AT_LEAST = 0.1, 16 * MIB

#: A worker that is being replaced is no longer waited for once it has grown by this share since that began.
GROWS = 0.1


class Over(NamedTuple):
    """A worker above its hard limit. Bytes, and seconds on the clock of `now`."""

    since: float
    held: int
    """What it held then."""
    ends: bool
    """Whether it is being replaced: it asks for that, drains or leaves."""
    moved: bool
    """Whether the limit came down to it, and not the worker up to the limit."""


def line_of(hard: int) -> int:
    """The bytes above which a worker with this hard limit counts as above it."""
    return hard + max(int(hard * BEYOND), BEYOND_AT_LEAST)


def follow(before: Over | None, state: State, held: int, line: int, line_before: int, now: float) -> Over | None:
    """The worker's record now that it holds `held` bytes; None: it is below `line`, or boots. `line_before`: the previous `line`."""
    if held <= line or not (state.serves or state.leaves):
        return None
    ends = state is State.WAITING or state.leaves
    moved = held <= line_before if before is None else before.moved
    return Over(now, held, ends, moved) if before is None or before.ends is not ends else before


def is_due(over: Over, held: int, within_budget: bool, grace: float, now: float) -> bool:
    """Whether to kill this worker, which holds `held` bytes now.

    One that is being replaced, or that the limit came down to, has `grace` seconds for its work, as long as it grows no more and the pool
    is within its budget.
    """
    waits = (over.ends or over.moved) and within_budget and held <= over.held * (1 + GROWS)
    return now - over.since >= (max(grace, PATIENCE) if waits else PATIENCE)
